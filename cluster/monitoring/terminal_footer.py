"""A few lines at the foot of a terminal that change in place, while whatever else is printed scrolls by above them.

Each change is one write: the old lines are overwritten, not cleared, and nothing is written when nothing has changed,
so nothing flickers. Whatever is written meanwhile to stderr, or to stdout where that is a terminal too, comes out in
whole lines above, whoever writes it: libraries, loggers that were made before, child processes. A terminal that was
made narrower has wrapped the old lines; their rows are counted anew. One that fails is one that is gone: what would be
shown there is dropped, and whoever writes goes on.
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
    """Use as a context manager.

    Args:
        console: The terminal.
        lines: Makes the lines, each narrower than the columns that it is given. Called in a thread of its own.
        keep: Leave the last lines standing in the end; may be changed until then.
        period_s: Between two looks at `lines`.
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
        self._thread = threading.Thread(target=self._refresh_on, daemon=True)
        self._asides: list[_Aside] = []

    def __enter__(self) -> LiveDisplay:
        stream = self._stream
        if stream in (sys.stdout, sys.stderr):
            self._file = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace")
            self._console.file = self._file
        self._asides = [_Aside(stream, self.write) for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        for aside in self._asides:
            aside.close()
        if self.keep:
            self.refresh()
        with self._lock, suppress(*_GONE):
            self._file.write("\n" if self.keep and self._drawn else self._up() + "\x1b[J")
            self._file.flush()
        self._drawn = []
        if self._file is not self._stream:
            self._console.file = self._stream
            with suppress(*_GONE):  # it may still hold what could not be written
                self._file.close()

    def print(self, *things: Any, **options: Any) -> None:
        """As the console's: above the lines."""
        with self._lock, suppress(*_GONE):
            with self._console.capture() as captured:
                self._console.print(*things, **options)
            self.write(captured.get())

    def write(self, text: str) -> None:
        """Puts whole lines above."""
        with self._lock:
            self._draw(text, self._drawn)

    def refresh(self) -> None:
        """Shows the lines as they are now."""
        columns = self._console.width
        lines = list(self._lines(columns - 1))[: max(1, self._console.height - 1)]
        with self._lock:
            if (lines, columns) != (self._drawn, self._columns):
                self._draw("", lines)

    def _refresh_on(self) -> None:
        while True:
            self.refresh()
            if self._closing.wait(self._period_s):
                return

    def _draw(self, above: str, lines: list[Text]) -> None:
        with suppress(*_GONE):  # the console flushes, even where it only captures
            text = self._up() + above.replace("\n", "\x1b[K\n")
            with self._console.capture() as captured:
                for line in lines:
                    self._console.print(line, no_wrap=True, overflow="ignore", crop=False)
            text += captured.get().removesuffix("\n").replace("\n", "\x1b[K\n")
            # In between, terminals that know this mode show nothing; others pass over it.
            self._file.write(f"\x1b[?2026h{text}\x1b[K\x1b[J\x1b[?2026l")
            self._file.flush()
            self._drawn, self._columns = lines, self._console.width

    def _up(self) -> str:
        """To the beginning of the first line that is drawn."""
        columns = max(1, self._console.width)
        rows = sum(max(1, -(-line.cell_len // columns)) for line in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "")


class _Aside:
    """Takes the place of a stream of the terminal, below Python, and hands on what is written to it in whole lines."""

    def __init__(self, stream: TextIO, write: Callable[[str], None]) -> None:
        self._stream, self._write = stream, write
        stream.flush()
        self._kept = os.dup(stream.fileno())
        reading, writing = os.pipe()
        os.dup2(writing, stream.fileno())
        os.close(writing)
        # A daemon, because a child that goes on may hold the other end.
        self._thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the stream back; what was written until now has come out."""
        self._stream.flush()
        os.dup2(self._kept, self._stream.fileno())
        os.close(self._kept)
        self._thread.join(_TIMEOUT_S)

    def _read(self, reading: int) -> None:
        rest = b""
        while part := os.read(reading, 65536):
            whole, newline, rest = (rest + part).rpartition(b"\n")
            if newline:
                self._write((whole + newline).decode(errors="replace"))
        if rest:
            self._write(rest.decode(errors="replace") + "\n")
        os.close(reading)
