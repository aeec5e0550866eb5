"""Writes files into an attempt's own directories, each digested in the pass that writes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from outlast.checkpointing.faults import Point, reach
from outlast.checkpointing.manifest import Digester, FileEntry
from outlast.checkpointing.safetensors import encode
from outlast.checkpointing.storage import Buffer, Storage


def write_file(storage: Storage, directory: str, name: str, chunks: Iterable[Buffer]) -> FileEntry:
    """Writes `directory/name` durably and returns its manifest entry. Raises as `Storage.put`."""
    digester = Digester()
    storage.put(f"{directory}/{name}", digester.through(chunks))
    return digester.entry(name)


def write_tensors(
    storage: Storage, directory: str, name: str, tensors: Mapping[str, torch.Tensor], step: int
) -> FileEntry:
    """Writes a safetensors file. Raises as `Storage.put`, and TypeError for a dtype that the format does not know."""
    return write_file(storage, directory, name, _with_fault(encode(tensors), step))


def _with_fault(chunks: Iterator[memoryview], step: int) -> Iterator[memoryview]:
    yield next(chunks)
    reach(Point.WHILE_WRITING, step)
    yield from chunks
