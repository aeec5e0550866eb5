"""Journals: the events of a run, one JSON object per line, written and read.

A writer owns numbered segments (`<stream>-<rank>-<n>.jsonl`) and rewrites the newest one at each flush, because object
stores cannot append. Two streams: `events` for everything, flushed every few seconds, and `commits` for commits and
deletions, each durable before the writer continues; the second stays short, so a catalog is cheap however many steps a
run has. Journals are a record: which checkpoints exist is decided by manifests alone.

As `events` grows, its writer replaces finished segments by compacted files with the same events, in the background:
first the compacted file is durable, then the segments are deleted. The first and the newest segments stay, so how an
attempt began and ended is read at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.json_input import is_too_deep
from outlast.checkpointing.redaction import redact_json
from outlast.checkpointing.run_store.events import Event
from outlast.checkpointing.run_store.segments import (
    SegmentFile,
    SegmentReader,
    compacted_name,
    list_segments,
    read_if_exists,
    segment_name,
)
from outlast.checkpointing.storage.base import ReadableStorage, Storage

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import CompactedEvents, StepColumns

FLUSH_S = 5.0
SEGMENT_BYTES = 256 * 1024
#: Finished segments per compacted file, and compacted files per joined file.
COMPACTED_SEGMENTS = 4
JOINED_FILES = 16

EVENTS = "events"
COMMITS = "commits"


class Journal:
    """Writes one stream of one rank, 0 for a driver. Safe to use from several threads.

    No other process may write this rank and stream in `directory`. `flush_s` is the longest time that an event waits
    for its flush, provided that more events follow; zero flushes each one.

    Attributes:
        keeps_refused: Keep events in memory, also while the storage refuses them, instead of raising from `write`.
    """

    def __init__(
        self, storage: Storage, directory: str, rank: int, *, stream: str = EVENTS, flush_s: float = FLUSH_S
    ) -> None:
        self._storage = storage
        self._directory, self._journal = directory, f"{stream}-{rank}"
        self._flush_s = flush_s
        self.keeps_refused = False
        self._segment = 0
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._dirty = self._is_held = self._has_ended = False
        self._flushed_at = time.monotonic()
        self._lock = threading.Lock()
        self._putting = threading.Lock()
        self._compaction = _Compaction(storage, directory, f"{stream}-{rank}") if stream == EVENTS else None

    def write(self, event: Event) -> None:
        """Append an event with the current time; credentials in its texts are redacted.

        Raises:
            StorageError: A flush was due and failed permanently, or at all if each event is flushed.
        """
        line = _to_line(event)
        with self._lock:
            self._lines.append(line)
            self._num_bytes += len(line)
            self._dirty = True
        if self._flush_s and self._putting.locked():
            return  # another thread is flushing, and no caller waits for the journal
        if not self._is_held and time.monotonic() - self._flushed_at >= self._flush_s:
            try:
                self.flush()
            except StorageError as error:
                if not self._flush_s or (error.permanent and not self.keeps_refused):
                    raise
                # The lines are kept and written by the next flush; a late journal is no reason to stop.

    def flush(self) -> None:
        """Make all events so far durable. Raises StorageError."""
        with self._putting:  # one put at a time; meanwhile others may add events
            with self._lock:
                if self._is_held:
                    return
                self._flushed_at = time.monotonic()
                if not self._dirty:
                    return
                lines, self._dirty = list(self._lines), False
            try:
                self._storage.put(f"{self._directory}/{segment_name(self._journal, self._segment)}", lines)
            except BaseException:
                self._dirty = True
                raise
            with self._lock:
                if self._num_bytes >= SEGMENT_BYTES:
                    rest = self._lines[len(lines) :]
                    if self._compaction is not None:
                        self._compaction.add(self._segment, lines)
                    self._segment, self._lines = self._segment + 1, rest
                    self._num_bytes, self._dirty = sum(map(len, rest)), bool(rest)

    def hold(self) -> None:
        """Keep all events in memory until `release`, because the directory is not claimed yet."""
        self._is_held = True

    def release(self, earlier: Sequence[bytes], missed: Sequence[Event]) -> None:
        """Write the events held, after those that `end` has returned of another journal, and go on as usual.

        `missed` come after the first event. Does nothing once the journal has ended. Raises StorageError.
        """
        with self._lock:
            if self._is_held and not self._has_ended:
                first, *rest = [*earlier, *self._lines]
                self._lines = [first, *map(_to_line, missed), *rest]
                self._num_bytes, self._is_held = sum(map(len, self._lines)), False
        self.flush()

    def end(self) -> list[bytes]:
        """Write nothing from now on. Returns the events that are held, or makes those so far durable, if possible."""
        with suppress(StorageError):
            self.flush()
        with self._putting, self._lock:
            lines = self._lines if self._is_held and not self._has_ended else []
            self._is_held = self._has_ended = True
            return lines

    def wait(self) -> None:
        if self._compaction is not None:
            self._compaction.wait()


def _to_line(event: Event) -> bytes:
    body = {name: redact_json(value) for name, value in event.to_json().items()}
    return json.dumps({"t": round(time.time(), 4), **body}).encode() + b"\n"


class _Compaction:
    """Replaces a journal's finished segments by compacted files; after a failure the segments stay.

    Whenever the process dies, each event is in its segment, in the compacted file, or in both.
    """

    def __init__(self, storage: Storage, directory: str, journal: str) -> None:
        self._storage, self._directory, self._journal = storage, directory, journal
        self._finished: dict[int, list[bytes]] = {}
        self._compacted: list[tuple[int, int, CompactedEvents]] = []
        self._thread: threading.Thread | None = None

    def add(self, number: int, lines: list[bytes]) -> None:
        """Add a segment that is finished and durable."""
        if not number:
            return  # the first one shows how the attempt began
        self._finished[number] = lines
        if len(self._finished) <= COMPACTED_SEGMENTS or (self._thread is not None and self._thread.is_alive()):
            return
        newest = max(self._finished)  # which shows how the attempt ended
        taken = {key: lines for key, lines in self._finished.items() if key != newest}
        # Not a daemon: those are killed inside native code when the interpreter ends.
        thread = threading.Thread(target=self._compact, args=(taken,), name="journal compaction")
        try:
            thread.start()
        except RuntimeError:  # the process may start no more threads: the segments stay, and training goes on
            return
        self._thread, self._finished = thread, {newest: self._finished[newest]}

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _compact(self, segments: dict[int, list[bytes]]) -> None:
        from outlast.checkpointing.run_store.compacted_segment import compact, join

        first, last = min(segments), max(segments)
        if self._compacted and self._compacted[-1][1] + 1 != first:
            self._compacted = []  # the one between failed: a joined file hides all within its range, and must hold it
        with suppress(StorageError):
            events = compact(list(segments.values()))
            self._put(first, last, events)
            self._compacted.append((first, last, events))
            self._delete(segment_name(self._journal, number) for number in segments)
            if len(self._compacted) >= JOINED_FILES:
                parts, self._compacted = self._compacted, []
                self._put(parts[0][0], parts[-1][1], join([events for *_, events in parts]))
                self._delete(compacted_name(self._journal, first, last) for first, last, _ in parts)

    def _put(self, first: int, last: int, events: CompactedEvents) -> None:
        from outlast.checkpointing.run_store.compacted_segment import to_parquet

        self._storage.put(f"{self._directory}/{compacted_name(self._journal, first, last)}", [to_parquet(events)])

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._storage.delete(f"{self._directory}/{name}")


def last_event_at(storage: Storage, directory: str) -> float | None:
    """Return the time of rank 0's newest event in seconds since the epoch, if there is one. Raises StorageError."""
    newest = _read(storage, directory, lambda files: files[-1:])
    return max((float(t) for event in newest if isinstance(t := event.get("t"), int | float)), default=None)


