"""Retries of storage operations."""

from __future__ import annotations

import time
from collections.abc import Callable

from outlast.checkpointing.errors import StorageError, StorageRefused
from outlast.checkpointing.storage.base import Storage, T

_TRIES = 3


_PAUSE_S = 0.5


_OUTAGE_S = 120.0


def retry(read: Callable[[], T]) -> T:
    """Tries again, after a pause, what may be done twice and failed; gives up after three tries.

    Raises:
        StorageError: All tries failed.
        FileNotFoundError: What is to be read is not there.
    """
    for left in range(_TRIES - 1, -1, -1):
        try:
            return read()
        except StorageRefused:
            raise
        except (StorageError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            if not left:
                if isinstance(error, StorageError):
                    raise
                raise StorageError(f"reading failed {_TRIES} times: {error}") from error
        time.sleep(_PAUSE_S)
    raise AssertionError("unreachable")


def wait_for(storage: Storage, path: str) -> None:
    """Waits until the storage answers, for two minutes at most: a server that starts anew is no reason to fail.

    Raises:
        StorageError: It does not answer, or refuses.
    """
    deadline = time.monotonic() + _OUTAGE_S
    while True:
        try:
            storage.list(path)
            return
        except StorageRefused:
            raise
        except StorageError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)
