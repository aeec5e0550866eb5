"""A few lines at the foot of a terminal that change in place, while whatever else is printed scrolls by above them.

Each change is one write: the old lines are overwritten, not cleared, and nothing is written when nothing has changed,
so nothing flickers. What Python code prints meanwhile, to stderr or to stdout where that is the terminal too, comes out
in whole lines above. A terminal that was made narrower has wrapped the old lines; their rows are counted anew.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

PERIOD_S = 0.5


class Foot:
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
        self._file: TextIO = console.file  # type: ignore[assignment]
        console.file = self._file  # else it would find the stream that stands for it later on
        self._drawn: list[Text] = []
        self._columns = 0
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._refresh_on, daemon=True)
        self._streams: list[tuple[str, Any, _Aside]] = []

    def __enter__(self) -> Foot:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                aside = _Aside(stream, self.write)
                self._streams.append((name, stream, aside))
                setattr(sys, name, aside)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        for name, stream, aside in self._streams:
            setattr(sys, name, stream)
            aside.finish()
        if self.keep:
            self.refresh()
        with self._lock:
            self._file.write("\n" if self.keep and self._drawn else self._up() + "\x1b[J")
            self._file.flush()
            self._drawn = []

    def print(self, *things: Any, **options: Any) -> None:
        """As the console's: above the lines."""
        with self._lock:
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
    """Stands for a stream of the terminal, and hands on what is written in whole lines."""

    def __init__(self, stream: TextIO, write: Callable[[str], None]) -> None:
        self._stream, self._write = stream, write
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            lines, newline, self._rest = (self._rest + text).rpartition("\n")
            if newline:
                self._write(lines + "\n")
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Half a line waits for its end."""

    def finish(self) -> None:
        """Hands on what is left."""
        if self._rest:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
