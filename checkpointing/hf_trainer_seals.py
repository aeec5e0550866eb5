"""Seals for `checkpoint-N` directories of other trainers, such as `transformers.Trainer`.

A seal is a manifest, written last, after every file is durable: a sealed checkpoint was saved completely, and every
byte can be verified. Nothing here deletes or changes a checkpoint. Nothing claims a run either, so two processes that
write into one directory are not kept apart; `Checkpointer` does that. Verifying runs no code, but Trainer's checkpoints
contain pickles (`optimizer.pt`, `rng_state.pth`): loading them trusts their writer. Digests detect accidents, not
attacks.
"""

import logging
import os
import time
from functools import partial
from pathlib import Path

from outlast.checkpointing.errors import ConfigError, NoCheckpointError, NotAFileError, StorageError
from outlast.checkpointing.escaping import escaped
from outlast.checkpointing.format.layout import (
    MANIFEST,
    AttemptId,
    CheckpointRef,
    checkpoint_name,
    is_litter,
    parse_checkpoint,
)
from outlast.checkpointing.format.manifest import BLOCK_BYTES, Digester, FileEntry, Manifest, ManifestError
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.base import list_directories, read_bytes, walk
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.retry import retry

_log = logging.getLogger(__name__)
#: Attempts are numbered from 1; a sealed checkpoint belongs to none.
_NO_ATTEMPT = AttemptId(0, "0000")


def seal(directory: str | os.PathLike[str], *, world_size: int = 1) -> Manifest:
    """Make a checkpoint directory durable and write its manifest.

    Call it in one process, after all processes have written their files. A directory may be sealed again.

    Args:
        directory: `…/checkpoint-N`.
        world_size: Number of processes that wrote it.

    Raises:
        ConfigError: The directory is missing or empty, or its name is not `checkpoint-N`.
        StorageError: The disk failed. There is no new seal.
    """
    path = Path(directory).absolute()
    step = parse_checkpoint(path.name)
    storage = LocalStorage(path.parent)
    entries = [entry for entry in walk(storage, path.name, skip=is_litter) if not is_litter(entry.name)]
    if special := [f"{entry.name} is {entry.special}" for entry in entries if entry.special]:
        raise ConfigError(f"cannot seal {path}: {special[0]}, not a file", hint="put the file itself in its place")
    names = [entry.name for entry in entries if entry.name != MANIFEST]
    if step is None or not names:
        raise ConfigError(
            f"cannot seal {path}: it is not a checkpoint-N directory with files in it",
            hint="give the directory that transformers.Trainer wrote, such as out/checkpoint-500",
        )
    storage.sync(path.name)
    manifest = Manifest(
        ref=CheckpointRef(step, _NO_ATTEMPT),
        lineage=(),
        files=tuple(retry(partial(_digest, storage, path.name, name)) for name in sorted(names)),
        world_size=world_size,
        metrics={},
        committed_at=time.time(),
        launch="",
    )
    storage.put(f"{path.name}/{MANIFEST}", [manifest.to_json()])
    return manifest


def _digest(storage: LocalStorage, directory: str, name: str) -> FileEntry:
    digester = Digester()
    with storage.open(f"{directory}/{name}") as file:
        while chunk := file.read(BLOCK_BYTES):
            digester.update(chunk)
    return digester.entry(name)


def newest_sealed(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the path of the newest checkpoint whose seal verifies; None if no checkpoint is sealed. Reads every byte.

    Newer ones that are skipped are logged as warnings. In a process group every rank must call this, and all get the
    same result: a checkpoint counts if it is intact on every rank. `output_dir` need not exist.

    Raises:
        NoCheckpointError: There are sealed checkpoints, but none is intact. Continuing would start from step 0.
        StorageError: The disk failed, which proves nothing about its content.
    """
    storage, ranks = LocalStorage(Path(output_dir)), RankGroup()
    damaged = []
    steps_of_ranks = ranks.run_on_all(lambda: _steps(storage))
    for step in sorted({step for steps in steps_of_ranks for step in steps if step is not None}, reverse=True):
        directory = checkpoint_name(step)
        sealed, faults = _inspect_on_all(ranks, storage, directory)
        if not faults:
            return str(storage.path(directory))
        _log.warning("passed over %s: %s", escaped(str(storage.path(directory))), escaped("; ".join(faults)))
        damaged += [f"  {directory}: {'; '.join(faults)}"] if sealed else []
    if damaged:
        raise NoCheckpointError(
            f"{storage.url} has sealed checkpoints, but none is intact; nothing was changed\n" + "\n".join(damaged),
            hint="restore the files from a copy, or move the directory away to start from the beginning",
        )
    return None


def _steps(storage: LocalStorage) -> list[int | None]:
    return retry(lambda: [parse_checkpoint(name) for name in list_directories(storage, "")])


def _inspect_on_all(ranks: RankGroup, storage: LocalStorage, directory: str) -> tuple[bool, list[str]]:
    """Return whether any rank sees a seal, and the faults of all ranks."""
    sealed, faults = False, ["there is no seal: it was not saved completely, or not sealed"]
    failure: StorageError | None = None
    try:
        data = retry(lambda: read_bytes(storage, f"{directory}/{MANIFEST}"))
        sealed, faults = True, _faults(storage, directory, data)
    except FileNotFoundError:
        pass
    except NotAFileError:
        sealed, faults = True, [f"{MANIFEST}: not a file"]
    except StorageError as error:
        failure = error
    results = ranks.gather((sealed, faults, failure))
    for _, _, other in results:
        if other is not None:
            raise other
    return any(flag for flag, _, _ in results), sorted({line for _, lines, _ in results for line in lines})


def _faults(storage: LocalStorage, directory: str, data: bytes) -> list[str]:
    try:
        manifest = Manifest.parse(data)
    except ManifestError as error:
        return [f"{MANIFEST}: {error}"]
    if checkpoint_name(manifest.ref.step) != directory:
        return [f"{MANIFEST}: it belongs to {checkpoint_name(manifest.ref.step)}"]
    return verify(storage, directory, manifest)
