"""Multi-part uploads that a killed writer began and nobody will end. No listing shows them, and the store bills them.

pyarrow cannot see them, so this takes boto3 (the extra `s3`). Without it, and on stores that are not S3, nothing is
done here; a lifecycle rule of the bucket that aborts incomplete uploads does the same, only later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage


def abort_uploads(storage: Storage, directory: str, is_orphan: Callable[[str], bool] = lambda path: True) -> int:
    """Aborts the unfinished uploads below `directory`, and returns how many that were.

    Args:
        storage: The storage.
        directory: Relative to its root.
        is_orphan: Whether the upload of a file is to be aborted, by its path below `directory`.

    Raises:
        StorageError: The store refused or did not answer.
    """
    if isinstance(storage, LocalStorage):
        return 0
    from outlast.checkpointing.storage.object_store import (
        ObjectStorage,  # brings pyarrow, which a local run does without
    )

    place = storage.s3 if isinstance(storage, ObjectStorage) else None
    if place is None:
        return 0
    try:
        import boto3  # noqa: F401
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return 0
    prefix = f"{place.prefix}{directory}/"
    count = 0
    try:
        client = _client(place.region, place.endpoint)
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=place.bucket, Prefix=prefix)
        for upload in (upload for page in pages for upload in page.get("Uploads", ())):
            if is_orphan(upload["Key"].removeprefix(prefix)):
                with suppress(client.exceptions.NoSuchUpload):  # its writer was faster
                    client.abort_multipart_upload(Bucket=place.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                count += 1
    except (BotoCoreError, ClientError) as error:
        raise StorageError(
            f"cannot abort unfinished uploads below {storage.url}/{directory}: {error}",
            hint="let the credentials list and abort multi-part uploads, or give the bucket a lifecycle rule that does",
        ) from error
    return count


@cache
def _client(region: str, endpoint: str | None) -> Any:
    """A client is safe for several threads; the session that makes it is not, so each has its own."""
    import boto3
    from botocore.config import Config

    addressing = "path" if endpoint else "auto"  # as pyarrow does with an endpoint of one's own
    config = Config(s3={"addressing_style": addressing}, retries={"mode": "standard"})
    return boto3.Session().client("s3", region_name=region, endpoint_url=endpoint, config=config)
