"""Files of unknown origin: opened only if they are regular ones, and directories that no other user may change.

A named pipe blocks its reader, a device may be endless, and either can lie under any name. A link may lead anywhere.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from outlast.checkpointing.errors import ConfigError, PreflightError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}
#: Of a file that is read into memory and is small, such as a run file.
_SMALL_BYTES = 64 * 2**20


class SpecialFileError(OSError):
    """The path is neither a regular file nor a directory. `kind` is what it is, such as `a named pipe`."""

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(errno.EINVAL, f"is {kind}", os.fspath(path))
        self.kind = kind


def special_kind(mode: int) -> str:
    """Return what a file of this `st_mode` is; empty for regular files and directories."""
    return _KINDS.get(stat.S_IFMT(mode), "") if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) else ""


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading; with `follow`, the target of a link too. Never blocks.

    Raises SpecialFileError for anything else, and OSError.
    """

    def opener(name: str, flags: int) -> int:
        # Opening a device may have effects, so it is not tried; the second check is of what was opened.
        _check(name, os.stat(name, follow_symlinks=follow).st_mode)
        fd = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW))
        try:
            _check(name, os.fstat(fd).st_mode)
        except OSError:
            os.close(fd)
            raise
        return fd

    return open(path, "rb", opener=opener)


def _check(path: str, mode: int) -> None:
    if kind := special_kind(mode):
        raise SpecialFileError(path, kind)


def read_small_file(path: str | os.PathLike[str], *, follow: bool = True) -> bytes:
    """Read a regular file of at most 64 MiB, as `open_regular`. Raises OSError."""
    with open_regular(path, follow=follow) as file:
        data = file.read(_SMALL_BYTES + 1)
    if len(data) > _SMALL_BYTES:
        raise OSError(errno.EFBIG, f"has more than {_SMALL_BYTES >> 20} MiB", os.fspath(path))
    return data


def check_files_in(key: str, folder: Path) -> None:
    """Raise ConfigError if a directory that `key` names holds a named pipe, a device or a socket. Links may be used."""
    for path in sorted(folder.iterdir()):
        with suppress(OSError):  # a link that leads nowhere: whoever needs the file reports it
            if kind := special_kind(path.stat().st_mode):
                hint = "remove it, or name a copy of the directory"
                raise ConfigError(f"{key} {folder}: {path.name} is {kind}, not a file", hint=hint)


def make_private_directory(path: Path, setting: str) -> Path:
    """Make a directory with mode 0700, or check an existing one: it belongs to this user, and no other may write to it.

    Raises PreflightError otherwise; the hint names `setting`, the variable that chooses the directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found, named = path.stat(), path.lstat()
    except OSError as error:
        message = f"the directory {path} cannot be made: {error.strerror}"
        raise PreflightError(message, hint=f"set {setting} to a writable directory") from error
    if {found.st_uid, named.st_uid} != {os.geteuid()}:
        raise PreflightError(f"{path} belongs to another user", hint=f"set {setting} to a directory of your own")
    if not stat.S_ISDIR(found.st_mode):
        raise PreflightError(f"{path} is not a directory", hint=f"set {setting} to a directory of your own")
    if found.st_mode & stat.S_IWOTH:
        message = f"every user may write to {path}: its mode is {stat.S_IMODE(found.st_mode):04o}"
        raise PreflightError(message, hint=f"chmod 700 {path}, after a look at what it holds; or set {setting}")
    if found.st_mode & stat.S_IWGRP:  # earlier releases left that to the umask
        path.chmod(0o700)
    return path
