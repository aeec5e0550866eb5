"""Storage in an object store through pyarrow.fs: S3 and compatible stores, and other schemes that pyarrow supports.

A put is atomic: an object is invisible until its stream is closed. Two things need care. Closing publishes whatever was
written, also after an exception, so a large put whose chunks fail leaves a truncated object until it is deleted; only a
manifest makes a file count, and a manifest is one small chunk. And stores have no directories: after its last file is
deleted, a name may remain as an empty marker.

Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …) or from the machine's role,
never from a run file.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO, cast
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, StorageError, StorageRefused
from outlast.checkpointing.storage.base import Buffer, Entry, T
from outlast.checkpointing.storage.location import store_endpoints
from outlast.checkpointing.storage.retry import call_with_retries


@dataclass(frozen=True, slots=True)
class S3Location:
    """A location in S3. `endpoint` is None for AWS; `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str
    region: str
    endpoint: str | None


_HEAD_BYTES = 8 * 2**20
#: Parts of a large object are uploaded concurrently; after this many bytes the writer waits for them.
_WINDOW_BYTES = 64 * 2**20
_SDK_ATTEMPTS = 5
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_REFUSALS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN")
#: Messages of curl before any byte was sent.
_UNREACHABLE = ("ould not connect to server", "ould not resolve host", "Couldn't connect", "Couldn't resolve")
#: Google's SDK retries for 15 minutes by default, even without credentials.
_GOOGLE_RETRY_S = 20


class ObjectStorage:
    """A prefix in a bucket, such as `s3://bucket/runs`.

    Attributes:
        s3: The location for other S3 clients; None for any other store.

    Raises:
        ConfigError: pyarrow cannot open it. `parse_location` has refused URLs with credentials before.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._has_answered = False
        try:
            self._fs, self._root, self.s3 = _connect(self._url)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise ConfigError(
                f"storage {url!r}: {first_line(error)}",
                hint="set checkpoint.storage to a directory or to s3://bucket/prefix",
            ) from error

    @property
    def url(self) -> str:
        return self._url

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        rest = iter(chunks)
        head = list(_up_to(_HEAD_BYTES, rest))  # a small file whose chunks fail never reaches the store
        following = next(rest, None)
        with _storage_errors("write", self._url, path):
            if following is None:
                self._put_small(path, b"".join(head))
            else:
                chunks = _drain([*head, following], rest)
                del head, following
                before = self._retry(lambda: self._fs.get_file_info(self._path(path)))
                self._put_once(path, chunks, before)

    def _put_small(self, path: str, data: bytes) -> None:
        attempts = count()

        def put() -> None:
            if not (next(attempts) and self._contains(path, data)):  # perhaps only the response was lost
                self._put_once(path, [data])

        self._retry(put)

    def _put_once(self, path: str, chunks: Iterable[Buffer], before: fs.FileInfo | None = None) -> None:
        """Write an object. `before` is the object it replaces, given if the write cannot be repeated."""
        target = self._path(path)
        stream = self._fs.open_output_stream(target, compression=None)  # the default depends on the name
        num_bytes = waited_at = 0
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                for begin in range(0, view.nbytes, _HEAD_BYTES):
                    num_bytes += stream.write(view[begin : begin + _HEAD_BYTES])
                    if num_bytes - waited_at >= _WINDOW_BYTES:
                        stream.flush()
                        waited_at = num_bytes
                del chunk, view  # the next one may need its memory
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to report
                stream.close()
                self._fs.delete_file(target)  # published by close; if that failed, the object is not ours
            raise
        self._publish(stream, target, num_bytes, before)

    def _publish(self, stream: pa.NativeFile, target: str, num_bytes: int, before: fs.FileInfo | None) -> None:
        """Close the stream, which makes the object visible. Raises OSError if it did not appear."""
        try:
            stream.close()
        except OSError:
            # The response was lost, perhaps after the store had published the object. Objects appear at once, so a
            # new one of this size is ours. Small objects are compared by content instead.
            if before is None:
                raise
            now = self._fs.get_file_info(target)
            if now.size != num_bytes or now.mtime_ns == before.mtime_ns:
                raise

    def _contains(self, path: str, data: bytes) -> bool:
        with contextlib.suppress(OSError), self._fs.open_input_file(self._path(path)) as file:
            return bool(file.read() == data)
        return False

    def _retry(self, work: Callable[[], T]) -> T:
        """Retry an idempotent operation with growing pauses; raises the last error.

        Until the store has responded once, only the SDK retries: the address may be wrong.
        """

        def is_transient(error: Exception) -> bool:
            if not isinstance(error, OSError):
                return False
            is_unreachable = not self._has_answered and _mentions(error, _UNREACHABLE)
            self._has_answered |= not is_unreachable
            return not (is_unreachable or isinstance(error, FileNotFoundError) or _mentions(error, _REFUSALS))

        done = call_with_retries(work, _PAUSES_S, is_transient)
        self._has_answered = True
        return done

    def open(self, path: str) -> BinaryIO:
        with _storage_errors("read", self._url, path):
            return cast(BinaryIO, self._retry(lambda: self._fs.open_input_file(self._path(path))))

    def list(self, path: str) -> list[Entry]:
        selector = fs.FileSelector(self._path(path), allow_not_found=True)
        with _storage_errors("list", self._url, path):
            infos = self._retry(lambda: self._fs.get_file_info(selector)) or []
        files = (Entry(info.base_name, info.size if info.type == fs.FileType.File else None) for info in infos)
        return sorted(files, key=lambda entry: entry.name)

    def delete(self, path: str) -> None:
        with _storage_errors("delete", self._url, path), contextlib.suppress(FileNotFoundError):
            self._retry(lambda: self._fs.delete_file(self._path(path)))


