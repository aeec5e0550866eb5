"""Signals of the driver's process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: What SIGINT and SIGTERM raise in the main thread; Ray's own handler, set while it starts, raises the second.
_INTERRUPTIONS = (KeyboardInterrupt, SystemExit)


def interrupt_on_sigterm() -> None:
    """Outside the training itself there is nothing to commit: SIGTERM then ends the driver as Ctrl-C does.

    To be said again after `ray.init`, which sets a handler of its own.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second one interrupts at once."""
    stopping = threading.Event()

    def handle(signum: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    with _handling(handle):
        yield stopping


@contextlib.contextmanager
def _handling(handle: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """SIGTERM and SIGINT are handled so meanwhile. Python allows it in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
