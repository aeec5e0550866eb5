"""Writes a rank's share of a checkpoint, each file digested in the pass that writes it.

The share of rank 0 has the Hugging Face part: weights by their plain names, whole. Weights that are spread over ranks
come to it one tensor at a time, while the file is being written, so that rank 0 never holds more than about two of the
largest. Optimizer state stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist

from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.manifest import Digester, FileEntry
from outlast.checkpointing.format.safetensors import TensorSpec, encode, order, stream
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.shards import LocalShard, Region, to_json
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.base import Buffer, Storage


def write_file(storage: Storage, directory: str, name: str, chunks: Iterable[Buffer]) -> FileEntry:
    """Writes `directory/name` durably and returns its manifest entry. Raises as `Storage.put`."""
    digester = Digester()
    storage.put(f"{directory}/{name}", digester.through(chunks))
    return digester.entry(name)


@dataclass(frozen=True, slots=True)
class RankPayload:
    """What one rank adds to one checkpoint.

    Attributes:
        step: The step.
        specs: Type and whole shape of every weight, in the model's order; the same on every rank.
        weights: This rank's parts of the weights: of sharded ones its own, of the others all on rank 0, none elsewhere.
        moments: Optimizer state that this rank writes; None without an optimizer.
        small: Small files by name (rank 0).
        file: Name of the file of the weights.
        max_shard_bytes: Weights beyond so many bytes go on in another file.
    """

    step: int
    specs: Mapping[str, TensorSpec]
    weights: Mapping[str, LocalShard]
    moments: Mapping[str, LocalShard] | None
    small: Mapping[str, bytes]
    file: str
    max_shard_bytes: int

    @classmethod
    def of(
        cls, step: int, state: TrainState, ranks: RankGroup, small: Mapping[str, bytes], max_shard_bytes: int
    ) -> RankPayload:
        """This rank's payload, made of the model's own tensors. Raises ConfigError for state that cannot be saved."""
        weights, moments = state.weights_to_write(ranks.rank), state.moments_to_write(ranks.rank, ranks.size)
        return cls(step, state.specs, weights, moments, small, state.naming.file, max_shard_bytes)

    @property
    def parts(self) -> dict[str, LocalShard]:
        """Everything that is copied for a snapshot. The names of weights and state do not collide: these have a `/`."""
        return {**self.weights, **(self.moments or {})}

    def on_host(self, parts: Mapping[str, LocalShard]) -> RankPayload:
        """The same share, made of the snapshot's copies."""
        moments = None if self.moments is None else {name: parts[name] for name in self.moments}
        weights = {name: parts[name] for name in self.weights}
        return replace(self, weights=weights, moments=moments)


def write_payload(storage: Storage, directory: str, ranks: RankGroup, share: RankPayload) -> list[FileEntry]:
    """Writes this rank's files. Every rank calls it; the weights pass over the ranks' own group.

    Raises:
        StorageError: A write failed.
        TypeError: A dtype that safetensors does not know.
    """
    with ThreadPoolExecutor(2) as pool:  # weights and state at the same time
        state = pool.submit(_write_state, storage, directory, ranks, share)
        entries = _write_weights(storage, directory, ranks, share)
        entries += [write_file(storage, directory, name, [data]) for name, data in share.small.items()]
        return entries + state.result()


def _write_state(storage: Storage, directory: str, ranks: RankGroup, share: RankPayload) -> list[FileEntry]:
    if share.moments is None:
        return []
    name = layout.optimizer_shard(ranks.rank, ranks.size)
    tensors = {key: part.tensor for key, part in share.moments.items()}
    chunks = encode(tensors, {"shards": json.dumps(to_json(share.moments))})
    return [write_file(storage, directory, name, _with_fault(chunks, share.step))]


def _write_weights(storage: Storage, directory: str, ranks: RankGroup, share: RankPayload) -> list[FileEntry]:
    """Rank 0 writes the weights; the others send theirs, in the order in which it asks."""
    files = weight_files(share.specs, share.max_shard_bytes, share.file)
    gather = WeightGather(
        ranks, share.weights, [name for names in files.values() for name in order(_pick(share.specs, names))]
    )
    if ranks.rank:
        gather.send()
        return []
    entries = []
    with gather:
        for file, names in files.items():
            chunks = stream(_pick(share.specs, names), gather.fetch)
            entries.append(write_file(storage, directory, file, _with_fault(chunks, share.step)))
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(spec.num_bytes for spec in share.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
        entries.append(write_file(storage, directory, f"{share.file}.index.json", [text]))
    return entries


def _pick(specs: Mapping[str, TensorSpec], names: Sequence[str]) -> dict[str, TensorSpec]:
    return {name: specs[name] for name in names}


def weight_files(specs: Mapping[str, TensorSpec], max_bytes: int, file: str = layout.WEIGHTS) -> dict[str, list[str]]:
    """Which weights go into which file, as transformers names them: one file, or `model-00001-of-00003.safetensors`.

    Args:
        specs: The weights in the model's order.
        max_bytes: Tensor bytes of a file; a tensor that is larger has a file of its own.
        file: Name of the one file.
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


class WeightGather:
    """Brings sharded weights to rank 0, one at a time. As a context on rank 0 it leaves no rank waiting.

    Args:
        ranks: The ranks; everybody builds one at the same time.
        parts: This rank's parts.
        names: Every weight, in the order in which rank 0 will fetch them.
    """

    def __init__(self, ranks: RankGroup, parts: Mapping[str, LocalShard], names: Sequence[str]) -> None:
        self._ranks, self._parts = ranks, parts
        self._sharded = [name for name in names if name in parts and parts[name].is_sharded]
        mine = {name: parts[name].box for name in self._sharded if not parts[name].is_copy}
        self._boxes = ranks.gather(mine) if mine or self._sharded else []

    def send(self) -> None:
        """Ranks but 0: sends every part, one after the other, as rank 0 takes them."""
        for name in self._sharded:
            tensor = self._parts[name].tensor
            if not self._parts[name].is_copy and tensor.numel():
                dist.send(_as_bytes(tensor), group=self._ranks.group, group_dst=0)

    def fetch(self, name: str) -> torch.Tensor:
        """Rank 0: the whole weight. Its memory is the caller's to keep until the next call."""
        part = self._parts[name]
        if not part.is_sharded:
            return part.tensor
        assert self._sharded.pop(0) == name, "out of order"
        whole, missing = torch.empty(part.shape, dtype=part.tensor.dtype), prod(part.shape)
        for rank, boxes in enumerate(self._boxes):
            box = boxes.get(name)
            if box is None or not all(box.shape):
                continue
            piece = part.tensor if rank == 0 else torch.empty(box.shape, dtype=whole.dtype)
            if rank:
                dist.recv(_as_bytes(piece), group=self._ranks.group, group_src=rank)
            box.of(whole, Region.whole(part.shape)).copy_(piece)
            missing -= prod(box.shape)
        assert not missing, f"no rank holds {missing} elements of {name}"
        return whole

    def __enter__(self) -> WeightGather:
        return self

    def __exit__(self, *_: object) -> None:
        """After a failure takes what the others still have to send, so that none of them waits for ever."""
        with suppress(RuntimeError):  # one of them has gone; the first failure is the one to report
            for name in list(self._sharded):
                self.fetch(name)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def _with_fault(chunks: Iterator[memoryview], step: int) -> Iterator[memoryview]:
    yield next(chunks)
    fault_point(FaultPoint.WHILE_WRITING, step)
    yield from chunks
