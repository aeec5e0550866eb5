"""Object stores through pyarrow.fs: S3 and what speaks it, and every other scheme that pyarrow knows.

A put is atomic by nature here: an object is invisible until its stream is closed. Two things need care. Closing
publishes whatever was written, also after an exception, so a large put whose chunks fail leaves a truncated object for
the moment that it takes to delete it again; nothing but a manifest makes a file count, and a manifest is one small
chunk. And a store has no directories: after its last file is deleted, a name may stay behind as an empty marker.

Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …) or from the machine's role,
never from a run file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from outlast.checkpointing.errors import ConfigError, StorageError, StorageRefused
from outlast.checkpointing.storage import Buffer, Entry

_HEAD_BYTES = 8 * 2**20
_REFUSALS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN")


class ObjectStorage:
    """A prefix in a bucket.

    Args:
        url: Such as `s3://bucket/runs`.

    Raises:
        ConfigError: pyarrow does not know the scheme, or the URL carries credentials.
    """

    def __init__(self, url: str) -> None:
        if urlsplit(url).username or urlsplit(url).password:
            raise ConfigError(
                f"storage {urlsplit(url).scheme}://…: a URL must not carry credentials",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
            )
        self._url = url.rstrip("/")
        try:
            self._fs, self._root = fs.FileSystem.from_uri(self._url)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise ConfigError(
                f"storage {url!r}: {error}", hint="set checkpoint.storage to a directory or to s3://bucket/prefix"
            ) from error

    @property
    def url(self) -> str:
        return self._url

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        target = self._path(path)
        rest = iter(chunks)
        head = list(_up_to(_HEAD_BYTES, rest))  # so that a small file whose chunks fail never touches the store
        with _explained("write", self._url, path):
            stream = self._fs.open_output_stream(target)
            try:
                for chunk in chain(head, rest):
                    stream.write(chunk)
            except BaseException:
                with contextlib.suppress(OSError):  # the first failure is the one to report
                    stream.close()
                    self._fs.delete_file(target)
                raise
            stream.close()

    def open(self, path: str) -> BinaryIO:
        with _explained("read", self._url, path):
            return cast(BinaryIO, self._fs.open_input_file(self._path(path)))

    def list(self, path: str) -> list[Entry]:
        with _explained("list", self._url, path):
            found = self._fs.get_file_info(fs.FileSelector(self._path(path), allow_not_found=True))
        files = (Entry(item.base_name, item.size if item.type == fs.FileType.File else None) for item in found)
        return sorted(files, key=lambda entry: entry.name)

    def delete(self, path: str) -> None:
        with _explained("delete", self._url, path), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(path))


def _up_to(num_bytes: int, chunks: Iterator[Buffer]) -> Iterator[Buffer]:
    """The first chunks, until they reach `num_bytes`."""
    for chunk in chunks:
        yield chunk
        num_bytes -= memoryview(chunk).nbytes
        if num_bytes <= 0:
            return


@contextlib.contextmanager
def _explained(verb: str, url: str, path: str) -> Iterator[None]:
    """Turns an OSError into a StorageError that says what to do; lets absence through as it is when reading."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise
        reason = f"cannot {verb} {url}/{path}: {error}"
        if any(word in str(error) for word in _REFUSALS):
            hint = "check the bucket's name and the credentials in the environment, then run the same command again"
            raise StorageRefused(reason, hint=hint) from error
        raise StorageError(
            reason, hint="check that the store can be reached, then run the same command again"
        ) from error
