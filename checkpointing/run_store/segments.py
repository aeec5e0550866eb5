"""The files of a journal, and a reader that returns each event once while they change.

A journal is a sequence of numbered segments, as written (`events-0-000017.jsonl`) or several compacted into one file
(`events-0-000001-000016.parquet`), which is durable before they are deleted. Of both, a reader takes the compacted
one. If it finds a listed segment gone, it lists again. An unreadable compacted file is treated as missing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from outlast.checkpointing.errors import DamagedError, StorageRefused
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import ReadableStorage, read_bytes

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import CompactedEvents

_NAME = re.compile(r"(?P<journal>.+?)-(?P<first>\d{6,})(?:\.jsonl|-(?P<last>\d{6,})\.parquet)")
_READERS = 8
_ATTEMPTS = 5
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One file of a journal: a segment, or several that were compacted."""

    name: str  #: its name in the directory
    journal: str  #: the prefix of all names of this journal, such as `events-0`
    first: int  #: number of its first segment
    last: int  #: number of its last segment
    num_bytes: int  #: its size

    @property
    def is_compacted(self) -> bool:
        return self.name.endswith(".parquet")

    @property
    def segments(self) -> list[tuple[str, int]]:
        """The segments whose events it holds."""
        return [(self.journal, number) for number in range(self.first, self.last + 1)]

    def contains(self, other: SegmentFile) -> bool:
        """Return whether this compacted file contains all events of another file."""
        is_within = self.journal == other.journal and self.first <= other.first and other.last <= self.last
        return self.is_compacted and is_within and self != other


def segment_name(journal: str, number: int) -> str:
    return f"{journal}-{number:06d}.jsonl"


def compacted_name(journal: str, first: int, last: int) -> str:
    return f"{journal}-{first:06d}-{last:06d}.parquet"


def list_segments(
    storage: ReadableStorage, directory: str, stream: str, excluded: Iterable[str] = (), *, again: bool = False
) -> list[SegmentFile]:
    """List the files of journals whose names begin with `stream`, each journal's in order, without overlaps.

    `stream` is such as `events-0`, or `events`, which includes `events-watch`. `excluded` are compacted files to leave
    out; `again` discards a cached listing first. Raises StorageError.
    """
    for attempt in range(_ATTEMPTS):
        if again or attempt:
            _forget(storage, directory)
        files = list(_segment_files(storage, directory, stream, set(excluded)))
        compacted = [file for file in files if file.is_compacted]
        kept = [file for file in files if not any(other.contains(file) for other in compacted)]
        if excluded or not any(b.first > a.last + 1 for a, b in pairwise(kept) if a.journal == b.journal):
            break  # a gap means that a compaction overtook the listing, or that a file was lost
    return kept


def _forget(storage: ReadableStorage, directory: str) -> None:
    if isinstance(storage, RunStore):
        storage.forget(directory)


def _segment_files(storage: ReadableStorage, directory: str, stream: str, excluded: set[str]) -> Iterator[SegmentFile]:
    files = []
    for entry in storage.list(directory):
        match = _NAME.fullmatch(entry.name) if entry.name.startswith(f"{stream}-") else None
        if match and (entry.num_bytes is None or entry.special) and isinstance(storage, RunStore):
            storage.unreadable[f"{directory}/{entry.name}"] = f"{directory}/{entry.name} is not a file"
        elif match and entry.num_bytes is not None and not entry.special and entry.name not in excluded:
            first, last = int(match["first"]), int(match["last"] or match["first"])
            files.append(SegmentFile(entry.name, match["journal"], first, last, entry.num_bytes))
    yield from sorted(files, key=lambda file: (file.journal, file.first, -file.last))


class SegmentReader:
    """Follows the journals of a directory and returns each event once. `stream` is as in `list_segments`.

    A segment is only read again when it has grown, so the cost of a call does not depend on the journal's length.
    """

    def __init__(self, storage: ReadableStorage, directory: str, stream: str) -> None:
        self._storage, self._directory, self._stream = storage, directory, stream
        self._sizes: dict[str, int] = {}
        self._returned: dict[tuple[str, int], int] = {}  # number of events by segment
        self._done: set[tuple[str, int]] = set()  # segments that were returned from a compacted file
        self._unreadable: set[str] = set()

    def new(self) -> Iterator[list[bytes] | CompactedEvents]:
        """Yield new events, each journal's in order: lines, or compacted events.

        Raises StorageError when a listing or a read fails; the next call resumes there.
        """
        for attempt in range(_ATTEMPTS):
            if attempt > 1:
                time.sleep(_PAUSE_S)
            is_last, is_complete = attempt == _ATTEMPTS - 1, True
            files = list_segments(self._storage, self._directory, self._stream, self._unreadable, again=attempt > 0)
            for file, data in self._read([file for file in files if not self._is_given(file)]):
                events = self._parse(file, data)
                if events is None:
                    is_complete = False
                    if not is_last:  # list again first, so that events stay in order
                        break
                elif len(events):
                    yield events
            if is_complete:
                return

    def _is_given(self, file: SegmentFile) -> bool:
        return self._sizes.get(file.name) == file.num_bytes or self._done.issuperset(file.segments)

    def _parse(self, file: SegmentFile, data: bytes | None) -> list[bytes] | CompactedEvents | None:
        """Return the new events of a file; None if it is gone or unreadable."""
        if data is None:
            return None
        new: list[bytes] | CompactedEvents
        counts: tuple[int, ...]
        known = [self._returned.get(segment, 0) for segment in file.segments]
        if file.is_compacted:
            from outlast.checkpointing.run_store.compacted_segment import CompactionError, from_parquet

            try:
                events = from_parquet(data)
            except CompactionError:
                self._unreadable.add(file.name)
                return None
            self._done.update(file.segments)
            counts, new = events.counts, events.after(known) if any(known) else events
        else:
            lines = data.splitlines()
            counts, new = (len(lines),), lines[known[0] :]
        self._returned.update(zip(file.segments, counts, strict=False))
        self._sizes[file.name] = file.num_bytes
        return new

    def _read(self, files: list[SegmentFile]) -> Iterator[tuple[SegmentFile, bytes | None]]:
        if len(files) < 2:
            yield from ((file, self._bytes_of(file)) for file in files)
            return
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(files), _READERS):
                batch = files[first : first + _READERS]
                yield from zip(batch, pool.map(self._bytes_of, batch), strict=True)

    def _bytes_of(self, file: SegmentFile) -> bytes | None:
        path = f"{self._directory}/{file.name}"
        try:
            return read_if_exists(self._storage, self._directory, file.name)
        except (StorageRefused, DamagedError) as error:  # until a person acts: the order of events cannot wait for it
            if not isinstance(self._storage, RunStore):
                raise
            self._storage.unreadable[path] = error.message
            self._unreadable.add(file.name)
            return None


def read_if_exists(storage: ReadableStorage, directory: str, name: str) -> bytes | None:
    """Read a file; None if it does not exist, or was deleted while it was read. Raises StorageError."""
    try:
        return read_bytes(storage, f"{directory}/{name}")
    except FileNotFoundError:
        return None
    except OSError:
        _forget(storage, directory)
        if any(entry.name == name for entry in storage.list(directory)):
            raise
        return None
