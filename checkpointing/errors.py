"""All errors that outlast raises on purpose, in one tree.

    OutlastError                    exit code 1
    ├── ConfigError                 2   a setting is wrong, or differs from what the run was started with
    ├── PreflightError              3   the machine, the cluster or the storage does not meet the run's needs
    ├── StorageError                1   the storage failed while in use
    │   └── StorageRefused          1   … until a person acts: it is full, read-only or forbids access
    │       └── NotAFileError       1   … because something else has the name: a directory, a link, a pipe
    ├── DamagedError                5   bytes differ from what was committed
    └── NoCheckpointError           5   commits exist, but none of them is intact

A message states what happened and where; `hint` is the next command or step. Being superseded is not an error, see
`run_store/catalog.py`. Errors cross process borders, so each one pickles with its fields. When an error is made,
credentials in both texts are redacted, and control characters escaped: a loop of the user may print them.
"""

from typing import ClassVar

from outlast.checkpointing.escaping import escaped_lines
from outlast.checkpointing.redaction import redact


class OutlastError(Exception):
    """Base of the tree: what happened and where (rank, step, path), and the next step or command as `hint`."""

    exit_code: ClassVar[int] = 1
    #: True where a retry on the same machines cannot help.
    permanent: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = escaped_lines(redact(message)), escaped_lines(redact(hint))
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls: type[OutlastError], message: str, hint: str) -> OutlastError:
    return cls(message, hint=hint)


class ConfigError(OutlastError, ValueError):
    """A setting is wrong, or differs from what the run was started with."""

    exit_code = 2
    permanent = True


class PreflightError(OutlastError):
    """The machine, the cluster or the storage does not meet the run's needs."""

    exit_code = 3
    permanent = True


class StorageError(OutlastError):
    """The storage failed while in use; a retry may succeed."""


class StorageRefused(StorageError):
    """The storage is full, read-only or forbids access: a retry cannot succeed."""

    permanent = True


class NotAFileError(StorageRefused):
    """Something else has the name of a file or a directory: it is not what was written there, which is proof."""


class DamagedError(OutlastError):
    """Bytes differ from what was committed. `message` lists every bad file of one checkpoint."""

    exit_code = 5
    permanent = True


class NoCheckpointError(OutlastError):
    """Commits exist, but none of them is intact. A run never restarts from step 0 because of it."""

    exit_code = 5
    permanent = True
