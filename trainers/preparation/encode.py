"""Encoding of a split's rows to samples, in this process or on a cluster: the same samples in the same order.

A remote encoder gets plain values (`Split`) and returns pieces (`Encoded`) that list unusable rows, so that the process
that collects the pieces raises the same errors as if it had encoded the rows itself.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import OutlastError
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import ROWS_PER_BATCH, Sample, in_batches
from outlast.trainers.data.batch_plan import derive_seed
from outlast.trainers.data.columns import ColumnMapping
from outlast.trainers.data.readers import Row, read_files
from outlast.trainers.data.sources import DataFile, find_data_files
from outlast.trainers.preparation.sample_counts import count_cut, count_empty
from outlast.trainers.tasks.base import Record, Task


def is_held_out(seed: int, number: int, share: float) -> bool:
    """Return whether the row `number` belongs to the share of rows that is held out for evaluation."""
    return derive_seed(seed, number) < int(share * 2**64)


@dataclass(frozen=True, slots=True)
class Split:
    """A split of the data, and the columns to read."""

    config: TrainingConfig
    name: str  #: `train` or `eval`
    chosen: ColumnMapping
    limit: int | None = None  #: rows to read at most, for a preview

    @property
    def is_share(self) -> bool:
        """Whether splits share the same files, and a row's number, counted from the first file, selects its split."""
        return self.config.data.eval_share is not None

    def sources(self) -> list[DataFile]:
        """Return the split's files, in order. Raises as `find_data_files`."""
        data = self.config.data
        source = data.eval or [] if self.name == "eval" and not self.is_share else data.train
        return find_data_files(source, data.csv)

    def rows(self, sources: Sequence[DataFile], first: int = 0) -> Iterator[Row]:
        """Read the split's rows from these files; their first row has the number `first`. Raises as `read_files`."""
        return islice(self._rows(sources, first), self.limit)

    def _rows(self, sources: Sequence[DataFile], first: int) -> Iterator[Row]:
        chosen, share = self.chosen, self.config.data.eval_share or 0.0
        for number, row in enumerate(read_files(sources, chosen.names, chosen.sparse_names, chosen.named), first):
            if not self.is_share or is_held_out(self.config.seed, number, share) is (self.name == "eval"):
                yield row


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of encoding a batch of rows."""

    num_rows: int
    faults: Mapping[int, str]  #: location and fault of each unusable row, by its index in the batch
    samples: Sequence[Sample]  #: of the other rows, in order
    num_cut: int = 0  #: rows of which the sample is truncated
    num_empty: int = 0  #: rows without a token of their own


#: A piece of a split; or, as the last piece, the error that ended it.
Piece = Encoded | OutlastError
#: Encodes a split in pieces, in order.
Encoder = Callable[[Task, Split], Generator[Piece, None, None]]
#: Context of an encoder: its resources exist while the context is open.
EncoderContext = Callable[[], AbstractContextManager[Encoder]]


def with_error(rows: Iterator[Row]) -> Iterator[Row | OutlastError]:
    """Iterate over rows; an error while reading them becomes the last item."""
    try:
        yield from rows
    except OutlastError as error:
        yield error


def encode_rows(task: Task, chosen: ColumnMapping, rows: Sequence[Row | OutlastError]) -> list[Piece]:
    """Check the rows up to the first error, and encode the usable ones."""
    faults, usable, records = dict[int, str](), list[Row](), list[Record]()
    for index, row in enumerate(rows):
        if isinstance(row, OutlastError):
            return [*encode_rows(task, chosen, rows[:index]), row]
        fault = row.fault or chosen.fault(row.values)
        record = {} if fault else chosen.record(row)
        if fault := fault or _fault(task, record):
            faults[index] = f"{row.where}: {fault}"
        else:
            usable.append(row)
            records.append(record)
    try:
        samples = list(task.encode(records)) if records else []
        counts = count_cut(task, records, samples), count_empty(task, records, samples)
        return [Encoded(len(rows), faults, samples, *counts)]
    except OutlastError as error:
        return [error]
    except Exception as error:
        if not _is_of_tokenizers(error):
            raise
        tried = {row.where: _rejects(task, record) for row, record in zip(usable, records, strict=True)}
        rejected = {where: fault for where, fault in tried.items() if fault}
        if not rejected:
            raise
        marked = [replace(row, fault=rejected.get(row.where, row.fault)) for row in rows if isinstance(row, Row)]
        return encode_rows(task, chosen, marked)


def _fault(task: Task, record: Record) -> str | None:
    """Return why the task cannot use a row; None if it can."""
    try:
        return task.fault(record)
    except Exception as error:
        if not _is_of_tokenizers(error):
            raise
        return f"the tokenizer rejects it: {first_line(error)}"


def _rejects(task: Task, record: Record) -> str | None:
    """Return why the tokenizer rejects a row that is encoded by itself; None if it does not."""
    try:
        list(task.encode([record]))
    except Exception as error:  # noqa: BLE001 - the one that ended the batch is raised where this is no answer
        return f"the tokenizer rejects it: {first_line(error)}" if _is_of_tokenizers(error) else None
    return None


def _is_of_tokenizers(error: Exception) -> bool:
    """Return whether the error is of `tokenizers`, which raises nothing more specific than Exception."""
    return type(error) is Exception


def encode_here(task: Task, split: Split) -> Generator[Piece, None, None]:
    """Encode a split in this process."""
    for rows in in_batches(with_error(split.rows(split.sources())), ROWS_PER_BATCH):
        yield from encode_rows(task, split.chosen, rows)
