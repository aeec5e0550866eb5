"""Storage: put, open, list, delete, and nothing else.

The checkpoint protocol needs only these four, with two guarantees: a `put` is atomic (a reader sees all of it or
nothing) and durable when it returns, and a `list` that begins after a `put` has returned shows it. Object stores give
both by nature; `LocalStorage` earns them with temporary name, fsync, rename and directory fsync, on local disks and on
NFS. Nothing here locks, and nothing needs a conditional put.

A missing file is a `FileNotFoundError`, because absence is proof; anything else that goes wrong is a `StorageError`,
because a disk that does not answer proves nothing about what is on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from outlast.checkpointing.errors import StorageError, StorageRefused

Buffer = bytes | memoryview
T = TypeVar("T")
_TRIES = 3
_PAUSE_S = 0.5
_OUTAGE_S = 120.0
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory. `num_bytes` is None for a directory."""

    name: str
    num_bytes: int | None


class Storage(Protocol):
    """A place for runs. Paths are relative to `url` and use `/`."""

    @property
    def url(self) -> str:
        """What a user would write to name this place."""

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        """Writes the chunks, one after the other, as the file `path`, creating directories and replacing what is
        there. Durable and visible as a whole when it returns; when `chunks` raises, nothing appears.

        Raises:
            StorageError: The write failed.
        """

    def open(self, path: str) -> BinaryIO:
        """The file `path`, for reading and seeking.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: The read failed.
        """

    def list(self, path: str) -> list[Entry]:
        """The names directly under the directory `path`, sorted; empty when there is none.

        Raises:
            StorageError: The listing failed.
        """

    def delete(self, path: str) -> None:
        """Removes the file `path`; a missing one is fine. Directories are not kept once they are empty.

        Raises:
            StorageError: The deletion failed.
        """


def open_storage(url: str) -> Storage:
    """The storage that `url` names: a local path, `file://…`, or an object store such as `s3://bucket/prefix`.

    Raises:
        ConfigError: The scheme is not known, or the URL carries credentials.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return LocalStorage(Path(parts.path if parts.scheme else url))
    from outlast.checkpointing.storage.object_store import (
        ObjectStorage,  # brings pyarrow, which a local run's listing does without
    )

    return ObjectStorage(url)


def read_bytes(storage: Storage, path: str) -> bytes:
    """The whole file. Raises as `Storage.open`."""
    with storage.open(path) as file:
        return file.read()


def walk(storage: Storage, path: str) -> Iterator[Entry]:
    """Every file below `path`, however deep, named relative to it."""
    for entry in storage.list(path):
        if entry.num_bytes is not None:
            yield entry
        else:
            for inner in walk(storage, f"{path}/{entry.name}".lstrip("/")):
                yield Entry(f"{entry.name}/{inner.name}", inner.num_bytes)


def patiently(read: Callable[[], T]) -> T:
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


class LocalStorage:
    """A directory on a local disk or a shared file system (NFS, Lustre, a bind mount)."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()

    @property
    def url(self) -> str:
        return str(self._root)

    def path(self, path: str) -> Path:
        """Where `path` lies on this machine."""
        return self._root / path

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        target = self.path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with _explained("write", target):
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
        """Makes what others wrote below the directory `path` durable: each file, then its directory, from below.

        Raises:
            StorageError: The disk failed.
        """
        target = self.path(path)
        with _explained("sync", target):
            for folder, _, names in os.walk(target, topdown=False, onerror=_raise):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _sync(target.parent)

    def open(self, path: str) -> BinaryIO:
        target = self.path(path)
        with _explained("read", target):
            return open(target, "rb")

    def list(self, path: str) -> list[Entry]:
        target = self.path(path)
        with _explained("list", target):
            try:
                with os.scandir(target) as found:
                    entries = [_entry(item) for item in found if not item.name.endswith(".tmp")]
            except FileNotFoundError:
                return []
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.name)

    def delete(self, path: str) -> None:
        target = self.path(path)
        with _explained("delete", target):
            target.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                _sync(target.parent)  # so that deletions become durable in their order
            for parent in target.parents:
                if parent == self._root or not parent.is_relative_to(self._root):
                    break
                try:
                    _remove_litter(parent)
                    parent.rmdir()
                except OSError:  # not empty, or somebody else was quicker
                    break


def _entry(item: os.DirEntry[str]) -> Entry | None:
    """The entry, or None for a file that was deleted since its name was read."""
    try:
        return Entry(item.name, None if item.is_dir() else item.stat().st_size)
    except FileNotFoundError:
        return None


def _write_all(fd: int, view: memoryview) -> None:
    view = view.cast("B") if view.nbytes else view[:0]
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _make_dirs(path: Path) -> None:
    """mkdir -p whose every new directory survives a power cut."""
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


def _remove_litter(directory: Path) -> None:
    """Drops what killed writers left, if nothing else is there: a directory of litter counts as empty."""
    names = os.listdir(directory)
    if all(name.startswith(".") and name.endswith(".tmp") for name in names):
        for name in names:
            (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(verb: str, target: Path) -> Iterator[None]:
    """Turns an OSError into a StorageError that says what to do; lets absence through as it is when reading."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise
        reason = f"cannot {verb} {target}: {os.strerror(error.errno) if error.errno else error}"
        if error.errno not in _REFUSALS:
            raise StorageError(reason, hint="check the disk or the mount, then run the same command again") from error
        raise StorageRefused(reason, hint=_REFUSAL_HINTS.get(error.errno, _ACCESS_HINT)) from error


_ACCESS_HINT = "give this user write access or set checkpoint.storage to another place, then run the same command again"
_REFUSAL_HINTS = {
    errno.ENOSPC: "free some space (`outlast checkpoints ls RUN` shows sizes), then run the same command again",
    errno.EDQUOT: "free some space or raise the quota, then run the same command again",
    errno.ENOTDIR: "a file stands where a directory is needed: move it or set checkpoint.storage to another place",
}