def _connect(url: str) -> tuple[fs.FileSystem, str, S3Location | None]:
    """Return the file system with SDK retries enabled, the path in it, and its S3 location."""
    parts = urlsplit(url)
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        url += f"{'&' if parts.query else '?'}retry_limit_seconds={_GOOGLE_RETRY_S}"
    if parts.scheme != "s3":
        return *fs.FileSystem.from_uri(url), None
    options = dict(parse_qsl(parts.query))
    if unknown := options.keys() - {"region", "scheme", "endpoint_override"}:
        raise ValueError(f"unknown option {min(unknown)!r}; known options: endpoint_override, region, scheme")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint := next(iter(store_endpoints(url)), endpoint):
        options |= {"endpoint_override": urlsplit(endpoint).netloc, "scheme": urlsplit(endpoint).scheme}
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS)
    filesystem = fs.S3FileSystem(retry_strategy=retries, **options)
    prefix = parts.path.strip("/")
    location = S3Location(parts.netloc, f"{prefix}/" if prefix else "", filesystem.region, endpoint)
    return filesystem, f"{parts.netloc}/{prefix}".rstrip("/"), location


def _mentions(error: OSError, words: Iterable[str]) -> bool:
    return any(word in str(error) for word in words)


def _drain(buffered: list[Buffer], rest: Iterator[Buffer]) -> Iterator[Buffer]:
    """Yield the buffered chunks, then the rest; drops each reference once it is taken."""
    while buffered:
        yield buffered.pop(0)
    yield from rest


def _up_to(num_bytes: int, chunks: Iterator[Buffer]) -> Iterator[Buffer]:
    for chunk in chunks:
        yield chunk
        num_bytes -= memoryview(chunk).nbytes
        if num_bytes <= 0:
            return


@contextlib.contextmanager
def _storage_errors(verb: str, url: str, path: str) -> Iterator[None]:
    """Convert an OSError into a StorageError with a hint; when reading, let FileNotFoundError pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise
        reason = f"cannot {verb} {url}/{path}: {error}"
        if _mentions(error, _REFUSALS):
            hint = "check the bucket's name and the credentials in the environment, then run the same command again"
            raise StorageRefused(reason, hint=hint) from error
        hint = "check that the store can be reached, then run the same command again"
        raise StorageError(reason, hint=hint) from error
