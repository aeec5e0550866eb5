"""Verification of a checkpoint against its manifest. Never writes, and never uses the bytes it reads."""

import hashlib

import torch

from outlast.checkpointing.format.layout import MANIFEST, is_litter
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.restore.reader import read_tensors, verify_blocks
from outlast.checkpointing.storage.base import Storage, walk
from outlast.checkpointing.storage.factory import as_storage
from outlast.checkpointing.storage.location import Location
from outlast.checkpointing.storage.retry import retry


def check_listing(storage: Storage, directory: str, manifest: Manifest) -> list[str]:
    """Return the faults that a listing shows, one line each: missing and extra files, wrong sizes."""
    found = retry(lambda: list(walk(storage, directory, skip=is_litter)))
    sizes = {item.name: item.num_bytes for item in found}
    expected = {entry.path: entry.num_bytes for entry in manifest.files}
    special = {item.name: item.special for item in found if item.special and not is_litter(item.name)}
    faults = [f"{path}: missing" for path in expected if path not in sizes]
    faults += [f"{path}: {kind}, where only files and directories may be" for path, kind in special.items()]
    for path, num_bytes in sizes.items():
        if path in special or path == MANIFEST:
            continue
        if path not in expected:
            if not is_litter(path):
                faults.append(f"{path}: extra file that was never committed")
        elif num_bytes is None:
            faults.append(f"{path}: not a file")
        elif num_bytes != expected[path]:
            faults.append(f"{path}: {num_bytes:,} bytes, not the {expected[path]:,} that were committed")
    return sorted(faults)


def find_litter(storage: Storage, directory: str, manifest: Manifest) -> list[str]:
    """Return the files that desktops and editors left in a checkpoint's directory; they do no harm."""
    found = {item.name for item in retry(lambda: list(walk(storage, directory, skip=is_litter)))}
    return sorted(filter(is_litter, found - {entry.path for entry in manifest.files}))


def verify(storage: Storage | Location, directory: str, manifest: Manifest) -> list[str]:
    """Verify every byte of a checkpoint block by block; return its faults, one line each.

    Raises:
        StorageError: It could not be read, which proves nothing.
    """
    storage = as_storage(storage)
    faults = check_listing(storage, directory, manifest)
    named = {fault.split(": ", 1)[0] for fault in faults}
    entries = {entry.path: entry for entry in manifest.files if entry.path not in named}
    return sorted([*faults, *verify_blocks(storage, directory, entries)])


def tensor_digests(storage: Storage, directory: str, manifest: Manifest) -> dict[str, str]:
    """Return the `tensor_digest` of every tensor of a checkpoint. Raises as `read_tensors`.

    Equal states have equal digests, however many ranks wrote them.
    """
    return {name: tensor_digest(tensor) for name, tensor in read_tensors(storage, directory, manifest).items()}


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor_bytes(tensor)).hexdigest()
