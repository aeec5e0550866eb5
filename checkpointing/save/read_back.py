"""Read-back of the files that a save wrote, before the commit that relies on them.

A store that changes or loses bytes acknowledges every write. The first save of an attempt reads the first and the last
16 MiB of each file again, which shows a store that cannot be relied on; later ones compare the sizes only.
"""

import os
from collections.abc import Iterable

from outlast.checkpointing.errors import NotAFileError, StorageRefused
from outlast.checkpointing.format.manifest import FileEntry
from outlast.checkpointing.restore.reader import verify_blocks
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.retry import retry
from outlast.checkpointing.storage.round_trip import UNFAITHFUL_HINT


def check_read_back(storage: Storage, directory: str, files: Iterable[FileEntry], *, is_first: bool) -> None:
    """Raise StorageRefused if the storage did not keep the files as they were written, and StorageError."""
    entries = {entry.path: entry for entry in files}
    by_size = [entry for entry in entries.values() if not (is_first and entry.blocks)]
    faults = [fault for entry in by_size if (fault := _size_fault(storage, directory, entry))]
    if is_first:
        faults += verify_blocks(storage, directory, entries, ends_only=True)
    if faults:
        text = f"{storage.url}/{directory} was written, and does not read back: {'; '.join(faults)}"
        raise StorageRefused(text, hint=UNFAITHFUL_HINT)


def _size_fault(storage: Storage, directory: str, entry: FileEntry) -> str | None:
    def read_size() -> int:
        with storage.open(f"{directory}/{entry.path}") as file:
            return file.seek(0, os.SEEK_END)

    try:
        num_bytes = retry(read_size)
    except FileNotFoundError:
        return f"{entry.path} is missing"
    except NotAFileError as error:
        return error.message
    wrong = num_bytes != entry.num_bytes
    return f"{entry.path}: {entry.num_bytes:,} bytes were written, and {num_bytes:,} are there" if wrong else None
