"""The files of a directory's journals, and what is new in them: each event once, however they change meanwhile.

A journal is a row of numbered segments. Some of them lie as they were written (`events-0-000017.jsonl`), others were
compacted into one file (`events-0-000001-000016.parquet`), which is durable before they are deleted. So a reader may
see both, and takes the compacted one; or it finds a segment gone that it saw in the listing, and lists again. A
compacted file that cannot be read is passed over as if it were not there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import ReadableStorage, read_bytes

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compaction import CompactedEvents

_NAME = re.compile(r"(?P<journal>.+?)-(?P<first>\d{6,})(?:\.jsonl|-(?P<last>\d{6,})\.parquet)")
_READERS = 8
_TRIES = 5
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One file of a journal: a segment, or several that were compacted.

    Attributes:
        name: Its name in the directory.
        journal: What all names of this journal begin with, such as `events-0`.
        first: The number of its first segment.
        last: That of its last one.
        num_bytes: Its size.
    """

    name: str
    journal: str
    first: int
    last: int
    num_bytes: int

    @property
    def is_compacted(self) -> bool:
        return self.name.endswith(".parquet")

    @property
    def range(self) -> tuple[int, int]:
        return self.first, self.last

    def holds(self, other: SegmentFile) -> bool:
        """Whether another file says nothing that this one does not."""
        return (
            self.journal == other.journal
            and _is_within(other.range, self.range)
            and self.is_compacted
            and self != other
        )


def _is_within(part: tuple[int, int], whole: tuple[int, int]) -> bool:
    return whole[0] <= part[0] and part[1] <= whole[1]


def segment_name(journal: str, number: int) -> str:
    return f"{journal}-{number:06d}.jsonl"


def compacted_name(journal: str, first: int, last: int) -> str:
    return f"{journal}-{first:06d}-{last:06d}.parquet"


def list_segments(
    storage: ReadableStorage, directory: str, stream: str, but: Iterable[str] = (), *, again: bool = False
) -> list[SegmentFile]:
    """The files of the journals whose names begin with `stream`, each journal's in order, and nothing twice.

    Args:
        storage: Where they lie.
        directory: Their directory.
        stream: Such as `events`, which brings `events-watch` too, or `events-0`.
        but: Compacted files to leave out.
        again: What the storage remembers of the directory has turned out to be old.

    Raises:
        StorageError: The listing failed.
    """
    for tries in range(_TRIES):
        if again or tries:
            _forget(storage, directory)
        found = list(_segment_files(storage, directory, stream, set(but)))
        wide = [file for file in found if file.is_compacted]
        kept = [file for file in found if not any(other.holds(file) for other in wide)]
        if but or not any(b.first > a.last + 1 for a, b in pairwise(kept) if a.journal == b.journal):
            break  # a gap is a listing that was overtaken by a compaction, or the end of a file by other means
    return kept


def _forget(storage: ReadableStorage, directory: str) -> None:
    if isinstance(storage, RunStore):
        storage.forget(directory)


def _segment_files(storage: ReadableStorage, directory: str, stream: str, but: set[str]) -> Iterator[SegmentFile]:
    files = []
    for entry in storage.list(directory):
        match = _NAME.fullmatch(entry.name) if entry.name.startswith(f"{stream}-") else None
        if match and entry.num_bytes is not None and entry.name not in but:
            first, last = int(match["first"]), int(match["last"] or match["first"])
            files.append(SegmentFile(entry.name, match["journal"], first, last, entry.num_bytes))
    yield from sorted(files, key=lambda file: (file.journal, file.first, -file.last))


class SegmentReader:
    """Reads a directory again and again, and gives each event once.

    A segment that has not grown is not read again, and one that is full is never; so what a look costs does not depend
    on how long the journal is.

    Args:
        storage: Where it lies.
        directory: The directory.
        stream: As in `list_segments`.
    """

    def __init__(self, storage: ReadableStorage, directory: str, stream: str) -> None:
        self._storage, self._directory, self._stream = storage, directory, stream
        self._sizes: dict[str, int] = {}
        self._given: dict[str, dict[tuple[int, int], int]] = {}  # events of each range of segments, by journal
        self._unreadable: set[str] = set()

    def new(self) -> Iterator[list[bytes] | CompactedEvents]:
        """What was not given before, each journal's in the order written: lines, or what was compacted.

        Raises:
            StorageError: A listing or a read failed. The next look begins there.
        """
        for tries in range(_TRIES):
            if tries > 1:
                time.sleep(_PAUSE_S)
            is_last, is_complete = tries == _TRIES - 1, True
            files = list_segments(self._storage, self._directory, self._stream, self._unreadable, again=tries > 0)
            for file, data in self._read([file for file in files if not self._is_given(file)]):
                events = self._parse(file, data)
                if events is None:
                    is_complete = False
                    if not is_last:  # list again before going on, lest what follows comes first
                        break
                elif len(events):
                    yield events
            if is_complete:
                return

    def _is_given(self, file: SegmentFile) -> bool:
        if self._sizes.get(file.name) == file.num_bytes:
            return True
        return any(part != file.range and _is_within(file.range, part) for part in self._given.get(file.journal, ()))

    def _parse(self, file: SegmentFile, data: bytes | None) -> list[bytes] | CompactedEvents | None:
        """What a file says that was not given; None if it has gone, or cannot be read."""
        if data is None:
            return None
        events: list[bytes] | CompactedEvents
        if file.is_compacted:
            from outlast.checkpointing.run_store.compaction import CompactionError, from_parquet

            try:
                events = from_parquet(data)
            except CompactionError:
                self._unreadable.add(file.name)
                return None
        else:
            events = data.splitlines()
        given = self._given.setdefault(file.journal, {})
        known = [part for part in given if _is_within(part, file.range)]
        number = sum(given.pop(part) for part in known)
        given[file.range] = len(events)
        self._sizes[file.name] = file.num_bytes
        return events[number:] if isinstance(events, list) else events.after(number)

    def _read(self, files: list[SegmentFile]) -> Iterator[tuple[SegmentFile, bytes | None]]:
        if len(files) < 2:
            yield from ((file, self._bytes_of(file)) for file in files)
            return
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(files), _READERS):
                part = files[first : first + _READERS]
                yield from zip(part, pool.map(self._bytes_of, part), strict=True)

    def _bytes_of(self, file: SegmentFile) -> bytes | None:
        return read_if_there(self._storage, self._directory, file.name)


def read_if_there(storage: ReadableStorage, directory: str, name: str) -> bytes | None:
    """The bytes of a file; None if it has gone, perhaps while it was read.

    Raises:
        StorageError: The read failed.
    """
    try:
        return read_bytes(storage, f"{directory}/{name}")
    except FileNotFoundError:
        return None
    except OSError:
        _forget(storage, directory)
        if any(entry.name == name for entry in storage.list(directory)):
            raise
        return None