def read_events(storage: ReadableStorage, directory: str, stream: str = EVENTS) -> Iterator[dict[str, Any]]:
    """Yield the events of a directory, each rank's in order; other lines are skipped. Raises StorageError."""
    for events in SegmentReader(storage, directory, stream).new():
        yield from parse_lines(events) if isinstance(events, list) else events


def read_first_and_last(storage: ReadableStorage, directory: str) -> Iterator[dict[str, Any]]:
    """Yield rank 0's events in the first and the last segment: how it began and ended. Raises StorageError."""
    return _read(storage, directory, lambda files: list(dict.fromkeys([*files[:1], *files[-1:]])))


def _read(
    storage: ReadableStorage, directory: str, choose: Callable[[list[SegmentFile]], list[SegmentFile]]
) -> Iterator[dict[str, Any]]:
    for attempt in range(_ATTEMPTS):  # a segment that is compacted meanwhile is no longer the last one
        files = choose(list_segments(storage, directory, _RANK_0, again=attempt > 0))
        contents = [read_if_exists(storage, directory, file.name) for file in files]
        if None not in contents:
            break
    for data in contents:
        yield from parse_lines((data or b"").splitlines())


class JournalTail:
    """Follows journals in several directories and returns each event once; see `SegmentReader`."""

    def __init__(self, storage: ReadableStorage, stream: str = EVENTS) -> None:
        self._storage, self._stream = storage, stream
        self._readers: dict[str, SegmentReader] = {}

    def new(self, directory: str) -> Iterator[dict[str, Any] | StepColumns]:
        """Yield new events of a directory, each rank's in order, but the steps of a compacted file first and by column.

        Raises StorageError when a listing or a read fails; the next call resumes there.
        """
        reader = self._readers.setdefault(directory, SegmentReader(self._storage, directory, self._stream))
        for events in reader.new():
            yield from parse_lines(events) if isinstance(events, list) else events.by_column()


_RANK_0 = f"{EVENTS}-0"
_ATTEMPTS = 5
_SLICE = 4096


def parse_lines(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the events of lines; other lines are skipped."""
    for first in range(0, len(lines), _SLICE):
        part = lines[first : first + _SLICE]
        try:
            events = json.loads(b"[" + b",".join(part) + b"]")  # many at once: journals have a million lines
        except (ValueError, RecursionError):
            events = [event for line in part for event in _parse_line(line)]
        if is_too_deep(events):
            events = [event for event in events if not is_too_deep([event])]
        for event in events:
            if isinstance(event, dict) and "event" in event:
                yield event


def _parse_line(line: bytes) -> Iterator[Any]:
    try:
        yield json.loads(line)
    except (ValueError, RecursionError):
        return
