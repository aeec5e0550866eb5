"""From the rows of a split to encoded samples, here or elsewhere: the same ones, in the same order, whoever does it.

What is done elsewhere is told in plain values (`Split`), and comes back in pieces (`Encoded`) that say which rows
cannot be used, so that whoever puts the pieces together refuses what one process would have refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from outlast.checkpointing.errors import OutlastError
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import ROWS_PER_BATCH, Sample, in_batches
from outlast.trainers.data.columns import ColumnMapping
from outlast.trainers.data.readers import BadRows, Row, read_files
from outlast.trainers.data.sampler import mix
from outlast.trainers.data.sources import Source, find_sources
from outlast.trainers.tasks.base import Record, Task


@dataclass(frozen=True, slots=True)
class Split:
    """Whose rows are read, and how.

    Attributes:
        config: The run's settings.
        name: `train` or `eval`.
        chosen: What is read of a row.
    """

    config: TrainingConfig
    name: str
    chosen: ColumnMapping

    @property
    def is_share(self) -> bool:
        """Whether the number of a row, from the first file on, decides if it is in the split."""
        return self.config.data.eval_share is not None

    def sources(self) -> list[Source]:
        """The files, in order. Raises as `find_sources`."""
        data = self.config.data
        return find_sources(data.eval or [] if self.name == "eval" and not self.is_share else data.train)

    def rows(self, sources: Sequence[Source], first: int = 0) -> Iterator[Row]:
        """The split's rows in some of its files, the first of which has the number `first`. Raises as `read_files`."""
        border = int((self.config.data.eval_share or 0.0) * 2**64)
        for number, row in enumerate(read_files(sources, self.chosen.names), first):
            if not self.is_share or (mix(self.config.seed, number) < border) is (self.name == "eval"):
                yield row


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of some rows.

    Attributes:
        num_rows: How many they were.
        faults: Those that cannot be used, by their place among them: where they are and why.
        samples: Of the others, in order.
    """

    num_rows: int
    faults: Mapping[int, str]
    samples: Sequence[Sample]


#: A piece of a split; or why there is no more of it, in the place where it ends.
Piece = Encoded | OutlastError
#: Encodes a split, in pieces, in order.
Encoder = Callable[[Task, Split], Generator[Piece, None, None]]
#: Where it is done: what it needs is there for as long as the context lasts.
EncoderContext = Callable[[], AbstractContextManager[Encoder]]


def with_error(rows: Iterator[Row]) -> Iterator[Row | OutlastError]:
    """The rows, and at their end why they end there if something is wrong."""
    try:
        yield from rows
    except OutlastError as error:
        yield error


def encode_rows(task: Task, chosen: ColumnMapping, rows: Sequence[Row | OutlastError]) -> list[Piece]:
    """Judges rows up to an error, and encodes those that can be used."""
    faults, records = dict[int, str](), list[Record]()
    for place, row in enumerate(rows):
        if isinstance(row, OutlastError):
            return [*encode_rows(task, chosen, rows[:place]), row]
        fault = row.fault or chosen.fault(row.values)
        record = {} if fault else chosen.record(row.values)
        if fault := fault or task.fault(record):
            faults[place] = f"{row.where}: {fault}"
        else:
            records.append(record)
    try:
        return [Encoded(len(rows), faults, list(task.encode(records)) if records else [])]
    except OutlastError as error:
        return [error]


def encode_here(task: Task, split: Split) -> Generator[Piece, None, None]:
    """Encodes a split in this process."""
    for rows in in_batches(with_error(split.rows(split.sources())), ROWS_PER_BATCH):
        yield from encode_rows(task, split.chosen, rows)


@contextmanager
def local_encoder() -> Iterator[Encoder]:
    """The place that is always there."""
    yield encode_here


def usable_pieces(pieces: Iterator[Piece], bad: BadRows) -> Iterator[Encoded]:
    """The pieces, as long as not too many rows cannot be used.

    Raises:
        ConfigError: There are too many.
        OutlastError: What went wrong, where it did.
    """
    for piece in pieces:
        if isinstance(piece, OutlastError):
            bad.end()
            raise piece
        bad.see(piece.num_rows, piece.faults)
        if not bad.are_too_many:
            yield piece
    bad.end()
