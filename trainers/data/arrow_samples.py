"""Arrow files of samples: written once, in constant memory; read by index, memory-mapped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from outlast.checkpointing.errors import DamagedError

T = TypeVar("T")

#: Named vectors of int32 or float32, of any length. All samples of a file have the same names.
Sample = Mapping[str, npt.NDArray[Any]]

ROWS_PER_BATCH = 1024
PREPARE = "delete this directory of prepared data; the next start prepares it again"


class Samples:
    """Samples of an Arrow file, memory-mapped: only what is accessed is read. Raises DamagedError for another file."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._names = self._reader.schema.names
            fault, self._length = _fault(self._reader.schema), 0
            for number in range(0 if fault else self._reader.num_record_batches):
                batch = self._reader.get_batch(number)
                batch.validate(full=True)  # else offsets may lead out of its memory
                fault = fault or _batch_fault(batch, number, self._length)
                self._length += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            fault = str(error)
        if fault:
            raise DamagedError(f"{path}: not a file of samples: {fault}", hint=PREPARE)

    def __len__(self) -> int:
        return self._length

    def take(self, indices: Iterable[int] | npt.NDArray[np.int64]) -> list[Sample]:
        """Read the samples at these indices."""
        return [self._sample(int(index)) for index in indices]

    def lengths(self, indices: Iterable[int] | npt.NDArray[np.int64]) -> list[int] | None:
        """Return the number of `input_ids` of these samples; None when all samples have the same length."""
        column = self._names.index("input_ids")
        if pa.types.is_fixed_size_list(self._reader.schema.field(column).type):
            return None
        places = (divmod(int(index), ROWS_PER_BATCH) for index in indices)
        return [len(self._reader.get_batch(batch).column(column)[row]) for batch, row in places]

    def largest(self, names: Iterable[str]) -> int:
        """Return the largest number in the vectors of these names; -1 if there is none."""
        columns = [self._names.index(name) for name in names if name in self._names]
        batches = map(self._reader.get_batch, range(self._reader.num_record_batches))
        maxima = (pc.max(batch.column(column).flatten()).as_py() for batch in batches for column in columns)
        return max((int(item) for item in maxima if item is not None), default=-1)

    def _sample(self, index: int) -> Sample:
        batch, row = self._reader.get_batch(index // ROWS_PER_BATCH), index % ROWS_PER_BATCH
        return {name: batch.column(column)[row].values.to_numpy() for column, name in enumerate(self._names)}


def _fault(schema: pa.Schema) -> str:
    """Return why these cannot be the columns of samples; empty if they can."""
    if "input_ids" not in schema.names or len(set(schema.names)) != len(schema.names):
        return f"its columns are {schema.names}"
    for field in schema:
        is_list = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
        if not is_list or field.type.value_type not in (pa.int32(), pa.float32()):
            return f"column {field.name} is of type {field.type}"
    return ""


def _batch_fault(batch: pa.RecordBatch, number: int, num_before: int) -> str:
    if num_before != number * ROWS_PER_BATCH or batch.num_rows > ROWS_PER_BATCH:
        return f"its batch {number} begins at sample {num_before} and has {batch.num_rows}"
    if any(column.null_count or column.flatten().null_count for column in batch.columns):
        return f"its batch {number} has missing values"
    return ""


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """Counts of a file of samples."""

    num_samples: int
    num_tokens: int  #: encoded, dropped ones included
    longest: int  #: tokens of the longest sample, or of the longest choice
    num_dropped_tokens: int = 0  #: of the last, incomplete sample of a packed file


def write_packed(samples: Iterable[Sample], length: int, path: Path) -> DatasetStats:
    """Concatenate the `input_ids` of all samples and write samples of `length`; an incomplete last one is dropped."""
    column_type = pa.list_(pa.int32(), length)
    schema = pa.schema([("input_ids", column_type)])
    num_tokens = num_samples = 0
    rest = np.empty(0, dtype=np.int32)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def write(tokens: npt.NDArray[np.int32]) -> None:
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), type=column_type)
            writer.write_batch(pa.record_batch([column], schema=schema))

        full = ROWS_PER_BATCH * length
        for group in in_batches(samples, ROWS_PER_BATCH):
            pieces = [sample["input_ids"] for sample in group]
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
    """Write samples of any length, one list column for each name. Without samples the file is empty."""
    num_tokens = num_samples = longest = 0
    writer: Any = None
    with pa.OSFile(str(path), "wb") as sink:
        for group in in_batches(samples, ROWS_PER_BATCH):
            columns = {name: _list_array([sample[name] for sample in group]) for name in group[0]}
            table = pa.record_batch(list(columns.values()), names=list(columns))
            writer = writer or pa.ipc.new_file(sink, table.schema)
            writer.write_batch(table)
            num_samples += len(group)
            num_tokens += sum(sample["input_ids"].size for sample in group)
            sizes = (int(each["lengths"].max()) if "lengths" in each else each["input_ids"].size for each in group)
            longest = max(longest, *sizes)
        if writer is not None:
            writer.close()
    return DatasetStats(num_samples, num_tokens, longest)


def _list_array(vectors: Sequence[npt.NDArray[Any]]) -> Any:
    offsets = np.zeros(len(vectors) + 1, dtype=np.int32)
    np.cumsum([vector.size for vector in vectors], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(vectors)))


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Group items into lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
