"""Lines at the bottom of a terminal that change in place while other output scrolls by above them.

Each change is one write that overwrites the old lines, and nothing is written when nothing changed, so nothing
flickers. Whatever else is written to stderr, or to stdout if that is a terminal too, appears above in whole lines, no
matter who writes it: libraries, existing loggers, child processes. After a terminal was made narrower, the rows of the
wrapped old lines are counted again. If a terminal fails, its output is dropped, and writers continue.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

PERIOD_S = 0.5
_TIMEOUT_S = 1.0
_GONE = (OSError, ValueError)


class LiveDisplay:
    """Shows lines at the bottom of a terminal; a context manager.

    Args:
        console: The terminal.
        lines: Returns the lines, each at most as wide as its argument. Called in another thread.
        keep: Leave the last lines on the terminal at the end; may be changed until then.
        period_s: Seconds between two calls of `lines`.
    """

    def __init__(
        self,
        console: Console,
        lines: Callable[[int], Sequence[Text]],
        *,
        keep: bool = False,
        period_s: float = PERIOD_S,
    ) -> None:
        self._console, self._lines, self.keep, self._period_s = console, lines, keep, period_s
        self._stream: TextIO = console.file  # type: ignore[assignment]
        self._file = self._stream
        self._drawn: list[Text] = []
        self._columns = 0
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._refresh_periodically, daemon=True)
        self._redirects: list[_StreamRedirect] = []

    def __enter__(self) -> LiveDisplay:
        stream = self._stream
        if stream in (sys.stdout, sys.stderr):
            self._file = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace")
            self._console.file = self._file
        streams = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        self._redirects = [_StreamRedirect(stream, self.write) for stream in streams]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        for redirect in self._redirects:
            redirect.close()
        if self.keep:
            self.refresh()
        with self._lock, suppress(*_GONE):
            self._file.write("\n" if self.keep and self._drawn else self._cursor_up() + "\x1b[J")
            self._file.flush()
        self._drawn = []
        if self._file is not self._stream:
            self._console.file = self._stream
            with suppress(*_GONE):  # it may still hold what could not be written
                self._file.close()

    def print(self, *things: Any, **options: Any) -> None:
        """Print above the lines, with the console's options; after the end, below what was kept of them."""
        if self._closing.is_set() and self._console.file is self._stream:
            with suppress(*_GONE):
                self._console.print(*things, **options)
            return
        with self._lock, suppress(*_GONE):
            with self._console.capture() as captured:
                self._console.print(*things, **options)
            self.write(captured.get())

    def write(self, text: str) -> None:
        """Write whole lines above the lines."""
        with self._lock:
            self._draw(text, self._drawn)

    def refresh(self) -> None:
        """Draw the lines if they or the width changed."""
        columns = self._console.width
        lines = list(self._lines(columns - 1))[: max(1, self._console.height - 1)]
        with self._lock:
            if (lines, columns) != (self._drawn, self._columns):
                self._draw("", lines)

    def _refresh_periodically(self) -> None:
        self.refresh()
        while not self._closing.wait(self._period_s):
            self.refresh()

    def _draw(self, above: str, lines: list[Text]) -> None:
        with suppress(*_GONE):  # the console flushes even while it captures
            text = self._cursor_up() + above.replace("\n", "\x1b[K\n")
            with self._console.capture() as captured:
                for line in lines:
                    self._console.print(line, no_wrap=True, overflow="ignore", crop=False)
            text += captured.get().removesuffix("\n").replace("\n", "\x1b[K\n")
            # Synchronized output: terminals that know this mode draw only at its end; others ignore it.
            self._file.write(f"\x1b[?2026h{text}\x1b[K\x1b[J\x1b[?2026l")
            self._file.flush()
            self._drawn, self._columns = lines, self._console.width

    def _cursor_up(self) -> str:
        """Return the escape sequence that moves to the start of the first drawn line."""
        columns = max(1, self._console.width)
        rows = sum(max(1, -(-line.cell_len // columns)) for line in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "")


class _StreamRedirect:
    """Redirects the file descriptor of a terminal's stream to a callback that receives whole lines."""

    def __init__(self, stream: TextIO, write: Callable[[str], None]) -> None:
        self._stream, self._write = stream, write
        stream.flush()
        self._original = os.dup(stream.fileno())
        reading, writing = os.pipe()
        os.dup2(writing, stream.fileno())
        os.close(writing)
        # A daemon, because a child process that is still running may hold the other end.
        self._thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the stream, after everything written so far was passed on."""
        self._stream.flush()
        os.dup2(self._original, self._stream.fileno())
        os.close(self._original)
        self._thread.join(_TIMEOUT_S)

    def _read(self, reading: int) -> None:
        rest = b""
        while chunk := os.read(reading, 65536):
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                self._write((lines + newline).decode(errors="replace"))
        if rest:
            self._write(rest.decode(errors="replace") + "\n")
        os.close(reading)
