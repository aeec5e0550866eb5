"""The description of a snapshot: one rank's part of the state after a step, which lies in one data file.

It is the commit of the snapshot: written once the data is complete, removed before the data is overwritten. It has the
data's digest and one of itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
import xxhash

from outlast.checkpointing.errors import DamagedError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.format.safetensors import DTYPES, bytes_view
from outlast.checkpointing.state.shards import LocalShard, Region

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A rank's part of one tensor, and where it lies in the data."""

    dtype: str  #: as in safetensors
    shape: tuple[int, ...]  #: shape of the complete tensor
    offset: tuple[int, ...]  #: of this part in it
    extent: tuple[int, ...]  #: shape of this part
    position: int  #: of its first byte

    @classmethod
    def of(cls, part: LocalShard, position: int) -> StoredShard:
        return cls(_NAMES[part.tensor.dtype], part.shape, part.region.offset, part.region.shape, position)

    @classmethod
    def parse(cls, body: list[Any]) -> StoredShard:
        dtype, shape, offset, extent, position = body
        return cls(dtype, tuple(shape), tuple(offset), tuple(extent), position)

    @property
    def region(self) -> Region:
        return Region(self.offset, self.extent)

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """Return the part as a view of the data."""
        dtype = DTYPES[self.dtype]
        flat = data[self.position : self.position + prod(self.extent) * dtype.itemsize]
        return flat.view(dtype).view(self.extent)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's part of the state after a step."""

    attempt: AttemptId  #: the attempt that took it
    step: int  #: steps done
    rank: int  #: whose part it is
    world_size: int
    holder: int  #: the rank on whose node it lies
    declaration: str  #: digest of what determines the run's numbers
    data: str  #: name of the data file
    num_bytes: int
    weights: Mapping[str, StoredShard]
    moments: Mapping[str, StoredShard]
    optimizer: str  #: its description
    state: str = ""  #: the encoded loop state (rank 0)
    xxh3_128: str = ""  #: of the data

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.attempt}.{self.step}.{self.rank}-of-{self.world_size}.{self.holder}.json"

    def to_json(self) -> bytes:
        body = asdict(self) | {"attempt": str(self.attempt)}
        for kind in ("weights", "moments"):
            body[kind] = {name: list(item.values()) for name, item in body[kind].items()}
        text = json.dumps(body, separators=(",", ":"))
        return f"{xxhash.xxh3_128_hexdigest(text.encode())}{text}".encode()

    @classmethod
    def parse(cls, text: bytes) -> Snapshot:
        """Parse `to_json`. Raises DamagedError."""
        digest, body = text[:32], text[32:]
        if xxhash.xxh3_128_hexdigest(body).encode() != digest:
            raise DamagedError("the description of a snapshot is damaged")
        values = json.loads(body)
        attempt = AttemptId.parse(values["attempt"])
        if attempt is None:
            raise DamagedError("the description of a snapshot is damaged")
        shards = {
            kind: {name: StoredShard.parse(item) for name, item in values[kind].items()}
            for kind in ("weights", "moments")
        }
        return cls(**{**values, **shards, "attempt": attempt})

    def held_by(self, rank: int, data: str) -> Snapshot:
        """Return the description of a copy."""
        return replace(self, holder=rank, data=data)

    def check(self, data: torch.Tensor) -> None:
        """Raise DamagedError if these bytes are not the snapshot's."""
        if data_digest(data[: self.num_bytes]) != self.xxh3_128:
            raise DamagedError(f"the snapshot of rank {self.rank} after step {self.step} is damaged")


def data_digest(data: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(bytes_view(data))
