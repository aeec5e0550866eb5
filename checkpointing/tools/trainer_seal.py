"""Seals for `checkpoint-N` directories that somebody else writes, such as `transformers.Trainer`.

A seal is a manifest, written last, after every file is durable: what has one was saved to the end, and every byte can
be proven. Nothing here ever deletes or changes a checkpoint, and nothing here claims a run, so two processes that write
into one directory are not told apart; `Checkpointer` does that. Verifying runs no code. But the checkpoints of Trainer
hold pickles (`optimizer.pt`, `rng_state.pth`), and whoever loads those trusts whoever could write them: digests find
accidents, not attackers.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from pathlib import Path

from outlast.checkpointing.errors import ConfigError, NoCheckpointError, StorageError
from outlast.checkpointing.format.layout import MANIFEST, AttemptId, CheckpointRef, checkpoint_name, parse_checkpoint
from outlast.checkpointing.format.manifest import BLOCK_BYTES, Digester, FileEntry, Manifest, ManifestError
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.base import read_bytes, walk
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.retry import retry

_log = logging.getLogger(__name__)
#: Attempts are numbered from 1; a sealed checkpoint belongs to none.
_NO_ATTEMPT = AttemptId(0, "0000")


def seal(directory: str | os.PathLike[str], *, world_size: int = 1) -> Manifest:
    """Makes a checkpoint directory durable and writes its manifest, which says that it is whole.

    Call it when every process has written its files, on one process alone. A directory that changed since it was
    sealed may be sealed again.

    Args:
        directory: `…/checkpoint-N`.
        world_size: Number of processes that wrote it.

    Raises:
        ConfigError: There is no such directory, it is empty, or its name is not `checkpoint-N`.
        StorageError: The disk failed. There is no new seal.
    """
    path = Path(directory).absolute()
    step = parse_checkpoint(path.name)
    storage = LocalStorage(path.parent)
    names = [entry.name for entry in walk(storage, path.name) if entry.name != MANIFEST]
    if step is None or not names:
        raise ConfigError(
            f"cannot seal {path}: it is no checkpoint-N directory with files in it",
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
    """The newest checkpoint in a directory whose seal verifies byte for byte; every byte is read.

    Each newer one that is passed over is logged as a warning, with the reason. In a process group every rank must call
    this, and all get the same answer: a checkpoint counts when it is whole on every rank.

    Args:
        output_dir: Where the `checkpoint-N` directories lie; it need not exist.

    Returns:
        Its path, or None when there is no sealed checkpoint, and training starts from its beginning.

    Raises:
        NoCheckpointError: There are sealed checkpoints, and none of them is whole. Going on would start from zero.
        StorageError: The disk failed, which proves nothing about what is on it.
    """
    storage, ranks = LocalStorage(Path(output_dir)), RankGroup()
    damaged = []
    seen = ranks.everybody(lambda: _steps(storage))
    for step in sorted({step for steps in seen for step in steps if step is not None}, reverse=True):
        directory = checkpoint_name(step)
        sealed, faults = _agreed(ranks, storage, directory)
        if not faults:
            return str(storage.path(directory))
        _log.warning("passed over %s: %s", storage.path(directory), "; ".join(faults))
        damaged += [f"  {directory}: {'; '.join(faults)}"] if sealed else []
    if damaged:
        raise NoCheckpointError(
            f"{storage.url} has sealed checkpoints, but none is whole; nothing was changed\n" + "\n".join(damaged),
            hint="restore the files from a copy, or move the directory away to start from the beginning",
        )
    return None


def _steps(storage: LocalStorage) -> list[int | None]:
    return retry(lambda: [parse_checkpoint(entry.name) for entry in storage.list("") if entry.num_bytes is None])


def _agreed(ranks: RankGroup, storage: LocalStorage, directory: str) -> tuple[bool, list[str]]:
    """Whether any rank sees a seal, and what any rank finds wrong."""
    sealed, faults = False, ["there is no seal: it was not saved to the end, or nobody sealed it"]
    failure: StorageError | None = None
    try:
        data = retry(lambda: read_bytes(storage, f"{directory}/{MANIFEST}"))
        sealed, faults = True, _faults(storage, directory, data)
    except FileNotFoundError:
        pass
    except StorageError as error:
        failure = error
    seen = ranks.gather((sealed, faults, failure))
    for _, _, other in seen:
        if other is not None:
            raise other
    return any(flag for flag, _, _ in seen), sorted({line for _, lines, _ in seen for line in lines})


def _faults(storage: LocalStorage, directory: str, data: bytes) -> list[str]:
    try:
        manifest = Manifest.parse(data)
    except ManifestError as error:
        return [f"{MANIFEST}: {error}"]
    if checkpoint_name(manifest.ref.step) != directory:
        return [f"{MANIFEST}: it belongs to {checkpoint_name(manifest.ref.step)}"]
    return verify(storage, directory, manifest)
