"""Files of unknown origin: opened only if they are regular ones.

A named pipe blocks its reader, a device may be endless, and either can lie under any name. A link may lead anywhere.
"""

import errno
import os
import stat
from typing import BinaryIO

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
