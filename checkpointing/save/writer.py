"""Writer of a rank's files of a checkpoint, each digested while it is written.

Rank 0 writes the Hugging Face part: weights by their plain names, unsharded. Weights that are distributed over ranks
are sent to it one tensor at a time while the file is written, so rank 0 never holds more than about two of the largest.
Optimizer state is written where it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.manifest import Digester, FileEntry
from outlast.checkpointing.format.safetensors import DTYPES, TensorSpec, encode, order, stream
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.shards import LocalShard, Region, cover_fault, to_json
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.base import Buffer, Storage


def write_file(storage: Storage, directory: str, name: str, chunks: Iterable[Buffer]) -> FileEntry:
    """Write `directory/name` durably and return its manifest entry. Raises as `Storage.put`."""
    digester = Digester()
    storage.put(f"{directory}/{name}", digester.through(chunks))
    return digester.entry(name)


@dataclass(frozen=True, slots=True)
class RankPayload:
    """The data that one rank adds to one checkpoint."""

    step: int  #: the step
    #: Type and full shape of every weight, in the model's order; the same on every rank
    specs: Mapping[str, TensorSpec]
    weights: Mapping[str, LocalShard]  #: this rank's parts of sharded weights, and on rank 0 all others
    moments: Mapping[str, LocalShard] | None  #: optimizer state that this rank writes; None without an optimizer
    small: Mapping[str, bytes]  #: small files by name (rank 0)
    file: str  #: name of the weights file
    max_shard_bytes: int  #: weights beyond this size continue in another file
    optimizer: str | None = None  #: description of the optimizer, if there is one
    moments_digest: str = ""  #: of the names of all optimizer state; empty on a single rank

    @classmethod
    def of(
        cls, step: int, state: TrainState, ranks: RankGroup, small: Mapping[str, bytes], max_shard_bytes: int
    ) -> RankPayload:
        """Build this rank's payload from the model's own tensors. Raises ConfigError for state that cannot be saved."""
        optimizer = state.describe_optimizer()
        weights, moments = state.weights_to_write(ranks.rank), state.moments_to_write(ranks.rank, ranks.size)
        for name, part in {**weights, **(moments or {})}.items():
            if part.tensor.dtype not in DTYPES.values():
                raise ConfigError(
                    f"{name} is of {part.tensor.dtype}, which a checkpoint cannot hold",
                    hint="save it as another type, such as torch.view_as_real of a complex tensor",
                )
        if names := weights.keys() & (moments or {}).keys():
            raise ConfigError(f"{min(names)} is the name of a weight and of optimizer state")
        digest = state.moments_digest() if ranks.size > 1 else ""
        return cls(step, state.specs, weights, moments, small, state.naming.file, max_shard_bytes, optimizer, digest)

    @property
    def parts(self) -> dict[str, LocalShard]:
        """All tensors of a snapshot. Names of weights and state do not collide."""
        return {**self.weights, **(self.moments or {})}

    def on_host(self, parts: Mapping[str, LocalShard]) -> RankPayload:
        moments = None if self.moments is None else {name: parts[name] for name in self.moments}
        weights = {name: parts[name] for name in self.weights}
        return replace(self, weights=weights, moments=moments)


def write_payload(storage: Storage, directory: str, ranks: RankGroup, payload: RankPayload) -> list[FileEntry]:
    """Write this rank's files. Every rank calls it; weights are sent over the group of `ranks`.

    Raises StorageError, and ConfigError if the ranks do not hold one state.
    """
    _check_moments(ranks, payload)
    with ThreadPoolExecutor(2) as pool:  # weights and state at the same time
        state = pool.submit(_write_state, storage, directory, ranks, payload)
        entries = _write_weights(storage, directory, ranks, payload)
        entries += [write_file(storage, directory, name, [data]) for name, data in payload.small.items()]
        return entries + state.result()


def _check_moments(ranks: RankGroup, payload: RankPayload) -> None:
    """Raise ConfigError on every rank unless the ranks' optimizer states are together exactly one."""
    if ranks.size == 1:
        return
    sharded = {name: part for name, part in (payload.moments or {}).items() if part.is_sharded}
    own = {name: (part.shape, part.region) for name, part in sharded.items()}
    gathered = ranks.gather((payload.moments_digest, own))
    differing = [rank for rank, (digest, _) in enumerate(gathered) if digest != gathered[0][0]]
    if differing:
        raise ConfigError(
            f"rank {differing[0]} has other optimizer state than rank 0, so the checkpoint would lack a part of it",
            hint="make the same optimizer steps on every rank",
        )
    parts: dict[str, list[Region]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for _, held in gathered:
        for name, (shape, region) in held.items():
            shapes[name] = shape
            parts.setdefault(name, []).append(region)
    for name, regions in parts.items():
        check_cover(name, shapes[name], regions)


def _write_state(storage: Storage, directory: str, ranks: RankGroup, payload: RankPayload) -> list[FileEntry]:
    if payload.moments is None:
        return []
    name = layout.optimizer_shard(ranks.rank, ranks.size)
    tensors = {key: part.tensor for key, part in payload.moments.items()}
    metadata = {"shards": json.dumps(to_json(payload.moments))}
    if ranks.rank == 0 and payload.optimizer is not None:
        metadata["optimizer"] = payload.optimizer
    chunks = encode(tensors, metadata)
    return [write_file(storage, directory, name, _with_fault(chunks, payload.step))]


def _write_weights(storage: Storage, directory: str, ranks: RankGroup, payload: RankPayload) -> list[FileEntry]:
    """Write the weights on rank 0; the others send theirs, in the order of the files."""
    files = weight_files(payload.specs, payload.max_shard_bytes, payload.file)
    names_in_order = [name for names in files.values() for name in order(_pick(payload.specs, names))]
    gather = WeightGather(ranks, payload.weights, names_in_order)
    if ranks.rank:
        gather.send()
        return []
    entries = []
    with gather:
        for file, names in files.items():
            chunks = stream(_pick(payload.specs, names), gather.fetch)
            entries.append(write_file(storage, directory, file, _with_fault(chunks, payload.step)))
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(spec.num_bytes for spec in payload.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
        entries.append(write_file(storage, directory, f"{payload.file}.index.json", [text]))
    return entries


def _pick(specs: Mapping[str, TensorSpec], names: Sequence[str]) -> dict[str, TensorSpec]:
    return {name: specs[name] for name in names}


def weight_files(specs: Mapping[str, TensorSpec], max_bytes: int, file: str = layout.WEIGHTS) -> dict[str, list[str]]:
    """Distribute weights over files, named as in transformers: `file`, or `model-00001-of-00003.safetensors`.

    A file has up to `max_bytes` of tensors; a larger tensor has a file of its own.
    """
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in specs.items():
        if groups[-1] and num_bytes + spec.num_bytes > max_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += spec.num_bytes
    if len(groups) == 1:
        return {file: groups[0]}
    return {layout.weights_shard(file, number, len(groups)): names for number, names in enumerate(groups)}


def check_cover(name: str, shape: tuple[int, ...], regions: Iterable[Region]) -> None:
    """Raise ConfigError unless the ranks' parts of a tensor are together exactly that tensor."""
    if fault := cover_fault(shape, regions):
        raise ConfigError(
            f"the ranks do not hold {name} once and completely: {fault}",
            hint="every rank must pass the same model and optimizer, sharded over all ranks",
        )


class WeightGather:
    """Gathers sharded weights on rank 0, one at a time. As a context on rank 0 it leaves no rank waiting.

    Every rank builds one, with its parts and with all names in the order in which rank 0 fetches them. Raises
    ConfigError on every rank if the parts of a weight are not exactly that weight.
    """

    def __init__(self, ranks: RankGroup, parts: Mapping[str, LocalShard], names: Sequence[str]) -> None:
        self._ranks, self._parts = ranks, parts
        self._sharded = [name for name in names if name in parts and parts[name].is_sharded]
        own = {name: parts[name].region for name in self._sharded if not parts[name].is_copy}
        self._regions = ranks.gather(own) if self._sharded else []
        for name in self._sharded:
            held = (regions[name] for regions in self._regions if name in regions)
            check_cover(name, parts[name].shape, held)

    def send(self) -> None:
        """Send every part in order (ranks other than 0)."""
        for name in self._sharded:
            tensor = self._parts[name].tensor
            if not self._parts[name].is_copy and tensor.numel():
                dist.send(_as_bytes(tensor), group=self._ranks.group, group_dst=0)

    def fetch(self, name: str) -> torch.Tensor:
        """Return the complete weight (rank 0), valid until the next call."""
        part = self._parts[name]
        if not part.is_sharded:
            return part.tensor
        if (expected := self._sharded.pop(0)) != name:  # its bytes come next, and would pass as this one's
            raise ValueError(f"{name} was fetched before {expected}")
        weight = torch.empty(part.shape, dtype=part.tensor.dtype)
        for rank, regions in enumerate(self._regions):
            region = regions.get(name)
            if region is None or not all(region.shape):
                continue
            piece = part.tensor if rank == 0 else torch.empty(region.shape, dtype=weight.dtype)
            if rank:
                dist.recv(_as_bytes(piece), group=self._ranks.group, group_src=rank)
            region.of(weight, Region.whole(part.shape)).copy_(piece)
        return weight

    def __enter__(self) -> WeightGather:
        return self

    def __exit__(self, *_: object) -> None:
        """Receive what the others still have to send after a failure, so that none of them waits forever."""
        with suppress(RuntimeError):  # a rank is lost; the first failure is reported
            for name in list(self._sharded):
                self.fetch(name)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def _with_fault(chunks: Iterator[memoryview], step: int) -> Iterator[memoryview]:
    yield next(chunks)
    fault_point(FaultPoint.WHILE_WRITING, step)
    yield from chunks
