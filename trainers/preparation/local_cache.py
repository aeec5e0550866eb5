"""This machine's copies of prepared data that lies in an object store: made once for all its workers, and bounded.

A copy is used by name and verified, so any of them may go at any time; one that is mapped stays readable until its
readers have ended. Those that were not used for longest go first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.format.manifest import BLOCK_BYTES, Digester, FileEntry
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage

DEFAULT_LIMIT = "50"
#: One that was used so lately may be about to be mapped.
_FRESH_S = 600.0


def cache_dir() -> Path:
    """Where the copies lie: `$OUTLAST_CACHE`, or `~/.cache/outlast`."""
    return Path(os.environ.get("OUTLAST_CACHE", "~/.cache/outlast")).expanduser() / "data"


def limit_bytes() -> int:
    """How much all copies together may take: `$OUTLAST_CACHE_GB`, or 50 GB.

    Raises:
        ConfigError: That is no number.
    """
    said = os.environ.get("OUTLAST_CACHE_GB", DEFAULT_LIMIT)
    try:
        return int(float(said) * 10**9)
    except ValueError:
        raise ConfigError(f"OUTLAST_CACHE_GB is {said!r}, which is no number", hint="set it to gigabytes") from None


def local_copy(storage: Storage, directory: str, fingerprint: str, entry: FileEntry) -> Path:
    """Where this machine has a whole copy of a file of prepared data; it is fetched if there is none.

    Args:
        storage: Where the data lies.
        directory: Its directory there.
        fingerprint: Names it.
        entry: The file.

    Raises:
        DamagedError: The file in the storage is not what was prepared.
        StorageError: It could not be read, or the copy not written.
    """
    root = cache_dir()
    cache, path, lock = LocalStorage(root), f"{fingerprint}/{entry.path}", root / f"{fingerprint}.lock"
    with _locked(lock, fcntl.LOCK_SH):  # the workers of a machine verify side by side
        if _is_whole(root, fingerprint, entry):
            return cache.path(path)
    with _locked(lock, fcntl.LOCK_EX):  # one of them fetches, the others wait for it
        if not _is_whole(root, fingerprint, entry):
            evict(root, limit_bytes() - entry.num_bytes, spared=fingerprint)
            cache.put(path, verified_chunks(storage, directory, entry))
    return cache.path(path)


def _is_whole(root: Path, fingerprint: str, entry: FileEntry) -> bool:
    """Whether the copy is what was prepared. From now on it counts as just used."""
    try:
        os.utime(root / fingerprint)
        for _ in verified_chunks(LocalStorage(root), fingerprint, entry):
            pass
    except (FileNotFoundError, DamagedError):
        return False
    return True


def verified_chunks(storage: Storage, directory: str, entry: FileEntry) -> Iterator[bytes]:
    """The file's bytes. Raises DamagedError after the last of them if they are not what was written."""
    digester = Digester()
    with storage.open(f"{directory}/{entry.path}") as file:
        for chunk in iter(partial(file.read, BLOCK_BYTES), b""):
            digester.update(chunk)
            yield chunk
    if digester.entry(entry.path) != entry:
        raise DamagedError(f"{directory}/{entry.path}: bytes changed since the data was prepared")


def evict(root: Path, limit: int, *, spared: str) -> None:
    """Removes what was not used for longest, until the rest takes `limit` bytes or everything left is in use.

    Args:
        root: The cache.
        limit: Bytes that may stay.
        spared: The directory that must stay.
    """
    with _locked(root / "evict.lock", fcntl.LOCK_EX):
        found: list[tuple[float, Path, int]] = []
        for path in root.iterdir():
            with suppress(OSError):  # it is being written
                if path.is_dir():
                    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    found.append((path.stat().st_mtime, path, size))
        left = sum(size for _, _, size in found)
        for used_at, path, size in sorted(found):
            if left <= limit or time.time() - used_at < _FRESH_S:
                return
            if path.name != spared:
                shutil.rmtree(path, ignore_errors=True)
                left -= size


@contextmanager
def _locked(lock: Path, how: int) -> Iterator[None]:
    """Holds a lock of this machine, alone or beside other readers; it goes with its process."""
    with suppress(FileExistsError):
        lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, how)
        yield
