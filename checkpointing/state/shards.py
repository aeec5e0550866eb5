"""The part of a tensor that a rank holds, as a region in global coordinates.

A tensor is complete on every rank (DDP, a single process), or it is a DTensor (FSDP2, tensor parallelism) and each rank
holds a region of it. Regions are global offsets and extents in elements, so any number of ranks can read them back.
Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.torch_internals import compute_local_shape_and_global_offset

#: An index or range per dimension; an index removes the dimension. Empty: the full tensor.
Cut = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangular part of a tensor: offset and extent in elements, by dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        return cls((0,) * len(shape), shape)

    def intersection(self, other: Region) -> Region | None:
        """Return the region that both cover; None if it is empty."""
        begins = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return None
        return Region(tuple(begins), tuple(end - begin for begin, end in zip(begins, ends, strict=True)))

    def of(self, tensor: torch.Tensor, within: Region) -> torch.Tensor:
        """Return the view of this region in a tensor that holds the region `within`."""
        for dim, (begin, length, base) in enumerate(zip(self.offset, self.shape, within.offset, strict=True)):
            tensor = tensor.narrow(dim, begin - base, length)
        return tensor


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A rank's part of one tensor."""

    tensor: torch.Tensor  #: the elements, a plain tensor of shape `region.shape`
    region: Region  #: which elements they are
    shape: tuple[int, ...]  #: shape of the complete tensor
    is_sharded: bool = False  #: whether the tensor is distributed over ranks; otherwise every rank holds all of it
    is_copy: bool = False  #: whether a lower rank holds the same region

    def cut(self, cut: Cut) -> LocalShard:
        """Return what this rank holds of a slice of the tensor, in coordinates of that slice; possibly nothing."""
        if not cut:
            return self
        ranges = [
            range(at, at + 1) if isinstance(at, int) else range(*at.indices(length))
            for at, length in zip(cut, self.shape, strict=True)
        ]
        kept = [dim for dim, at in enumerate(cut) if not isinstance(at, int)]
        shape = tuple(len(ranges[dim]) for dim in kept)
        held = self.region.intersection(Region(tuple(at.start for at in ranges), tuple(len(at) for at in ranges)))
        if held is None:
            region = Region((0,) * len(shape), (0, *shape[1:]) if shape else ())
            empty = self.tensor.new_empty(region.shape)  # a scalar is never empty: another rank holds this one
            return replace(self, tensor=empty, region=region, shape=shape, is_copy=self.is_copy or not shape)
        view = held.of(self.tensor, within=self.region)[tuple(0 if isinstance(at, int) else slice(None) for at in cut)]
        offset = tuple(held.offset[dim] - ranges[dim].start for dim in kept)
        return replace(self, tensor=view, region=Region(offset, tuple(view.shape)), shape=shape)


def local_shard(tensor: torch.Tensor) -> LocalShard:
    """Return this rank's part of a tensor; shares its memory. Raises ConfigError for unsupported placements."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor, Region.whole(shape), shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    unsupported = [item for item in placements if not (item.is_replicate() or type(item) is Shard)]
    if unsupported:
        raise ConfigError(
            f"cannot save a DTensor with placement {unsupported[0]}: only Shard and Replicate are supported",
            hint="redistribute it to Shard or Replicate placements before saving",
        )
    extent, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    is_copy = coordinate is None or any(
        item.is_replicate() and at for item, at in zip(placements, coordinate, strict=True)
    )
    if not all(extent):  # torch gives an empty part any offset
        offset = (0,) * len(shape)
    return LocalShard(tensor.to_local(), Region(tuple(offset), tuple(extent)), shape, is_sharded=True, is_copy=is_copy)


def like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return `local` with the placement of `tensor`: a DTensor if that is one."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def cover_fault(shape: tuple[int, ...], regions: Iterable[Region]) -> str | None:
    """Return why regions are not exactly a tensor of `shape`: one lies outside, two overlap, or elements are missing.

    None if every element is in one region. Sharded by one dimension, this takes n log n time.
    """
    regions = list(regions)
    for region in regions:
        if not len(region.offset) == len(region.shape) == len(shape):
            return f"a part of shape {list(region.shape)} is not of {len(shape)} dimensions"
    filled = [region for region in regions if all(region.shape)]
    whole = Region.whole(shape)
    for region in filled:
        if region.intersection(whole) != region:
            return f"a part of shape {list(region.shape)} at {list(region.offset)} is not within {list(shape)}"
    # Sweeps along the dimension with the most cuts: compared are only those that share rows of it.
    dim = max(range(len(shape)), key=lambda dim: len({region.offset[dim] for region in filled}), default=None)
    reaching: list[Region] = []
    for region in sorted(filled, key=lambda region: 0 if dim is None else region.offset[dim]):
        if dim is not None:
            reaching = [other for other in reaching if other.offset[dim] + other.shape[dim] > region.offset[dim]]
        for other in reaching:
            if region.intersection(other):
                return f"its parts at {list(other.offset)} and {list(region.offset)} overlap"
        reaching.append(region)
    missing = prod(shape) - sum(prod(region.shape) for region in filled)
    return f"{missing} of its {prod(shape)} elements are in no part" if missing else None


def to_json(parts: Mapping[str, LocalShard]) -> dict[str, Any]:
    """Return shapes and offsets of the sharded parts, for a file's header."""
    return {name: [part.shape, part.region.offset] for name, part in parts.items() if part.is_sharded}
