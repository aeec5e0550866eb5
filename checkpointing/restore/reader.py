"""Verified reads of a checkpoint's files: no byte is used before its digest is checked.

Only proof rejects a checkpoint (a digest, a size, an absence, an extra file): such faults are returned, one line per
file. A failed read proves nothing; it is retried, and then raises StorageError.

A file is read completely, in parallel, or only where a rank needs it: the manifest has a digest of each 16 MiB block,
so a slice is verified by the blocks that it touches.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import BinaryIO

import torch
import xxhash

from outlast.checkpointing.errors import DamagedError, NotAFileError
from outlast.checkpointing.format.layout import is_training_state
from outlast.checkpointing.format.manifest import BLOCK_BYTES, FileEntry, Manifest
from outlast.checkpointing.format.safetensors import (
    TensorSpec,
    bytes_view,
    header_bytes,
    parse_header,
)
from outlast.checkpointing.json_input import parse_json
from outlast.checkpointing.state.shards import Region, cover_fault
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.retry import retry

_NUM_READERS = 4
#: A block with more targets than this is read in one piece first.
_MAX_PIECES = 256


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or a part of one, in a file."""

    path: str  #: the file, relative to the checkpoint
    begin: int  #: its first byte in the file
    spec: TensorSpec  #: its type and shape
    region: Region  #: which elements of the tensor it holds
    shape: tuple[int, ...]  #: shape of the complete tensor


Index = dict[str, list[StoredTensor]]
Header = tuple[Index, dict[str, str]]


def read_header(storage: Storage, directory: str, entry: FileEntry) -> Header:
    """Read the index of a safetensors file and its metadata from its verified header. Raises as `read_verified`."""
    head = b""
    try:
        for block in read_blocks(storage, directory, entry):
            head += block
            if len(head) >= header_bytes(head):
                break
        places, metadata = parse_header(head, entry.num_bytes)
        shards = _parse_shards(metadata.get("shards", "{}"))
    except ValueError as error:
        raise DamagedError(f"{entry.path}: {error}") from error
    index: Index = {}
    for name, (spec, begin) in places.items():
        shape, offset = shards.get(name, (spec.shape, (0,) * len(spec.shape)))
        index[name] = [StoredTensor(entry.path, begin, spec, Region(offset, spec.shape), shape)]
    return index, metadata


