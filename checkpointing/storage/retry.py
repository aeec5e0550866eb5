"""Retries of storage operations, and of other work that may succeed a little later.

Only idempotent operations may be retried. A refusal (`StorageRefused`) and a missing file are never retried.
"""

import time
from collections.abc import Callable, Iterable
from itertools import repeat, takewhile

from outlast.checkpointing.errors import StorageError, StorageRefused
from outlast.checkpointing.storage.base import Storage, T

_ATTEMPTS = 3
_PAUSE_S = 0.5
_OUTAGE_S = 120.0


def call_with_retries(work: Callable[[], T], pauses_s: Iterable[float], is_transient: Callable[[Exception], bool]) -> T:
    """Call idempotent `work` until it succeeds; raise its last error.

    `pauses_s` are the seconds before the second call, the third, and so on; no call is made after them.
    """
    pauses = iter(pauses_s)
    while True:
        try:
            return work()
        except Exception as error:
            if not is_transient(error) or (pause_s := next(pauses, None)) is None:
                raise
        time.sleep(pause_s)


def constant_pauses(pause_s: float, limit_s: float) -> Iterable[float]:
    """Yield equal pauses until `limit_s` seconds from now."""
    deadline = time.monotonic() + limit_s
    return takewhile(lambda _: time.monotonic() <= deadline, repeat(pause_s))


def retry(work: Callable[[], T]) -> T:
    """Attempt a storage operation three times. Raises StorageError, or FileNotFoundError at once."""
    try:
        return call_with_retries(work, repeat(_PAUSE_S, _ATTEMPTS - 1), _is_transient)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"reading failed {_ATTEMPTS} times: {error}") from error


def _is_transient(error: Exception) -> bool:
    return isinstance(error, StorageError | OSError) and not isinstance(error, StorageRefused | FileNotFoundError)


def wait_until_responsive(storage: Storage, path: str) -> None:
    """Wait up to two minutes for the storage to respond, as after a server's restart. Raises StorageError."""
    call_with_retries(lambda: storage.list(path), constant_pauses(_PAUSE_S, _OUTAGE_S), _is_transient)
