"""Cleanup of multipart uploads that a killed writer left behind. No listing shows them, and the store bills them.

pyarrow cannot see them, so this needs boto3 (the extra `s3`). Without it, and on stores other than S3, nothing happens;
a lifecycle rule of the bucket that aborts incomplete uploads has the same effect later.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage


def abort_uploads(storage: Storage, directory: str, is_orphan: Callable[[str], bool] = lambda path: True) -> int:
    """Abort the unfinished uploads below `directory` for which `is_orphan(path below it)` holds; return their number.

    Raises StorageError when the store refuses or does not respond.
    """
    if isinstance(storage, LocalStorage):
        return 0
    from outlast.checkpointing.storage.object_store import (
        ObjectStorage,
    )  # imports pyarrow, which local runs do not need

    location = storage.s3 if isinstance(storage, ObjectStorage) else None
    if location is None:
        return 0
    try:
        import boto3  # noqa: F401
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return 0
    prefix = f"{location.prefix}{directory}/"
    count = 0
    try:
        client = _client(location.region, location.endpoint)
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=location.bucket, Prefix=prefix)
        for upload in (upload for page in pages for upload in page.get("Uploads", ())):
            if is_orphan(upload["Key"].removeprefix(prefix)):
                with suppress(client.exceptions.NoSuchUpload):  # its writer has finished or aborted it
                    client.abort_multipart_upload(
                        Bucket=location.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                count += 1
    except (BotoCoreError, ClientError) as error:
        raise StorageError(
            f"cannot abort unfinished uploads below {storage.url}/{directory}: {error}",
            hint="let the credentials list and abort multi-part uploads, or give the bucket a lifecycle rule that does",
        ) from error
    return count


@cache
def _client(region: str, endpoint: str | None) -> Any:
    """Make a client. Clients are thread-safe, sessions are not, so each has its own."""
    import boto3
    from botocore.config import Config

    addressing = "path" if endpoint else "auto"  # as pyarrow does with a custom endpoint
    config = Config(s3={"addressing_style": addressing}, retries={"mode": "standard"})
    return boto3.Session().client("s3", region_name=region, endpoint_url=endpoint, config=config)
