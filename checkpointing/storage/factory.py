"""Choice of the storage backend for a path or a URL."""

import os
from pathlib import Path

from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.location import Location, parse_location


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
