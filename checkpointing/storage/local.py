"""Storage on a local or shared file system: fsync and rename make writes atomic and durable.

Concurrent writers of other hosts are expected. A file never appears in part, and nothing here takes a lock.

The root and the names directly in it, which are runs, may be links. Below them no link is followed, to read, write or
delete, and only regular files are opened: a run may come from anywhere.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

from outlast.checkpointing.errors import NotAFileError, StorageError, StorageRefused
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.regular_files import SpecialFileError, open_regular, special_kind
from outlast.checkpointing.storage.retry import call_with_retries

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
#: Of a small file whose directory was deleted meanwhile.
_NUM_REPEATS = 20
#: Of `put`; outlast wrote no others that end alike.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class LocalStorage:
    """A directory on a local disk or a shared file system (NFS, Lustre, a bind mount).

    Args:
        root: The directory. It need not exist.
        follow_links: Follow links everywhere, and allow `..`: for files that the user names, never for a run.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self._root, self._follows = root.expanduser().absolute(), follow_links

    @property
    def url(self) -> str:
        return str(self._root)

    def path(self, path: str) -> Path:
        """Return where a file or directory lies. Raises NotAFileError if the way there leads through a link."""
        if fault := self._fault_on_way(path):
            raise NotAFileError(fault, hint=_LINK_HINT)
        return self._root / path

    def _fault_on_way(self, path: str) -> str:
        """Return why a path is not used; empty if it is. The caller checks its last name."""
        parts = path.split("/") if path else []
        if self._follows:
            return ""
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            return f"{path!r} is not a path below {self._root}"
        folders = (self._root.joinpath(*parts[:end]) for end in range(2, len(parts)))  # the first may be a link
        with _storage_errors("list", self._root):
            return next((_link_fault(folder) for folder in folders if folder.is_symlink()), "")

    def _is_link_allowed(self, path: str) -> bool:
        return self._follows or "/" not in path

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        target = self.path(path)
        # A deletion of the only file in a directory takes the directory along, and what is being written there.
        pauses_s = repeat(0.0, _NUM_REPEATS) if isinstance(chunks, Sequence) else ()
        with _storage_errors("write", target):
            call_with_retries(
                lambda: _write(target, chunks), pauses_s, lambda error: isinstance(error, FileNotFoundError)
            )

    def sync(self, path: str) -> None:
        """Make files that other programs wrote below a directory durable, bottom up. Raises StorageError."""
        target = self.path(path)
        with _storage_errors("sync", target):
            for folder, _, names in os.walk(target, topdown=False, onerror=_raise):
                for path_of_file in (Path(folder, name) for name in names):
                    with open_regular(path_of_file, follow=False) as file:
                        os.fsync(file.fileno())
                _sync(Path(folder))
            _sync(target.parent)

    def open(self, path: str) -> BinaryIO:
        target, fault = self._root / path, self._fault_on_way(path)
        try:
            with _storage_errors("read", target):
                if not fault:
                    return open_regular(target, follow=self._is_link_allowed(path))
        except SpecialFileError as error:
            fault = f"{target} is {error.kind}, not a file"
        raise NotAFileError(fault, hint=_LINK_HINT)  # no committed file was one: that is proof, not a failure

    def list(self, path: str) -> list[Entry]:
        target = self.path(path)
        follow = self._follows or not path
        with _storage_errors("list", target):
            if target.is_symlink() and not self._is_link_allowed(path):
                raise NotAFileError(_link_fault(target), hint=_LINK_HINT)
            try:
                with os.scandir(target) as items:
                    entries = [_entry(item, follow) for item in items if not item.name.endswith(".tmp")]
            except FileNotFoundError:
                return []
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.name)

    def delete(self, path: str) -> None:
        target = self.path(path)
        with _storage_errors("delete", target):
            _refuse_special(target)
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


def _link_fault(path: Path) -> str:
    return f"{path} is a symbolic link, and outlast follows none inside a run"


def _refuse_special(path: Path) -> None:
    """Raise NotAFileError if something that outlast never writes has this name."""
    with contextlib.suppress(FileNotFoundError):
        if kind := special_kind(path.lstat().st_mode):
            raise NotAFileError(f"{path} is {kind}, which outlast did not write: it stays", hint=_LINK_HINT)


def _entry(item: os.DirEntry[str], follow: bool) -> Entry | None:
    """Return the entry, without a size also for a link that leads nowhere; None for a file that was deleted."""
    try:
        if item.is_dir(follow_symlinks=follow):
            return Entry(item.name, None)
        found = item.stat(follow_symlinks=follow)
    except OSError as error:
        is_lost = isinstance(error, FileNotFoundError) and not item.is_symlink()
        return None if is_lost else Entry(item.name, None)
    return Entry(item.name, found.st_size, special_kind(found.st_mode))


def _write(target: Path, chunks: Iterable[Buffer]) -> None:
    """Write a file, atomically and durably."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    _make_dirs(target.parent)
    _refuse_special(target)
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
    with os.scandir(directory) as items:
        names = [item.name for item in items if item.is_file(follow_symlinks=False) and _TEMPORARY.fullmatch(item.name)]
    if len(names) == len(os.listdir(directory)):
        for name in names:
            (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _storage_errors(verb: str, target: Path) -> Iterator[None]:
    """Convert an OSError into a StorageError with a hint; when reading, let FileNotFoundError pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | SpecialFileError) and verb == "read":
            raise
        reason = f"cannot {verb} {target}: {os.strerror(error.errno) if error.errno else error}"
        if verb in ("read", "list") and _is_something_else(target, error):
            raise NotAFileError(reason, hint=_REFUSAL_HINTS.get(error.errno or 0, _SOMETHING_ELSE_HINT)) from error
        if error.errno not in _REFUSALS:
            raise StorageError(reason, hint="check the disk or the mount, then run the same command again") from error
        raise StorageRefused(reason, hint=_REFUSAL_HINTS.get(error.errno, _ACCESS_HINT)) from error


_LINK_HINT = "remove it, or put the files themselves in its place; the run's own directory may be a link"


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
