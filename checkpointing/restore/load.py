"""Restore of one checkpoint into a model and its optimizer, on all ranks or on none.

Each rank reads what it needs; together they read every byte. A checkpoint that any rank finds damaged is never used.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.format.safetensors import TensorSpec
from outlast.checkpointing.restore.reader import Header, Index, merge, read_header, read_regions, read_verified
from outlast.checkpointing.restore.verify import check_listing
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.state.loop_state import decode_state
from outlast.checkpointing.state.named_weights import compare_weights
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.train_state import Targets, TrainState
from outlast.checkpointing.storage.base import Storage


def restore(
    store: RunStore, manifest: Manifest, ranks: RankGroup, train_state: TrainState
) -> tuple[dict[str, Any] | None, list[str]]:
    """Load a checkpoint if every rank finds it intact. Every rank calls it.

    Returns its loop state, on every rank; or None and the faults, one line per file: the weights may then be a mixture.
    Raises ConfigError if it is of another model or optimizer, or lacks optimizer state, and StorageError, which proves
    nothing.
    """
    storage, directory = store.storage, store.checkpoint_dir(manifest.ref)
    gathered = ranks.run_on_all(lambda: _read_headers(storage, directory, manifest, ranks))
    if faults := _merged(lines for _, lines in gathered):
        return None, faults
    headers = [item for by_path, _ in gathered for item in by_path.items()]
    try:
        weights = merge(index for path, (index, _) in headers if not _is_state(path))
        moments = merge(index for path, (index, _) in headers if _is_state(path))
    except DamagedError as error:
        return None, [error.message]
    if shared := weights.keys() & moments.keys():
        return None, [f"{weights[min(shared)][0].path}: {min(shared)} is also the name of optimizer state"]
    with _named(manifest.ref):
        train_state.use_naming_of(weights)
        compare_weights(train_state.specs, _specs(weights))
    if train_state.optimizer is not None and not any(_is_state(entry.path) for entry in manifest.files):
        raise ConfigError(
            f"{manifest.ref} was saved without an optimizer; continuing with an empty one would be another run",
            hint="resume without an optimizer, or start a new run",
        )
    described = _optimizers(headers)
    try:
        with _named(manifest.ref):
            for path, text in described.items():
                train_state.check_optimizer(text, path)
            train_state.check_moments(moments)
    except DamagedError as error:
        return None, [error.message]
    targets = train_state.targets(_specs(moments))
    index = {**weights, **moments}
    read = ranks.run_on_all(lambda: _read_state(storage, directory, manifest, index, targets, ranks))
    if faults := _merged(lines for _, lines in read):
        return None, faults
    train_state.load_moments({name: targets[name][1] for name in moments})
    for path, text in described.items():
        train_state.load_groups(text, path)
    return read[0][0], []


@contextmanager
def _named(ref: CheckpointRef) -> Iterator[None]:
    """Name the checkpoint in a ConfigError of the block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{ref}: {error.message}", hint=error.hint) from error


def _specs(index: Index) -> dict[str, TensorSpec]:
    return {name: TensorSpec(parts[0].spec.dtype, parts[0].shape) for name, parts in index.items()}


def _optimizers(headers: Iterable[tuple[str, Header]]) -> dict[str, str]:
    """Return the descriptions of the optimizer by path; none in checkpoints of 0.1.0."""
    return {path: metadata["optimizer"] for path, (_, metadata) in headers if "optimizer" in metadata}


def _read_headers(
    storage: Storage, directory: str, manifest: Manifest, ranks: RankGroup
) -> tuple[dict[str, Header], list[str]]:
    """Read this rank's share of the file headers, by path. Rank 0 also verifies all files without tensors."""
    faults = check_listing(storage, directory, manifest) if ranks.rank == 0 else []
    headers: dict[str, Header] = {}
    try:
        for number, entry in enumerate(manifest.files if not faults else ()):
            if entry.path.endswith(".safetensors"):
                if number % ranks.size == ranks.rank:
                    headers[entry.path] = read_header(storage, directory, entry)
            elif ranks.rank == 0:
                read_verified(storage, directory, entry)
    except DamagedError as error:
        faults.append(error.message)
    return headers, faults


def _read_state(
    storage: Storage, directory: str, manifest: Manifest, index: Index, targets: Targets, ranks: RankGroup
) -> tuple[dict[str, Any], list[str]]:
    """Fill the targets, on rank 0 also read the loop state. Returns the loop state and the faults."""
    faults = read_regions(storage, directory, manifest, index, targets)
    if ranks.rank or faults:
        return {}, faults
    try:
        entry = next((entry for entry in manifest.files if entry.path == layout.LOOP_STATE), None)
        if entry is None:
            raise DamagedError(f"{layout.LOOP_STATE}: not in the manifest")
        return decode_state(read_verified(storage, directory, entry).numpy().tobytes(), entry.path), []
    except DamagedError as error:
        return {}, [error.message]


def _merged(faults: Iterable[list[str]]) -> list[str]:
    return sorted({line for lines in faults for line in lines})


def _is_state(path: str) -> bool:
    return path.startswith(f"{layout.STATE_DIR}/optimizer-")
