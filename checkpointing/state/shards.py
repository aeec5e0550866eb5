"""Which part of a tensor this rank holds.

A tensor is whole on every rank (DDP, a single process), or it is a DTensor (FSDP2, tensor parallelism) and each rank
holds a box of it. Boxes are named by global offsets and extents in elements, so that any number of ranks can read them
back. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from outlast.checkpointing.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor.

    Attributes:
        offset: Where it begins, in elements, by dimension.
        shape: Its extent, in elements, by dimension.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        return cls((0,) * len(shape), shape)

    def intersection(self, other: Region) -> Region | None:
        """What both cover; None when that is nothing."""
        begins = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return None
        return Region(tuple(begins), tuple(end - begin for begin, end in zip(begins, ends, strict=True)))

    def of(self, tensor: torch.Tensor, within: Region) -> torch.Tensor:
        """The view of this box in a tensor that holds `within`."""
        for dim, (begin, length, base) in enumerate(zip(self.offset, self.shape, within.offset, strict=True)):
            tensor = tensor.narrow(dim, begin - base, length)
        return tensor


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A rank's part of one tensor.

    Attributes:
        tensor: The elements, a plain tensor of shape `box.shape`.
        box: Which elements they are.
        shape: Shape of the tensor of which this is a part.
        is_sharded: Whether the tensor is spread over ranks. If not, every rank holds all of it.
        is_copy: Whether a lower rank holds the same box.
    """

    tensor: torch.Tensor
    box: Region
    shape: tuple[int, ...]
    is_sharded: bool = False
    is_copy: bool = False

    def with_tensor(self, tensor: torch.Tensor) -> LocalShard:
        return replace(self, tensor=tensor)


def local_shard(tensor: torch.Tensor) -> LocalShard:
    """This rank's part of a tensor; shares its memory.

    Raises:
        ConfigError: It is placed in a way that has no boxes.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor, Region.whole(shape), shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    strange = [item for item in placements if not (item.is_replicate() or type(item) is Shard)]
    if strange:
        raise ConfigError(
            f"cannot save a DTensor placed as {strange[0]}: only Shard and Replicate are known",
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
    """`local` placed as `tensor` is: a DTensor if that is one."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def to_json(parts: Mapping[str, LocalShard]) -> dict[str, Any]:
    """Shapes and offsets of the sharded ones among `parts`, for a file's header."""
    return {name: [part.shape, part.box.offset] for name, part in parts.items() if part.is_sharded}
