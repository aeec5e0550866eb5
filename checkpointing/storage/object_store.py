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
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from outlast.checkpointing.errors import ConfigError, StorageError, StorageRefused, first_line
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.retry import call_with_retries

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class S3Place:
    """Where in S3 a storage lies. `endpoint` is None for Amazon's own; `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str
    region: str
    endpoint: str | None


_HEAD_BYTES = 8 * 2**20
#: Parts of a large object go up several at a time; after so many bytes the writer waits for them.
_WINDOW_BYTES = 64 * 2**20
_SDK_TRIES = 5
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_REFUSALS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN")
#: What curl says before any byte was sent.
_MISSING_CREDENTIALS = ("ould not connect to server", "ould not resolve host", "Couldn't connect", "Couldn't resolve")
#: Google's SDK goes on for 15 minutes by default, also where there are no credentials.
_GOOGLE_RETRY_S = 20


class ObjectStorage:
    """A prefix in a bucket.

    Args:
        url: Such as `s3://bucket/runs`.

    Attributes:
        s3: Where that is for other clients of S3; None for any other kind of store.

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
        head = list(_up_to(_HEAD_BYTES, rest))  # so that a small file whose chunks fail never touches the store
        more = next(rest, None)
        with _explained("write", self._url, path):
            if more is None:
                self._put_small(path, b"".join(head))
            else:
                chunks = _as_storage_errors([*head, more], rest)
                del head, more
                before = self._retry(lambda: self._fs.get_file_info(self._path(path)))
                self._put_once(path, chunks, before)

    def _put_small(self, path: str, data: bytes) -> None:
        tries = count()

        def put() -> None:
            if not (next(tries) and self._holds(path, data)):  # perhaps only the answer was lost
                self._put_once(path, [data])

        self._retry(put)

    def _put_once(self, path: str, chunks: Iterable[Buffer], before: fs.FileInfo | None = None) -> None:
        """Writes an object. `before` is what it replaces if it cannot be written again; nobody misses it until then."""
        target = self._path(path)
        stream = self._fs.open_output_stream(target, compression=None)  # by default by its name
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
                self._fs.delete_file(target)  # what closing published; if it failed, what is there is somebody else's
            raise
        self._publish(stream, target, num_bytes, before)

    def _publish(self, stream: pa.NativeFile, target: str, num_bytes: int, before: fs.FileInfo | None) -> None:
        """Closes the stream, by which the object appears. Raises OSError when it did not."""
        try:
            stream.close()
        except OSError:
            # The answer was lost, perhaps after the store had done it. An object appears whole: so if something new is
            # there, of so many bytes, it is this one. A small one is compared.
            if before is None:
                raise
            now = self._fs.get_file_info(target)
            if now.size != num_bytes or now.mtime_ns == before.mtime_ns:
                raise

    def _holds(self, path: str, data: bytes) -> bool:
        with contextlib.suppress(OSError), self._fs.open_input_file(self._path(path)) as file:
            return bool(file.read() == data)
        return False

    def _retry(self, work: Callable[[], T]) -> T:
        """Tries again, after longer and longer pauses, what may be done twice. The last error is raised.

        Where nothing has answered before, only the SDK retries: the address may be wrong.
        """

        def may_pass(error: Exception) -> bool:
            if not isinstance(error, OSError):
                return False
            is_silent = not self._has_answered and _is_missing_credentials(error)
            self._has_answered |= not is_silent
            return not (is_silent or isinstance(error, FileNotFoundError) or _is_refusal(error))

        done = call_with_retries(work, _PAUSES_S, may_pass)
        self._has_answered = True
        return done

    def open(self, path: str) -> BinaryIO:
        with _explained("read", self._url, path):
            return cast(BinaryIO, self._retry(lambda: self._fs.open_input_file(self._path(path))))

    def list(self, path: str) -> list[Entry]:
        selector = fs.FileSelector(self._path(path), allow_not_found=True)
        with _explained("list", self._url, path):
            found = self._retry(lambda: self._fs.get_file_info(selector)) or []
        files = (Entry(item.base_name, item.size if item.type == fs.FileType.File else None) for item in found)
        return sorted(files, key=lambda entry: entry.name)

    def delete(self, path: str) -> None:
        with _explained("delete", self._url, path):
            self._fs_delete(path)

    def _fs_delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retry(lambda: self._fs.delete_file(self._path(path)))


def _connect(url: str) -> tuple[fs.FileSystem, str, S3Place | None]:
    """The file system, the path in it, its place in S3 (with the SDK's own retries, which no URL turns on)."""
    parts = urlsplit(url)
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        url += f"{'&' if parts.query else '?'}retry_limit_seconds={_GOOGLE_RETRY_S}"
    if parts.scheme != "s3":
        return *fs.FileSystem.from_uri(url), None
    options = dict(parse_qsl(parts.query))
    if strange := options.keys() - {"region", "scheme", "endpoint_override"}:
        raise ValueError(f"unknown option {min(strange)!r}; known: endpoint_override, region, scheme")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        options |= {"endpoint_override": urlsplit(endpoint).netloc, "scheme": urlsplit(endpoint).scheme}
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_SDK_TRIES)
    filesystem = fs.S3FileSystem(retry_strategy=retries, **options)
    if override := options.get("endpoint_override"):
        endpoint = f"{options.get('scheme', 'https')}://{override}"
    prefix = parts.path.strip("/")
    place = S3Place(parts.netloc, f"{prefix}/" if prefix else "", filesystem.region, endpoint)
    return filesystem, f"{parts.netloc}/{prefix}".rstrip("/"), place


def _is_refusal(error: OSError) -> bool:
    return any(word in str(error) for word in _REFUSALS)


def _is_missing_credentials(error: OSError) -> bool:
    return any(word in str(error) for word in _MISSING_CREDENTIALS)


def _as_storage_errors(held: list[Buffer], rest: Iterator[Buffer]) -> Iterator[Buffer]:
    """The chunks that are held, then the rest; each is let go as it is taken."""
    while held:
        yield held.pop(0)
    yield from rest


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
        if _is_refusal(error):
            hint = "check the bucket's name and the credentials in the environment, then run the same command again"
            raise StorageRefused(reason, hint=hint) from error
        raise StorageError(
            reason, hint="check that the store can be reached, then run the same command again"
        ) from error
