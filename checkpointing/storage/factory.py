"""Choice of the storage backend for a URL."""

from pathlib import Path
from urllib.parse import urlsplit

from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage


def open_storage(url: str) -> Storage:
    """Open a local path, a `file://` URL, or an object store such as `s3://bucket/prefix`.

    Raises:
        ConfigError: The scheme is unknown, or the URL contains credentials.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return LocalStorage(Path(parts.path if parts.scheme else url))
    # Imports pyarrow, which commands on local storage do not need.
    from outlast.checkpointing.storage.object_store import ObjectStorage

    return ObjectStorage(url)
