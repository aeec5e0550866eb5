"""Reads checkpoints and believes nothing: every byte is digested before it is used.

Only proof rejects a checkpoint (a digest, a size, an absence, an extra file): those come back as faults, one line a
file. A read that fails proves nothing; it is tried again, and then it is a `StorageError`.
"""

from __future__ import annotations

import hashlib

import torch

from outlast.checkpointing.errors import DamagedError
from outlast.checkpointing.layout import MANIFEST
from outlast.checkpointing.manifest import BLOCK_BYTES, Digester, FileEntry, Manifest
from outlast.checkpointing.safetensors import SafetensorsError, bytes_view, decode, tensor_bytes
from outlast.checkpointing.storage import Storage, patiently, walk


def read_verified(storage: Storage, directory: str, entry: FileEntry) -> torch.Tensor:
    """The file's bytes as a uint8 tensor of shape [num_bytes], verified.

    Raises:
        DamagedError: The file is missing or differs; the message says how.
        StorageError: It could not be read.
    """
    return patiently(lambda: _read_verified(storage, directory, entry))


def _read_verified(storage: Storage, directory: str, entry: FileEntry) -> torch.Tensor:
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    view = bytes_view(buffer)
    digester, position = Digester(), 0
    try:
        with storage.open(f"{directory}/{entry.path}") as file:
            while position < entry.num_bytes:
                part = view[position : position + BLOCK_BYTES]
                count = file.readinto(part)  # type: ignore[attr-defined]
                if not count:
                    break
                digester.update(part[:count])
                position += count
            longer = bool(file.read(1))
    except FileNotFoundError:
        raise DamagedError(f"{entry.path}: missing") from None
    if position < entry.num_bytes:
        raise DamagedError(f"{entry.path}: truncated to {position:,} of {entry.num_bytes:,} bytes")
    if longer:
        raise DamagedError(f"{entry.path}: longer than the {entry.num_bytes:,} bytes that were committed")
    found = digester.entry(entry.path)
    if found != entry:
        bad = [i for i, (a, b) in enumerate(zip(found.blocks, entry.blocks, strict=False)) if a != b]
        where = f"first in the 16 MiB block at byte {bad[0] * BLOCK_BYTES:,}" if bad else "by its whole digest"
        raise DamagedError(f"{entry.path}: bytes changed, {where}")
    return buffer


def read_tensors(storage: Storage, directory: str, entry: FileEntry) -> dict[str, torch.Tensor]:
    """The tensors of a verified safetensors file. Raises as `read_verified`."""
    buffer = read_verified(storage, directory, entry)
    try:
        return decode(buffer)
    except SafetensorsError as error:
        raise DamagedError(f"{entry.path}: {error}") from error


def check_listing(storage: Storage, directory: str, manifest: Manifest) -> list[str]:
    """Faults that a listing shows: missing and extra files, wrong sizes. One line each."""
    found = {item.name: item.num_bytes for item in patiently(lambda: list(walk(storage, directory)))}
    expected = {entry.path: entry.num_bytes for entry in manifest.files}
    faults = [f"{path}: missing" for path in expected if path not in found]
    for path, num_bytes in found.items():
        if path == MANIFEST or path.rsplit("/", 1)[-1].startswith(".nfs"):
            continue
        if path not in expected:
            faults.append(f"{path}: extra file that was never committed")
        elif num_bytes != expected[path]:
            faults.append(f"{path}: {num_bytes:,} bytes, committed were {expected[path]:,}")
    return sorted(faults)


def verify(storage: Storage, directory: str, manifest: Manifest) -> list[str]:
    """Reads every byte of a checkpoint. Returns its faults, one line each; none means whole.

    Raises:
        StorageError: It could not be read, which proves nothing.
    """
    faults = check_listing(storage, directory, manifest)
    named = {fault.split(": ", 1)[0] for fault in faults}
    for entry in manifest.files:
        if entry.path in named:
            continue
        try:
            read_verified(storage, directory, entry)
        except DamagedError as error:
            faults.append(error.message)
    return sorted(faults)


def tensor_digests(storage: Storage, directory: str, manifest: Manifest) -> dict[str, str]:
    """The SHA-256 of every tensor of a checkpoint (dtype, shape and bytes), by name; read and verified.

    Raises:
        DamagedError: The checkpoint is not whole.
        StorageError: It could not be read.
    """
    digests = {}
    for entry in manifest.files:
        if entry.path.endswith(".safetensors"):
            for name, tensor in read_tensors(storage, directory, entry).items():
                head = f"{tensor.dtype}{list(tensor.shape)}".encode()
                digests[name] = hashlib.sha256(head + tensor_bytes(tensor)).hexdigest()
    return digests
