"""The journal: what happened to a run, one JSON object a line.

A writer owns numbered segments (`<stream>-<rank>-<n>.jsonl`) and puts the newest one again at each flush, because
object stores cannot append. Two streams: `events` for everything, flushed every few seconds, and `commits` for commits
and deletions, which are durable before the writer goes on; the second stays short, so a catalogue is cheap however many
steps a run has. The journal tells the story; which checkpoints exist is decided by manifests alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.storage.base import ReadableStorage, Storage, read_bytes

FLUSH_S = 5.0
SEGMENT_BYTES = 256 * 1024

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
        self._prefix = f"{directory}/{stream}-{rank}"
        self._flush_s = flush_s
        self._segment = 0
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._dirty = False
        self._flushed_at = time.monotonic()
        self._lock = threading.Lock()
        self._putting = threading.Lock()

    def event(self, kind: str, /, **fields: Any) -> None:
        """Adds an event. `fields` must be JSON; `t` (seconds since the epoch) is added.

        Raises:
            StorageError: A flush was due and failed for good, or at all where each event is flushed.
        """
        line = json.dumps({"t": round(time.time(), 4), "event": kind, **fields}).encode() + b"\n"
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
                self._storage.put(f"{self._prefix}-{self._segment:06d}.jsonl", lines)
            except BaseException:
                self._dirty = True
                raise
            with self._lock:
                if self._num_bytes >= SEGMENT_BYTES:
                    rest = self._lines[len(lines) :]
                    self._segment, self._lines = self._segment + 1, rest
                    self._num_bytes, self._dirty = sum(map(len, rest)), bool(rest)


def last_event_at(storage: Storage, directory: str) -> float | None:
    """When rank 0's newest event in a directory happened, in seconds since the epoch; None if there is none.

    Raises:
        StorageError: A read failed.
    """
    newest = _segments(storage, directory, f"{EVENTS}-0")[-1:]
    return max((float(event["t"]) for event in _read(storage, directory, newest) if "t" in event), default=None)


def read_events(storage: ReadableStorage, directory: str, stream: str = EVENTS) -> Iterator[dict[str, Any]]:
    """The events of a directory, each rank's in the order written. Lines that are not JSON objects are passed over.

    Raises:
        StorageError: A read failed.
    """
    return _read(storage, directory, _segments(storage, directory, stream))


def read_first_and_last(storage: ReadableStorage, directory: str) -> Iterator[dict[str, Any]]:
    """Rank 0's events in the first and in the last segment of a directory: how it began, and how it ended.

    Raises:
        StorageError: A read failed.
    """
    mine = [name for name in _segments(storage, directory, EVENTS) if name.startswith(f"{EVENTS}-0-")]
    return _read(storage, directory, dict.fromkeys([*mine[:1], *mine[-1:]]))


class JournalTail:
    """Reads the same directories again and again, and gives each event once.

    A segment that has not grown is not read again, and one that is full is never; so what a look costs does not depend
    on how long the journal is.

    Args:
        storage: Where they lie.
        stream: Which stream; with it come those whose names begin so (`events` brings `events-watch`).
    """

    def __init__(self, storage: ReadableStorage, stream: str = EVENTS) -> None:
        self._storage, self._stream = storage, stream
        self._seen: dict[str, tuple[int | None, int]] = {}

    def new(self, directory: str) -> Iterator[dict[str, Any]]:
        """The events of a directory that were not given before, each rank's in the order written.

        Raises:
            StorageError: A listing or a read failed. The next look begins there.
        """
        entries = [entry for entry in self._storage.list(directory) if _is_segment(entry.name, self._stream)]
        grown = [
            (f"{directory}/{entry.name}", entry.num_bytes)
            for entry in entries
            if self._seen.get(f"{directory}/{entry.name}", (None, 0))[0] != entry.num_bytes
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(grown), _READERS):
                part = grown[first : first + _READERS]
                for (path, num_bytes), data in zip(part, pool.map(self._read, [path for path, _ in part]), strict=True):
                    lines = data.splitlines()
                    before = self._seen.get(path, (None, 0))[1]
                    self._seen[path] = (num_bytes, len(lines))
                    yield from _parse(lines[before:])

    def _read(self, path: str) -> bytes:
        try:
            return read_bytes(self._storage, path)
        except FileNotFoundError:
            return b""


_READERS = 8


def _is_segment(name: str, stream: str) -> bool:
    return name.startswith(f"{stream}-") and name.endswith(".jsonl")


def _segments(storage: ReadableStorage, directory: str, stream: str) -> list[str]:
    names = (entry.name for entry in storage.list(directory))
    return [name for name in names if _is_segment(name, stream)]


def _read(storage: ReadableStorage, directory: str, segments: Iterable[str]) -> Iterator[dict[str, Any]]:
    for name in segments:
        try:
            data = read_bytes(storage, f"{directory}/{name}")
        except FileNotFoundError:
            continue
        yield from _parse(data.splitlines())


def _parse(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    try:
        events = json.loads(b"[" + b",".join(lines) + b"]")  # all at once: journals have a million lines
    except ValueError:
        events = [event for line in lines for event in _parse_line(line)]
    for event in events:
        if isinstance(event, dict) and "event" in event:
            yield event


def _parse_line(line: bytes) -> Iterator[Any]:
    try:
        yield json.loads(line)
    except ValueError:
        return
