"""Storage: put, open, list, delete, and nothing else.

The checkpoint protocol needs only these four, with two guarantees: a `put` is atomic (a reader sees all of it or
nothing) and durable when it returns, and a `list` that begins after a `put` has returned shows it. Object stores give
both by nature; `LocalStorage` earns them with temporary name, fsync, rename and directory fsync, on local disks and on
NFS. Nothing here locks, and nothing needs a conditional put.

A missing file is a `FileNotFoundError`, because absence is proof; anything else that goes wrong is a `StorageError`,
because a disk that does not answer proves nothing about what is on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar

Buffer = bytes | memoryview
T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory. `num_bytes` is None for a directory."""

    name: str
    num_bytes: int | None


class ReadableStorage(Protocol):
    """A place whose files can be listed and read."""

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


class Storage(ReadableStorage, Protocol):
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

    def delete(self, path: str) -> None:
        """Removes the file `path`; a missing one is fine. Directories are not kept once they are empty.

        Raises:
            StorageError: The deletion failed.
        """


def read_bytes(storage: ReadableStorage, path: str) -> bytes:
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
