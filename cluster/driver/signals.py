"""SIGINT and SIGTERM in the driver's process: the first one requests a stop, the second one interrupts at once.

Handlers must never do work: they set a flag or raise, and the main thread does the rest. A thread answers the user,
because the main thread may be in a library that does not return for seconds. Where the driver runs in another thread,
which cannot set handlers, nothing is changed.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.run_store.store import RunStore

#: What SIGINT and SIGTERM raise in the main thread; Ray's own handler, set while it starts, raises the second.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit)


#: How long the end of the process waits for the answer to a signal.
_ANSWER_S = 1.0
#: Exit codes of a launch that was interrupted with a checkpoint, as `Outcome.STOPPED`, and without one. A driver that
#: attaches must not import torch for them.
_STOPPED, INTERRUPTED_EXIT = 75, 130


class StopFlag:
    """A flag that a signal's handler may set. It has no lock, unlike `threading.Event`.

    A handler runs in the main thread between two instructions, also those of another handler: if one of them held the
    lock of an event, the process would wait for itself.
    """

    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True


def exit_when_interrupted(store: RunStore) -> tuple[int, str]:
    """Return the exit code of an interrupted launch, and what of the run is saved."""
    try:
        accepted = build_catalog(store.fresh()).accepted
    except OutlastError:
        return INTERRUPTED_EXIT, "the storage does not tell what is saved"
    if not accepted:
        return INTERRUPTED_EXIT, "nothing is saved"
    return _STOPPED, f"the newest checkpoint is of step {accepted[0].ref.step}"


def interrupt_on_sigterm() -> None:
    """Make SIGTERM end the driver as Ctrl-C does: outside training there is nothing to commit.

    Call it again after `ray.init`, which sets a handler of its own.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Yield a flag that the first SIGTERM or SIGINT sets; the second one interrupts at once."""
    stopping = StopFlag()

    def handle(signum: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    with handle_signals(handle):
        yield stopping


@contextlib.contextmanager
def respond_to_signals(first: Callable[[], object], second: Callable[[], object]) -> Iterator[None]:
    """Call `first` at the first SIGINT or SIGTERM in the body and `second` at the next, at once, from a thread.

    The signals' handlers stay as they are, and run when the main thread is back in Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def respond() -> None:
        responses = [second, first]
        with reader:
            while number := reader.recv(1):  # empty at the end of the body
                if number[0] in (signal.SIGINT, signal.SIGTERM) and responses:
                    responses.pop()()

    thread = threading.Thread(target=respond, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join(_ANSWER_S)


@contextlib.contextmanager
def handle_signals(handle: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Handle SIGTERM and SIGINT by `handle` in the body. Python allows it only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
