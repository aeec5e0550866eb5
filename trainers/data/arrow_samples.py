"""Samples in an Arrow file: written once, in constant memory; read by number, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

T = TypeVar("T")

#: Named vectors of int32 or float32, each as long as it likes. The samples of a file all have the same names.
Sample = Mapping[str, npt.NDArray[Any]]

ROWS_PER_BATCH = 1024


class Samples:
    """The samples of an Arrow file, memory-mapped: opening costs nothing, reading costs what is read."""

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._names = self._reader.schema.names
        last = self._reader.num_record_batches - 1
        self._length = 0 if last < 0 else last * ROWS_PER_BATCH + self._reader.get_batch(last).num_rows

    def __len__(self) -> int:
        return self._length

    def take(self, numbers: Iterable[int] | npt.NDArray[np.int64]) -> list[Sample]:
        """The samples with these numbers."""
        return [self._sample(int(number)) for number in numbers]

    def lengths(self, numbers: Iterable[int] | npt.NDArray[np.int64]) -> list[int] | None:
        """How many `input_ids` these samples have; None when all samples have equally many."""
        at = self._names.index("input_ids")
        if pa.types.is_fixed_size_list(self._reader.schema.field(at).type):
            return None
        where = (divmod(int(number), ROWS_PER_BATCH) for number in numbers)
        return [len(self._reader.get_batch(batch).column(at)[place]) for batch, place in where]

    def _sample(self, number: int) -> Sample:
        batch, place = self._reader.get_batch(number // ROWS_PER_BATCH), number % ROWS_PER_BATCH
        return {name: batch.column(at)[place].values.to_numpy() for at, name in enumerate(self._names)}


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What a file of samples holds.

    Attributes:
        num_samples: Samples in it.
        num_tokens: Tokens that were made, also those that were dropped.
        longest: Tokens of its longest sample, or choice of one.
        num_dropped_tokens: Tokens of the last, short piece of a packed file.
    """

    num_samples: int
    num_tokens: int
    longest: int
    num_dropped_tokens: int = 0


def write_packed(samples: Iterable[Sample], length: int, path: Path) -> DatasetStats:
    """Joins the `input_ids` of all samples and writes them in pieces of `length`; the last one goes if it is short."""
    kind = pa.list_(pa.int32(), length)
    schema = pa.schema([("input_ids", kind)])
    num_tokens = num_samples = 0
    rest = np.empty(0, dtype=np.int32)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def write(tokens: npt.NDArray[np.int32]) -> None:
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), type=kind)
            writer.write_batch(pa.record_batch([column], schema=schema))

        full = ROWS_PER_BATCH * length
        for part in in_batches(samples, ROWS_PER_BATCH):
            pieces = [sample["input_ids"] for sample in part]
            num_tokens += sum(piece.size for piece in pieces)
            rest = np.concatenate([rest, *pieces])
            while rest.size >= full:
                write(rest[:full])
                rest, num_samples = rest[full:], num_samples + ROWS_PER_BATCH
        last = rest.size // length
        if last:
            write(rest[: last * length])
    return DatasetStats(num_samples + last, num_tokens, length, rest.size - last * length)


def write_samples(samples: Iterable[Sample], path: Path) -> DatasetStats:
    """Writes every sample as it is: a list column for each name. An empty file for none."""
    num_tokens = num_samples = longest = 0
    writer: Any = None
    with pa.OSFile(str(path), "wb") as sink:
        for part in in_batches(samples, ROWS_PER_BATCH):
            columns = {name: _list_array([sample[name] for sample in part]) for name in part[0]}
            table = pa.record_batch(list(columns.values()), names=list(columns))
            writer = writer or pa.ipc.new_file(sink, table.schema)
            writer.write_batch(table)
            num_samples += len(part)
            num_tokens += sum(sample["input_ids"].size for sample in part)
            longest = max(
                longest,
                *(int(sample["lengths"].max()) if "lengths" in sample else sample["input_ids"].size for sample in part),
            )
        if writer is not None:
            writer.close()
    return DatasetStats(num_samples, num_tokens, longest)


def _list_array(vectors: Sequence[npt.NDArray[Any]]) -> Any:
    offsets = np.zeros(len(vectors) + 1, dtype=np.int32)
    np.cumsum([vector.size for vector in vectors], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(vectors)))


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one perhaps shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
