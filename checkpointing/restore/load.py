"""One checkpoint, read into a model and its optimizer on every rank, or refused by all of them together.

Each rank reads what it needs; together they read every byte. What one rank finds damaged, none uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.format.safetensors import TensorSpec
from outlast.checkpointing.restore.reader import Index, merge, read_index, read_regions, read_verified
from outlast.checkpointing.restore.verify import check_listing
from outlast.checkpointing.state.model_weights import WeightNaming, check_weights, named_weights
from outlast.checkpointing.state.optimizer_state import devices_of_state, load_optimizer, regions_of_state
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.shards import Region, local_shard
from outlast.checkpointing.storage.base import Storage

Targets = dict[str, tuple[Region, torch.Tensor]]


def restore(
    storage: Storage,
    run: str,
    manifest: Manifest,
    ranks: RankGroup,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    naming: WeightNaming,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Loads the checkpoint if every rank finds it whole. Every rank calls it.

    Returns:
        Its loop state, on every rank; or None, and what was wrong, one line a file. Then the weights may be a mixture.

    Raises:
        ConfigError: The checkpoint is another model's, or has no optimizer state.
        StorageError: It could not be read, which proves nothing.
    """
    directory = layout.checkpoint_dir(run, manifest.ref)
    seen = ranks.everybody(lambda: _read_headers(storage, directory, manifest, ranks))
    if faults := _merged(lines for _, lines in seen):
        return None, faults
    indexes = [mine for mine, _ in seen]
    weights = merge(index for mine in indexes for path, index in mine.items() if not _is_state(path))
    moments = merge(index for mine in indexes for path, index in mine.items() if _is_state(path))
    found = {name: TensorSpec(parts[0].spec.dtype, parts[0].shape) for name, parts in weights.items()}
    check_weights(model, found, naming)
    if optimizer is not None and not any(_is_state(entry.path) for entry in manifest.files):
        raise ConfigError(
            f"{manifest.ref} was saved without an optimizer; going on with an empty one would be another run",
            hint="resume without an optimizer, or start a new run",
        )
    boxes = regions_of_state(model, {name: stored[0].shape for name, stored in moments.items()})
    targets = _regions_to_read(model, optimizer, naming, moments, boxes)
    index = {**weights, **moments}
    read = ranks.everybody(lambda: _read_state(storage, directory, manifest, index, targets, ranks))
    if faults := _merged(lines for _, lines in read):
        return None, faults
    if optimizer is not None:
        load_optimizer(model, optimizer, {name: targets[name][1] for name in moments}, sharded=boxes.keys())
    return read[0][0], []


def _regions_to_read(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    naming: WeightNaming,
    moments: Index,
    boxes: Mapping[str, Region],
) -> Targets:
    """What this rank needs, and where it goes: weights into the model's own, state into memory for the optimizer."""
    parts = {name: local_shard(tensor) for name, tensor in named_weights(model, naming).items()}
    targets = {name: (part.box, part.tensor) for name, part in parts.items()}
    devices = devices_of_state(model, optimizer, moments) if optimizer is not None else {}
    for name, stored in moments.items():
        box = boxes.get(name, Region.whole(stored[0].shape))
        targets[name] = (box, torch.empty(box.shape, dtype=stored[0].spec.dtype, device=devices.get(name)))
    return targets


def _read_headers(
    storage: Storage, directory: str, manifest: Manifest, ranks: RankGroup
) -> tuple[dict[str, Index], list[str]]:
    """This rank's share of the files' headers, by path. Rank 0 also looks at everything that holds no tensors."""
    faults = check_listing(storage, directory, manifest) if ranks.rank == 0 else []
    indexes: dict[str, Index] = {}
    try:
        for number, entry in enumerate(manifest.files if not faults else ()):
            if entry.path.endswith(".safetensors"):
                if number % ranks.size == ranks.rank:
                    indexes[entry.path] = read_index(storage, directory, entry)
            elif ranks.rank == 0:
                read_verified(storage, directory, entry)
    except DamagedError as error:
        faults.append(error.message)
    return indexes, faults


def _read_state(
    storage: Storage, directory: str, manifest: Manifest, index: Index, targets: Targets, ranks: RankGroup
) -> tuple[dict[str, Any], list[str]]:
    """Fills the targets; on rank 0 also reads the loop state. Returns that, and the faults."""
    faults = read_regions(storage, directory, manifest, index, targets)
    if ranks.rank or faults:
        return {}, faults
    entry = next(entry for entry in manifest.files if entry.path == layout.LOOP_STATE)
    try:
        return json.loads(read_verified(storage, directory, entry).numpy().tobytes()), []
    except DamagedError as error:
        return {}, [error.message]


def _merged(faults: Iterable[list[str]]) -> list[str]:
    """Every rank's faults, each once."""
    return sorted({line for lines in faults for line in lines})


def _is_state(path: str) -> bool:
    return path.startswith(f"{layout.STATE_DIR}/optimizer-")
