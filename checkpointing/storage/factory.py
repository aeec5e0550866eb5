"""Choice of the storage backend for a path or a URL, and the one parser of both.

A path is taken as it is. A URL is a scheme and `://`; whatever would have to be guessed is refused.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage

#: A path or a URL, as a user gives it.
Location = str | os.PathLike[str]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
#: Schemes without both slashes, which no directory is called by intention; a path after `:/` is a typing error too.
_HALF_A_URL = re.compile(
    r"(file|s3|gs|gcs|hdfs|abfss?|https?):(/?)(.*)|(\w{2,}):(/)(?!/)(.*)", re.IGNORECASE | re.DOTALL
)


def parse_location(location: Location) -> Path | str:
    """Return the path of a local location, with `~` expanded, or the URL of another one, its scheme in lower case.

    Raises:
        ConfigError: It is neither, such as `file://./runs`, whose `.` would be a host.
    """
    if not isinstance(location, str | os.PathLike):
        raise ConfigError(f"{location!r} is neither a path nor a URL", hint="name a directory, or s3://bucket/prefix")
    if not isinstance(location, str):
        return _path(os.fsdecode(os.fspath(location)))
    text = location
    if not (match := _URL.fullmatch(text)):
        if half := _HALF_A_URL.fullmatch(text):
            scheme, slash, rest = half.groups()[:3] if half[1] else half.groups()[3:]
            meant = slash + rest if scheme.lower() == "file" else f"{scheme.lower()}://{rest}"
            hint = f"write {meant}, or ./{text} for a directory of that name"
            raise ConfigError(f"{text} is neither a path nor a URL; did you mean {meant}?", hint=hint)
        return _path(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme != "file":
        return f"{scheme}://{rest}"
    host, slash, path = rest.partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        written = host.rpartition("@")[2]
        raise ConfigError(
            f"file://{written}{slash}{path} names a file on the host {written!r}, not a path",
            hint=f"write the path alone, such as {written}{slash}{path}, or file:/// and an absolute path",
        )
    return _path(unquote(slash + path))


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is not a path", hint="name a directory, or s3://bucket/prefix")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text}: {error}", hint="write the absolute path") from error


def open_storage(location: Location) -> Storage:
    """Open a local path, a `file://` URL, or an object store such as `s3://bucket/prefix`.

    Raises:
        ConfigError: It is neither a path nor a URL, the scheme is unknown, or the URL contains credentials.
    """
    parsed = parse_location(location)
    if isinstance(parsed, Path):
        return LocalStorage(parsed)
    # Imports pyarrow, which commands on local storage do not need.
    from outlast.checkpointing.storage.object_store import ObjectStorage

    return ObjectStorage(parsed)


def as_storage(storage: Storage | Location) -> Storage:
    """Return a storage as it is, or open a location."""
    return open_storage(storage) if isinstance(storage, str | os.PathLike) else storage
