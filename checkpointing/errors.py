"""Every error that outlast raises on purpose, in one tree.

    OutlastError                    exit code 1
    ├── ConfigError                 2   a setting is wrong, or differs from what the run was started with
    ├── PreflightError              3   the machine, the cluster or the storage cannot do what is asked
    ├── StorageError                1   the storage failed while in use
    │   └── StorageRefused          1   … and will go on failing until somebody acts (full, read-only, no permission)
    ├── DamagedError                5   bytes differ from what was committed
    └── NoCheckpointError           5   commits exist, and none of them is whole

A message says what happened and where; `hint` is the next command or step. Losing a race is not an error: see
`run_store/catalog.py` for "superseded". Errors cross process borders, so each one pickles with its fields.
"""

from __future__ import annotations

from typing import ClassVar


class OutlastError(Exception):
    """Base of the tree.

    Args:
        message: What happened and where (rank, step, path).
        hint: What to do next, best of all a command.
    """

    exit_code: ClassVar[int] = 1
    #: True where trying again on the same machines cannot help.
    permanent: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[OutlastError], message: str, hint: str) -> OutlastError:
    return kind(message, hint=hint)


class ConfigError(OutlastError, ValueError):
    """A setting is wrong, or differs from what the run was started with."""

    exit_code = 2
    permanent = True


class PreflightError(OutlastError):
    """The machine, the cluster or the storage cannot do what is asked."""

    exit_code = 3
    permanent = True


class StorageError(OutlastError):
    """The storage failed while in use; another try may succeed."""


class StorageRefused(StorageError):
    """The storage is full, read-only or forbids access: somebody must act first."""

    permanent = True


class DamagedError(OutlastError):
    """Bytes differ from what was committed. `message` lists every bad file of one checkpoint."""

    exit_code = 5
    permanent = True


class NoCheckpointError(OutlastError):
    """Commits exist, and none of them is whole. Never answered by starting from zero."""

    exit_code = 5
    permanent = True


def first_line(error: BaseException) -> str:
    """What an error of a library says in its first line of words, as part of a message; the name of one without any."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if any(map(str.isalnum, line))), type(error).__name__)[:300]
