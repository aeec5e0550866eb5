"""Comparison of two checkpoints: which tensors and which settings differ, and by how much.

Reads verified bytes only; never writes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch

from outlast.checkpointing.restore.reader import read_tensors
from outlast.checkpointing.tools.query import ResolvedCheckpoint, damage_or_deletion

_CHUNK = 1 << 22  # elements compared at a time: float64 copies of a whole embedding would not fit


class ChangeKind(Enum):
    """How a tensor of the second checkpoint differs from that of the first."""

    EQUAL = "equal"  #: bitwise, NaN included
    CHANGED = "changed"  #: other values, another shape or another dtype
    ADDED = "added"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor in both checkpoints. Pairs are (first, second); None where a checkpoint lacks the tensor."""

    name: str  #: its name
    change: ChangeKind  #: how it differs
    dtypes: tuple[str | None, str | None]  #: such as `float32`
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]  #: lengths of the dimensions
    norms: tuple[float | None, float | None]  #: euclidean norms
    distance: float | None  #: euclidean norm of the difference; None unless the shapes are equal
    largest: float | None  #: largest absolute difference of one element; None unless the shapes are equal

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; NaN and infinite numbers as text."""
        numbers = {"distance": _number(self.distance), "largest": _number(self.largest)}
        return asdict(self) | numbers | {"change": self.change.value, "norms": tuple(map(_number, self.norms))}


def _number(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class CheckpointDiff:
    """All tensors by name, and the settings that differ: dotted name to (first, second).

    `settings` is None if either checkpoint lacks its settings.
    """

    tensors: tuple[TensorChange, ...]
    settings: Mapping[str, tuple[Any, Any]] | None

    def count(self, change: ChangeKind) -> int:
        return sum(item.change is change for item in self.tensors)


def diff_checkpoints(
    first: ResolvedCheckpoint, second: ResolvedCheckpoint, *, optimizer: bool = False
) -> CheckpointDiff:
    """Compare weights, settings and, with `optimizer`, optimizer state. Both checkpoints are held in memory.

    Raises as `damage_or_deletion`, and StorageError.
    """
    ours, theirs = _tensors(first, optimizer), _tensors(second, optimizer)
    names = sorted(ours.keys() | theirs.keys())
    return CheckpointDiff(
        tuple(compare_tensors(name, ours.get(name), theirs.get(name)) for name in names), _settings(first, second)
    )


def _tensors(source: ResolvedCheckpoint, optimizer: bool) -> dict[str, torch.Tensor]:
    with damage_or_deletion(source):
        return read_tensors(source.store.storage, source.directory, source.manifest, weights_only=not optimizer)


def compare_tensors(name: str, first: torch.Tensor | None, second: torch.Tensor | None) -> TensorChange:
    """Compare two tensors of the same name; one of them may be None."""
    distance = largest = None
    if first is None or second is None:
        change = ChangeKind.ADDED if first is None else ChangeKind.REMOVED
    else:
        change = ChangeKind.EQUAL if _same_bits(first, second) else ChangeKind.CHANGED
        if first.shape == second.shape:
            distance, largest = _difference(first, second)
    return TensorChange(
        name,
        change,
        (_dtype(first), _dtype(second)),
        (None if first is None else tuple(first.shape), None if second is None else tuple(second.shape)),
        (_norm(first), _norm(second)),
        distance,
        largest,
    )


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _difference(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    squares, largest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(_chunks(first), _chunks(second), strict=True):
        distances = (theirs - ours).abs()
        squares += distances.square().sum()
        largest = torch.maximum(largest, distances.max())
    return float(squares.sqrt()), float(largest)


def _norm(tensor: torch.Tensor | None) -> float | None:
    if tensor is None:
        return None
    return math.sqrt(sum(chunk.square().sum().item() for chunk in _chunks(tensor)))


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK].double()


def _dtype(tensor: torch.Tensor | None) -> str | None:
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _settings(first: ResolvedCheckpoint, second: ResolvedCheckpoint) -> dict[str, tuple[Any, Any]] | None:
    if first.declaration is None or second.declaration is None:
        return None
    ours, theirs = dict(_flat(first.declaration)), dict(_flat(second.declaration))
    pairs = {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
