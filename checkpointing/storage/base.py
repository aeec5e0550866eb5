"""The storage interface: put, open, list and delete.

The checkpoint protocol needs only these four, with two guarantees: a `put` is atomic (a reader sees all of it or
nothing) and durable when it returns, and a `list` that begins after a `put` has returned shows it. Object stores give
both by design, `LocalStorage` by temporary name, fsync and rename. No locks and no conditional puts are needed.

A missing file is a `FileNotFoundError`, because absence is proof. Any other failure is a `StorageError`, because a disk
that does not respond proves nothing about its content.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol, TypeVar

from outlast.checkpointing.errors import DamagedError, NotAFileError
from outlast.checkpointing.json_input import parse_json

Buffer = bytes | memoryview
T = TypeVar("T")
_MAX_BYTES = 2**29


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory. `num_bytes` is None for a directory, and for what cannot be looked at.

    `special` is what else the entry is, such as `a named pipe`: outlast neither reads nor deletes it. Empty for files
    and directories.
    """

    name: str
    num_bytes: int | None
    special: str = ""


class ReadableStorage(Protocol):
    """Storage that can be listed and read."""

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading and seeking.

        Raises FileNotFoundError, NotAFileError if it is a link or anything else than a file, and StorageError.
        """

    def list(self, path: str) -> list[Entry]:
        """List the names directly under a directory, sorted; empty if it does not exist. Raises StorageError."""


class Storage(ReadableStorage, Protocol):
    """Storage for runs. Paths are relative to `url` and use `/`."""

    @property
    def url(self) -> str:
        """The storage root as a user writes it."""

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        """Write the concatenated chunks as a file, creating directories and replacing an existing file.

        The file is durable and visible when this returns; when `chunks` raises, nothing appears. Raises StorageError.
        """

    def delete(self, path: str) -> None:
        """Delete a file if it exists, and directories that become empty. Raises StorageError."""


def read_bytes(storage: ReadableStorage, path: str) -> bytes:
    """Read a file that is not weights. Raises as `Storage.open`, and DamagedError if it has more than 512 MiB."""
    with storage.open(path) as file:
        if (num_bytes := file.seek(0, os.SEEK_END)) > _MAX_BYTES:
            raise DamagedError(f"{path} has {num_bytes:,} bytes, more than any file of its kind")
        file.seek(0)
        return file.read()


def read_object(storage: ReadableStorage, path: str) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, damaged or no object. Raises StorageError."""
    try:
        body = parse_json(read_bytes(storage, path))
    except (FileNotFoundError, DamagedError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def list_directories(storage: ReadableStorage, path: str) -> list[str]:
    """List the names of the directories directly under `path`, sorted. Raises StorageError."""
    return [entry.name for entry in storage.list(path) if entry.num_bytes is None]


def walk(storage: Storage, path: str, *, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Entry]:
    """Yield every file below `path`, recursively, named relative to it.

    Directories whose names are to be skipped, and links that lead nowhere, are yielded instead of their content.
    """
    for entry in storage.list(path):
        if entry.num_bytes is not None or skip(entry.name):
            yield entry
            continue
        try:
            inside = list(walk(storage, f"{path}/{entry.name}".lstrip("/"), skip=skip))
        except NotAFileError:
            yield entry
            continue
        for inner in inside:
            yield replace(inner, name=f"{entry.name}/{inner.name}")
