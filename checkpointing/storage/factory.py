"""Storage by URL: `open_storage` picks the backend."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage


def open_storage(url: str) -> Storage:
    """The storage that `url` names: a local path, `file://…`, or an object store such as `s3://bucket/prefix`.

    Raises:
        ConfigError: The scheme is not known, or the URL carries credentials.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return LocalStorage(Path(parts.path if parts.scheme else url))
    from outlast.checkpointing.storage.object_store import (
        ObjectStorage,  # brings pyarrow, which a local run's listing does without
    )

    return ObjectStorage(url)
