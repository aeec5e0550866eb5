"""The journal: what happened to a run, one JSON object a line.

A writer owns numbered segments (`<stream>-<rank>-<n>.jsonl`) and puts the newest one again at each flush, because
object stores cannot append. Two streams: `events` for everything, flushed every few seconds, and `commits` for commits
and deletions, which are durable before the writer goes on; the second stays short, so a catalogue is cheap however many
steps a run has. The journal tells the story; which checkpoints exist is decided by manifests alone.

As `events` grows, its writer replaces finished segments by compacted files that hold the same events, in the
background: first the compacted file is durable, then the segments are deleted. The first segment and the newest ones
stay as they are, so how an attempt began and ended is read at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.run_store.events import Event
from outlast.checkpointing.run_store.segments import (
    SegmentFile,
    SegmentReader,
    compacted_name,
    list_segments,
    read_if_there,
    segment_name,
)
from outlast.checkpointing.storage.base import ReadableStorage, Storage

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compaction import CompactedEvents, StepColumns

FLUSH_S = 5.0
SEGMENT_BYTES = 256 * 1024
#: So many finished segments become one compacted file, and so many of these become one.
COMPACTED_SEGMENTS = 4
JOINED_FILES = 16

EVENTS = "events"
COMMITS = "commits"


class Journal:
    """Writes one stream of one rank. Safe to use from several threads.

    Args:
        storage: Where to write.
        directory: Directory of the segments, which nobody else writes for this rank and stream.
        rank: Rank of the writer, or 0 for a driver.
        stream: `events` or `commits`.
        flush_s: Longest time an event waits for its flush, given that more events come. Zero flushes each one.
    """

    def __init__(
        self, storage: Storage, directory: str, rank: int, *, stream: str = EVENTS, flush_s: float = FLUSH_S
    ) -> None:
        self._storage = storage
        self._directory, self._journal = directory, f"{stream}-{rank}"
        self._flush_s = flush_s
        self._segment = 0
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._dirty = False
        self._flushed_at = time.monotonic()
        self._lock = threading.Lock()
        self._putting = threading.Lock()
        self._compaction = _Compaction(storage, directory, f"{stream}-{rank}") if stream == EVENTS else None

    def write(self, event: Event) -> None:
        """Adds an event, with the time of now.

        Raises:
            StorageError: A flush was due and failed for good, or at all where each event is flushed.
        """
        line = json.dumps({"t": round(time.time(), 4), **event.to_json()}).encode() + b"\n"
        with self._lock:
            self._lines.append(line)
            self._num_bytes += len(line)
            self._dirty = True
        if self._flush_s and self._putting.locked():
            return  # somebody else is at it, and nobody waits for a story
        if time.monotonic() - self._flushed_at >= self._flush_s:
            try:
                self.flush()
            except StorageError as error:
                if error.permanent or not self._flush_s:
                    raise
                # The lines are kept and put again with the next flush; a story told late is no reason to stop.

    def flush(self) -> None:
        """Makes everything so far durable. Raises StorageError when that fails."""
        with self._putting:  # one put at a time; meanwhile others may add events
            with self._lock:
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

    def wait(self) -> None:
        """Waits until what is to be compacted now has been."""
        if self._compaction is not None:
            self._compaction.wait()


class _Compaction:
    """Replaces a journal's finished segments by compacted files. What fails is left as it was.

    Whatever moment the process dies at, the storage holds each event in the segment, in the compacted file, or in both.
    """

    def __init__(self, storage: Storage, directory: str, journal: str) -> None:
        self._storage, self._directory, self._journal = storage, directory, journal
        self._finished: dict[int, list[bytes]] = {}
        self._compacted: list[tuple[int, int, CompactedEvents]] = []
        self._thread: threading.Thread | None = None

    def add(self, number: int, lines: list[bytes]) -> None:
        """Takes a segment that is finished and durable."""
        if not number:
            return  # the first one tells how it began
        self._finished[number] = lines
        if len(self._finished) <= COMPACTED_SEGMENTS or (self._thread is not None and self._thread.is_alive()):
            return
        taken = {key: self._finished.pop(key) for key in list(self._finished)[:-1]}  # the newest tells how it ended
        # Not a daemon: those are torn out of native code when the interpreter ends.
        self._thread = threading.Thread(target=self._compact, args=(taken,), name="journal compaction")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _compact(self, segments: dict[int, list[bytes]]) -> None:
        from outlast.checkpointing.run_store.compaction import compact, join

        first, last = min(segments), max(segments)
        with suppress(StorageError):
            events = compact([line for lines in segments.values() for line in lines])
            self._replace([segment_name(self._journal, number) for number in segments], first, last, events)
            self._compacted.append((first, last, events))
            if len(self._compacted) >= JOINED_FILES:
                parts, self._compacted = self._compacted, []
                names = [compacted_name(self._journal, first, last) for first, last, _ in parts]
                self._replace(names, parts[0][0], parts[-1][1], join([events for *_, events in parts]))

    def _replace(self, names: list[str], first: int, last: int, events: CompactedEvents) -> None:
        from outlast.checkpointing.run_store.compaction import to_parquet

        self._storage.put(f"{self._directory}/{compacted_name(self._journal, first, last)}", [to_parquet(events)])
        for name in names:
            self._storage.delete(f"{self._directory}/{name}")


def last_event_at(storage: Storage, directory: str) -> float | None:
    """When rank 0's newest event in a directory happened, in seconds since the epoch; None if there is none.

    Raises:
        StorageError: A read failed.
    """
    newest = _read(storage, directory, lambda files: files[-1:])
    return max((float(event["t"]) for event in newest if "t" in event), default=None)


def read_events(storage: ReadableStorage, directory: str, stream: str = EVENTS) -> Iterator[dict[str, Any]]:
    """The events of a directory, each rank's in the order written. Lines that are not JSON objects are passed over.

    Raises:
        StorageError: A read failed.
    """
    for events in SegmentReader(storage, directory, stream).new():
        yield from _parse(events) if isinstance(events, list) else events


def read_first_and_last(storage: ReadableStorage, directory: str) -> Iterator[dict[str, Any]]:
    """Rank 0's events in the first and in the last segment of a directory: how it began, and how it ended.

    Raises:
        StorageError: A read failed.
    """
    return _read(storage, directory, lambda files: list(dict.fromkeys([*files[:1], *files[-1:]])))


def _read(
    storage: ReadableStorage, directory: str, choose: Callable[[list[SegmentFile]], list[SegmentFile]]
) -> Iterator[dict[str, Any]]:
    """The events of some of rank 0's segments."""
    for tries in range(_TRIES):  # one that is compacted meanwhile is not the last one any more
        files = choose(list_segments(storage, directory, _MINE, again=tries > 0))
        found = [read_if_there(storage, directory, file.name) for file in files]
        if None not in found:
            break
    for data in found:
        yield from _parse((data or b"").splitlines())


