"""Storage on a local or shared file system: fsync and rename make writes atomic and durable.

Concurrent writers of other hosts are expected. A file never appears in part, and nothing here takes a lock.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from outlast.checkpointing.errors import NotAFileError, StorageError, StorageRefused
from outlast.checkpointing.storage.base import Buffer, Entry

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


class LocalStorage:
    """A directory on a local disk or a shared file system (NFS, Lustre, a bind mount)."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()

    @property
    def url(self) -> str:
        return str(self._root)

    def path(self, path: str) -> Path:
        return self._root / path

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        target = self.path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with _storage_errors("write", target):
            _make_dirs(target.parent)
            try:
                with open(temporary, "xb", buffering=0) as file:
                    for chunk in chunks:
                        _write_all(file.fileno(), memoryview(chunk))
                        del chunk  # the next one may need its memory
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            _sync(target.parent)

    def sync(self, path: str) -> None:
        """Make files that other programs wrote below a directory durable, bottom up. Raises StorageError."""
        target = self.path(path)
        with _storage_errors("sync", target):
            for folder, _, names in os.walk(target, topdown=False, onerror=_raise):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _sync(target.parent)

    def open(self, path: str) -> BinaryIO:
        target = self.path(path)
        with _storage_errors("read", target):
            return open(target, "rb")

    def list(self, path: str) -> list[Entry]:
        target = self.path(path)
        with _storage_errors("list", target):
            try:
                with os.scandir(target) as items:
                    entries = [_entry(item) for item in items if not item.name.endswith(".tmp")]
            except FileNotFoundError:
                return []
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.name)

    def delete(self, path: str) -> None:
        target = self.path(path)
        with _storage_errors("delete", target):
            target.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                _sync(target.parent)  # so that deletions become durable in their order
            for parent in target.parents:
                if parent == self._root or not parent.is_relative_to(self._root):
                    break
                try:
                    _remove_temporary_files(parent)
                    parent.rmdir()
                except OSError:  # not empty, or deleted by another process
                    break


def _entry(item: os.DirEntry[str]) -> Entry | None:
    """Return the entry, without a size also for a link that leads nowhere; None for a file that was deleted."""
    try:
        return Entry(item.name, None if item.is_dir() else item.stat().st_size)
    except OSError as error:
        is_lost = isinstance(error, FileNotFoundError) and not item.is_symlink()
        return None if is_lost else Entry(item.name, None)


def _write_all(fd: int, view: memoryview) -> None:
    view = view.cast("B") if view.nbytes else view[:0]
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _make_dirs(path: Path) -> None:
    if path.is_dir():
        return
    _make_dirs(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _raise(error: OSError) -> None:
    raise error


def _remove_temporary_files(directory: Path) -> None:
    """Delete the temporary files of killed writers if the directory contains nothing else."""
    names = os.listdir(directory)
    if all(name.startswith(".") and name.endswith(".tmp") for name in names):
        for name in names:
            (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _storage_errors(verb: str, target: Path) -> Iterator[None]:
    """Convert an OSError into a StorageError with a hint; when reading, let FileNotFoundError pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise
        reason = f"cannot {verb} {target}: {os.strerror(error.errno) if error.errno else error}"
        if verb in ("read", "list") and _is_something_else(target, error):
            raise NotAFileError(reason, hint=_REFUSAL_HINTS.get(error.errno or 0, _SOMETHING_ELSE_HINT)) from error
        if error.errno not in _REFUSALS:
            raise StorageError(reason, hint="check the disk or the mount, then run the same command again") from error
        raise StorageRefused(reason, hint=_REFUSAL_HINTS.get(error.errno, _ACCESS_HINT)) from error


def _is_something_else(target: Path, error: OSError) -> bool:
    """Return whether a read failed because of what has this name. A link loop far above may be a mount that failed."""
    if error.errno == errno.ELOOP:
        return target.is_symlink() or target.parent.is_symlink()
    return error.errno in (errno.EISDIR, errno.ENOTDIR)


_ACCESS_HINT = "give this user write access or set checkpoint.storage to another path, then run the same command again"
_SOMETHING_ELSE_HINT = "move it away: outlast did not write it; `outlast checkpoints verify RUN` shows what is intact"
_REFUSAL_HINTS = {
    errno.ENOSPC: "free some space (`outlast checkpoints ls RUN` shows sizes), then run the same command again",
    errno.EDQUOT: "free some space or raise the quota, then run the same command again",
    errno.ENOTDIR: "a file is where a directory is needed: move it or set checkpoint.storage to another path",
}
