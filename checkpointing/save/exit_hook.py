"""What is called when the interpreter ends while a save is in flight, whether it ends by an error or not.

Python's `atexit` is too late: by then `concurrent.futures` starts no more work, which a commit needs. Its own hook is
`threading._register_atexit` (CPython 3.9 to 3.14), called in reverse order of registration, so this one comes before.
A signal that is not handled, SIGKILL and `os._exit` call nothing.
"""

import concurrent.futures.thread  # noqa: F401 - its hook must be registered first
import os
import threading
from collections.abc import Callable

_pending: dict[int, tuple[int, Callable[[], None]]] = {}
_exiting: set[int] = set()


def call_at_exit(owner: object, work: Callable[[], None]) -> None:
    """Call `work` when this process ends, unless `owner` is released before. `work` must not raise.

    It is called at once if the interpreter is ending already: in a thread that outlives the main one, or in `atexit`.
    """
    _pending[id(owner)] = (os.getpid(), work)
    if os.getpid() in _exiting:
        work()


def release(owner: object) -> None:
    _pending.pop(id(owner), None)


def _call_pending() -> None:
    _exiting.add(os.getpid())
    for pid, work in list(_pending.values()):
        if pid == os.getpid():  # a forked child has the registrations, but not the threads
            work()


threading._register_atexit(_call_pending)  # type: ignore[attr-defined]