class JournalTail:
    """Reads the same directories again and again, and gives each event once; see `SegmentReader`.

    Args:
        storage: Where they lie.
        stream: Which stream; with it come those whose names begin so (`events` brings `events-watch`).
    """

    def __init__(self, storage: ReadableStorage, stream: str = EVENTS) -> None:
        self._storage, self._stream = storage, stream
        self._readers: dict[str, SegmentReader] = {}

    def new(self, directory: str) -> Iterator[dict[str, Any] | StepColumns]:
        """The events of a directory that were not given before, each rank's in the order written.

        Only the usual steps of a compacted file come before its other events, by column.

        Raises:
            StorageError: A listing or a read failed. The next look begins there.
        """
        reader = self._readers.setdefault(directory, SegmentReader(self._storage, directory, self._stream))
        for events in reader.new():
            yield from _parse(events) if isinstance(events, list) else events.by_column()


_MINE = f"{EVENTS}-0"
_TRIES = 5
_SLICE = 4096


def _parse(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for first in range(0, len(lines), _SLICE):
        part = lines[first : first + _SLICE]
        try:
            events = json.loads(b"[" + b",".join(part) + b"]")  # many at once: journals have a million lines
        except ValueError:
            events = [event for line in part for event in _parse_line(line)]
        for event in events:
            if isinstance(event, dict) and "event" in event:
                yield event


def _parse_line(line: bytes) -> Iterator[Any]:
    try:
        yield json.loads(line)
    except ValueError:
        return