def _parse_shards(text: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parse `shards.to_json`. Raises ValueError."""
    shards = parse_json(text)
    if not isinstance(shards, dict):
        raise ValueError("its shards are not an object")
    parsed = {}
    for name, pair in shards.items():
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, list) for item in pair)
        if not is_pair or any(type(at) is not int or not 0 <= at < 2**63 for item in pair for at in item):
            raise ValueError(f"shape and offset of {name} are {pair}")
        parsed[name] = (tuple(pair[0]), tuple(pair[1]))
    return parsed


def _block_bytes(entry: FileEntry, number: int) -> int:
    return min(BLOCK_BYTES, entry.num_bytes - number * BLOCK_BYTES)


def _read_block(storage: Storage, directory: str, entry: FileEntry, number: int, *into: memoryview) -> None:
    """Read one block into consecutive buffers and verify it. Raises DamagedError, or StorageError after retries."""
    retry(lambda: _read_block_once(storage, directory, entry, number, into))


def _read_block_once(
    storage: Storage, directory: str, entry: FileEntry, number: int, into: Sequence[memoryview]
) -> None:
    begin = number * BLOCK_BYTES
    end = begin + _block_bytes(entry, number)
    try:
        with storage.open(f"{directory}/{entry.path}") as file:
            position = _fill(file, begin, into)
            if position < end:
                raise DamagedError(f"{entry.path}: truncated to {position:,} of {entry.num_bytes:,} bytes")
            if end == entry.num_bytes and file.seek(0, os.SEEK_END) > end:
                raise DamagedError(f"{entry.path}: longer than the {end:,} bytes that were committed")
    except FileNotFoundError:
        raise DamagedError(f"{entry.path}: missing") from None
    except NotAFileError as error:
        raise DamagedError(f"{entry.path}: not a file ({error.message})") from None
    digest = xxhash.xxh3_64()
    for view in into:
        digest.update(view)
    if end > begin and digest.hexdigest() != entry.blocks[number]:  # an empty file has no block
        raise DamagedError(f"{entry.path}: bytes changed, first in the 16 MiB block at byte {begin:,}")


def _fill(file: BinaryIO, position: int, into: Sequence[memoryview]) -> int:
    """Read from `position` until the buffers are full or the file ends; return the end position."""
    rest = [view for view in into if view.nbytes]
    file.seek(position)
    while rest:
        if isinstance(file, io.BufferedReader):
            count = os.preadv(file.fileno(), rest, position)
        elif len(rest) == 1:
            count = file.readinto(rest[0])  # type: ignore[attr-defined]
        else:  # of an object store, where each read is a request
            data = memoryview(file.read(sum(view.nbytes for view in rest)))
            count = data.nbytes
            for view in rest:
                view[: data.nbytes] = data[: view.nbytes]
                data = data[view.nbytes :]
        if not count:
            break
        position += count
        while rest and count >= rest[0].nbytes:
            count -= rest.pop(0).nbytes
        if count:
            rest[0] = rest[0][count:]
    return position


def merge(indexes: Iterable[Index]) -> Index:
    """Merge indexes of files. Raises DamagedError unless the parts of each tensor are together exactly that tensor."""
    merged: Index = {}
    for index in indexes:
        for name, parts in index.items():
            merged.setdefault(name, []).extend(parts)
    for name, parts in merged.items():
        kinds = {(part.spec.dtype, part.shape) for part in parts}
        fault = "its parts differ in type or shape" if len(kinds) > 1 else None
        fault = fault or cover_fault(parts[0].shape, [part.region for part in parts])
        if fault:
            raise DamagedError(f"{', '.join(sorted({part.path for part in parts}))}: tensor {name}: {fault}")
    return merged


def read_regions(
    storage: Storage,
    directory: str,
    manifest: Manifest,
    index: Index,
    targets: Mapping[str, tuple[Region, torch.Tensor]],
) -> list[str]:
    """Read regions of named tensors into existing tensors and return the faults, one line per file.

    Several blocks at a time, directly into targets that are contiguous host memory, else through a reused buffer: fresh
    memory costs more than reading. `targets` has by name the region, and a tensor of its shape and type on any device.
    `index` is by `merge`, so every element of a target is read. After faults the targets are a mixture and must not be
    used. Raises StorageError.
    """
    entries = {entry.path: entry for entry in manifest.files}
    copies: dict[tuple[str, int], list[_Piece]] = {}
    afterwards: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, (region, target) in targets.items():
        for part in index[name]:
            shared = region.intersection(part.region) if region.shape else part.region
            if shared is None:
                continue
            begin, end, stored = _rows(part, shared)
            view = shared.of(target, region)
            if stored != shared or not view.is_contiguous():
                rows = torch.empty(stored.shape, dtype=target.dtype)
                afterwards.append((view, shared.of(rows, stored)))
                view = rows
            _plan(copies, part.path, begin, end, view.reshape(-1).view(torch.uint8))
    faults = _copy_blocks(storage, directory, entries, copies)
    if not faults:
        for view, source in afterwards:
            view.copy_(source)
    return faults


@dataclass(frozen=True, slots=True)
class _Piece:
    """Copies bytes from `begin` in a block to `target`."""

    begin: int
    target: torch.Tensor


def _rows(part: StoredTensor, shared: Region) -> tuple[int, int, Region]:
    """Return the fewest complete rows of a stored part that cover `shared`: first byte, end, and their region."""
    if not shared.shape:
        return part.begin, part.begin + part.spec.num_bytes, shared
    row_bytes = part.spec.num_bytes // part.spec.shape[0]
    first = shared.offset[0] - part.region.offset[0]
    rows = Region((shared.offset[0], *part.region.offset[1:]), (shared.shape[0], *part.region.shape[1:]))
    return part.begin + first * row_bytes, part.begin + (first + shared.shape[0]) * row_bytes, rows


def _plan(copies: dict[tuple[str, int], list[_Piece]], path: str, begin: int, end: int, target: torch.Tensor) -> None:
    for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
        first, last = max(begin, number * BLOCK_BYTES), min(end, (number + 1) * BLOCK_BYTES)
        copy = _Piece(first - number * BLOCK_BYTES, target[first - begin : last - begin])
        copies.setdefault((path, number), []).append(copy)


def _copy_blocks(
    storage: Storage,
    directory: str,
    entries: Mapping[str, FileEntry],
    copies: Mapping[tuple[str, int], list[_Piece]],
) -> list[str]:
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(_NUM_READERS):
        buffers.put(torch.empty(BLOCK_BYTES if copies else 0, dtype=torch.uint8))

    def fetch(path: str, number: int) -> None:
        buffer = buffers.get()
        try:
            block = buffer[: _block_bytes(entries[path], number)]
            pieces = _pieces(block, copies[path, number])
            _read_block(storage, directory, entries[path], number, *(pieces or [bytes_view(block)]))
            for copy in copies[path, number] if pieces is None else ():
                copy.target.copy_(block[copy.begin : copy.begin + copy.target.numel()])
        finally:
            buffers.put(buffer)

    faults: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool, torch.no_grad():
        for (path, _), future in [(key, pool.submit(fetch, *key)) for key in sorted(copies)]:
            try:
                future.result()
            except DamagedError as error:
                faults.setdefault(path, error.message)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return sorted(faults.values())


def verify_blocks(
    storage: Storage, directory: str, entries: Mapping[str, FileEntry], *, ends_only: bool = False
) -> list[str]:
    """Read every block of the files, or only the first and the last of each, and compare its digest.

    Returns the faults, one line each. Raises StorageError.
    """
    nothing: dict[tuple[str, int], list[_Piece]] = {
        (path, number): []
        for path, entry in entries.items()
        for number in range(len(entry.blocks))
        if not ends_only or number in (0, len(entry.blocks) - 1)
    }
    return _copy_blocks(storage, directory, entries, nothing)


def _pieces(block: torch.Tensor, copies: Sequence[_Piece]) -> list[memoryview] | None:
    """Return consecutive buffers for a block's bytes: the targets, and `block` itself for bytes without a target.

    None if a target is not host memory, or there are too many.
    """
    if len(copies) > _MAX_PIECES or any(copy.target.device.type != "cpu" for copy in copies):
        return None
    pieces, position = [], 0
    for copy in sorted(copies, key=lambda copy: copy.begin):
        pieces += [bytes_view(block[position : copy.begin]), bytes_view(copy.target)]
        position = copy.begin + copy.target.numel()
    return [*pieces, bytes_view(block[position:])]


def read_blocks(storage: Storage, directory: str, entry: FileEntry) -> Iterator[memoryview]:
    """Yield a file by verified blocks, each in memory of its own. Raises as `read_verified`."""
    for number in range(len(entry.blocks)):
        block = torch.empty(_block_bytes(entry, number), dtype=torch.uint8)
        _read_block(storage, directory, entry, number, bytes_view(block))
        yield bytes_view(block)


def read_verified(storage: Storage, directory: str, entry: FileEntry) -> torch.Tensor:
    """Read a file as a uint8 tensor. Raises DamagedError if it is missing or differs, and StorageError."""
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    for number in range(max(1, len(entry.blocks))):
        part = buffer[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        _read_block(storage, directory, entry, number, bytes_view(part))
    return buffer


def read_tensors(
    storage: Storage, directory: str, manifest: Manifest, *, weights_only: bool = False
) -> dict[str, torch.Tensor]:
    """Read and verify all tensors of a checkpoint, or only the weights. Raises DamagedError and StorageError."""
    entries = [entry for entry in manifest.files if entry.path.endswith(".safetensors")]
    if weights_only:
        entries = [entry for entry in entries if not is_training_state(entry.path)]
    index = merge(read_header(storage, directory, entry)[0] for entry in entries)
    tensors = {name: torch.empty(parts[0].shape, dtype=parts[0].spec.dtype) for name, parts in index.items()}
    targets = {name: (Region.whole(tuple(tensor.shape)), tensor) for name, tensor in tensors.items()}
    if faults := read_regions(storage, directory, manifest, index, targets):
        raise DamagedError("; ".join(faults))
    return tensors
