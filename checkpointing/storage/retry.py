"""Retries: of storage operations, and of whatever else may succeed a little later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import repeat, takewhile

from outlast.checkpointing.errors import StorageError, StorageRefused
from outlast.checkpointing.storage.base import Storage, T

_TRIES = 3
_PAUSE_S = 0.5
_OUTAGE_S = 120.0


def call_with_retries(work: Callable[[], T], pauses_s: Iterable[float], may_pass: Callable[[Exception], bool]) -> T:
    """Calls `work` until it succeeds, and raises its last error.

    Args:
        work: What may be done twice.
        pauses_s: Pauses before the second call, the third, and so on; the call before they end is the last.
        may_pass: Whether an error may be gone at the next call.
    """
    pauses = iter(pauses_s)
    while True:
        try:
            return work()
        except Exception as error:
            if not may_pass(error) or (pause_s := next(pauses, None)) is None:
                raise
        time.sleep(pause_s)


def every(pause_s: float, limit_s: float) -> Iterable[float]:
    """Equal pauses, for so many seconds from now."""
    deadline = time.monotonic() + limit_s
    return takewhile(lambda _: time.monotonic() <= deadline, repeat(pause_s))


def retry(work: Callable[[], T]) -> T:
    """Tries an operation on a storage three times.

    Raises:
        StorageError: All tries failed.
        FileNotFoundError: What is to be read is not there.
    """
    try:
        return call_with_retries(work, repeat(_PAUSE_S, _TRIES - 1), _may_pass)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"reading failed {_TRIES} times: {error}") from error


def _may_pass(error: Exception) -> bool:
    return isinstance(error, StorageError | OSError) and not isinstance(error, StorageRefused | FileNotFoundError)


def wait_for(storage: Storage, path: str) -> None:
    """Waits until the storage answers, for two minutes at most: a server that restarts is no reason to fail.

    Raises:
        StorageError: It does not answer, or refuses.
    """
    call_with_retries(lambda: storage.list(path), every(_PAUSE_S, _OUTAGE_S), _may_pass)
