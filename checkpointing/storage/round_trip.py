"""A check that a storage keeps what is written to it: write, read back, compare.

A store that changes or loses bytes acknowledges every write; without this check, only a restore would find it.
"""

import re
import secrets
from contextlib import suppress

from outlast.checkpointing.errors import StorageError, StorageRefused
from outlast.checkpointing.storage.base import Storage, read_bytes
from outlast.checkpointing.storage.retry import retry

_NUM_RANDOM_BYTES = 2**16
#: The first line of a chunked upload: the chunk's size, and with AWS's form its signature.
_FRAMING = re.compile(rb"[0-9a-fA-F]+(;chunk-signature=[0-9a-f]+)?\r\n")
UNFAITHFUL_HINT = (
    "outlast stopped before it relied on this storage: repair it, or set checkpoint.storage to another one"
)
_FRAMING_HINT = (
    "update the server or gateway to one that decodes aws-chunked uploads; AWS_REQUEST_CHECKSUM_CALCULATION="
    "when_required in the environment of every node makes the client send none"
)


def check_round_trip(storage: Storage, path: str) -> None:
    """Write 64 KiB of random bytes as a file, read it back, and delete it.

    Raises:
        StorageRefused: The storage answered, but did not keep the bytes.
        StorageError: It did not answer.
    """
    data = bytes(range(256)) + secrets.token_bytes(_NUM_RANDOM_BYTES - 256)
    storage.put(path, [data])
    try:
        check_written(storage, path, data)
    finally:
        with suppress(StorageError):  # a store may keep what it has: its own fault must not hide the one that is sought
            storage.delete(path)


def check_written(storage: Storage, path: str, data: bytes) -> None:
    """Read a file that was just written. Raises StorageRefused if it is not `data`, and StorageError."""
    read: bytes | None = None
    with suppress(FileNotFoundError):
        read = retry(lambda: read_bytes(storage, path))
    if read != data:
        fault, hint = _difference(data, read)
        raise StorageRefused(f"{storage.url}/{path} was written, and does not read back: {fault}", hint=hint)


def _difference(written: bytes, read: bytes | None) -> tuple[str, str]:
    """Return what differs, and what to do; None was read if the file is missing."""
    if read is None:
        return "it is missing", UNFAITHFUL_HINT
    sizes = f"{len(written):,} bytes were written and {len(read):,} read"
    if (frame := _FRAMING.match(read)) and written[:16] == read[frame.end() :][:16]:
        return f"the store kept the framing of a chunked upload as content ({sizes})", _FRAMING_HINT
    at = next((at for at, pair in enumerate(zip(written, read, strict=False)) if pair[0] != pair[1]), None)
    where = "the end is missing" if at is None and len(read) < len(written) else "bytes were added at the end"
    return f"{where if at is None else f'byte {at:,} is another'} ({sizes})", UNFAITHFUL_HINT
