"""Local cache of prepared data from an object store: one copy per machine for all its workers, of bounded size.

Copies are verified at each use, so any of them may be deleted at any time; a mapped one stays readable until its
readers end. The least recently used are evicted first. Only this user may write to the directory, and nothing in it is
deleted that is not a copy by its name.
"""

import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from outlast.checkpointing.errors import ConfigError, DamagedError, NotAFileError, PreflightError
from outlast.checkpointing.format.manifest import BLOCK_BYTES, Digester, FileEntry
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage

DEFAULT_LIMIT = "50"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
#: A copy used within this time may be about to be mapped.
_FRESH_S = 600.0


def cache_dir() -> Path:
    """Return the directory of the copies, in `$OUTLAST_CACHE` or `~/.cache/outlast`."""
    return Path(os.environ.get("OUTLAST_CACHE", "~/.cache/outlast")).expanduser() / "data"


def make_private_directory(path: Path) -> Path:
    """Make a directory with mode 0700, or check an existing one: it belongs to this user, and no other may write to it.

    Raises PreflightError otherwise.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found, named = path.stat(), path.lstat()
    except OSError as error:
        message = f"the directory {path} cannot be made: {error.strerror}"
        raise PreflightError(message, hint="set OUTLAST_CACHE to a writable directory") from error
    if {found.st_uid, named.st_uid} != {os.geteuid()}:
        raise PreflightError(f"{path} belongs to another user", hint="set OUTLAST_CACHE to a directory of your own")
    if not stat.S_ISDIR(found.st_mode):
        raise PreflightError(f"{path} is not a directory", hint="set OUTLAST_CACHE to a directory of your own")
    if found.st_mode & stat.S_IWOTH:
        message = f"every user may write to {path}: its mode is {stat.S_IMODE(found.st_mode):04o}"
        raise PreflightError(message, hint=f"chmod 700 {path}, after a look at what it holds; or set OUTLAST_CACHE")
    if found.st_mode & stat.S_IWGRP:  # earlier releases left that to the umask
        path.chmod(0o700)
    return path


def limit_bytes() -> int:
    """Return how many bytes all copies may take: `$OUTLAST_CACHE_GB`, or 50 GB; a wrong value is a ConfigError."""
    limit = os.environ.get("OUTLAST_CACHE_GB", DEFAULT_LIMIT)
    try:
        return int(float(limit) * 10**9)
    except ValueError:
        hint = "set it to a number of gigabytes, such as 50"
        raise ConfigError(f"OUTLAST_CACHE_GB is {limit!r}, not a number", hint=hint) from None


def local_copy(storage: Storage, directory: str, fingerprint: str, entry: FileEntry) -> Path:
    """Return the path of this machine's verified copy of a file of prepared data; it is fetched if there is none.

    Raises:
        DamagedError: The file in the storage was damaged after preparation.
        StorageError: The file cannot be read, or the copy cannot be written.
    """
    root = make_private_directory(cache_dir())
    # From the directory above: no link is followed below the name of the cache.
    cache, lock = LocalStorage(root.parent), root / f"{fingerprint}.lock"
    path = f"{root.name}/{fingerprint}/{entry.path}"
    with _locked(lock, fcntl.LOCK_SH):  # the workers of a machine verify concurrently
        if _is_whole(root, fingerprint, entry):
            return cache.path(path)
    with _locked(lock, fcntl.LOCK_EX):  # one of them fetches, the others wait for it
        if not _is_whole(root, fingerprint, entry):
            evict(root, limit_bytes() - entry.num_bytes, spared=fingerprint)
            cache.put(path, verified_chunks(storage, directory, entry))
    return cache.path(path)


def _is_whole(root: Path, fingerprint: str, entry: FileEntry) -> bool:
    """Check that the copy is undamaged, and mark it as used now."""
    try:
        os.utime(root / fingerprint, follow_symlinks=False)
        for _ in verified_chunks(LocalStorage(root.parent), f"{root.name}/{fingerprint}", entry):
            pass
    except (FileNotFoundError, NotAFileError, DamagedError):
        return False
    return True


def verified_chunks(storage: Storage, directory: str, entry: FileEntry) -> Iterator[bytes]:
    """Read the file's bytes. Raises DamagedError after the last chunk if the digest does not match."""
    digester = Digester()
    with storage.open(f"{directory}/{entry.path}") as file:
        for chunk in iter(partial(file.read, BLOCK_BYTES), b""):
            digester.update(chunk)
            yield chunk
    if digester.entry(entry.path) != entry:
        raise DamagedError(f"{directory}/{entry.path}: bytes changed since the data was prepared")


def evict(root: Path, limit: int, *, spared: str) -> None:
    """Remove the least recently used copies but `spared`, until the rest takes `limit` bytes or all of it is in use."""
    with _locked(root / "evict.lock", fcntl.LOCK_EX):
        copies: list[tuple[float, Path, int]] = []
        for path in root.iterdir():
            with suppress(OSError):  # another process is writing it
                if _FINGERPRINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    copies.append((path.stat().st_mtime, path, size))
        num_bytes = sum(size for _, _, size in copies)
        for used_at, path, size in sorted(copies):
            if num_bytes <= limit or time.time() - used_at < _FRESH_S:
                return
            if path.name != spared:
                shutil.rmtree(path, ignore_errors=True)
                num_bytes -= size


@contextmanager
def _locked(lock: Path, mode: int) -> Iterator[None]:
    """Hold a file lock of this machine, exclusive or shared; the kernel releases it when the process ends."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(fd, mode)
        yield
    finally:
        os.close(fd)
