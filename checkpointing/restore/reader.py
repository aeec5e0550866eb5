"""Reads checkpoints back. Every byte passes its digest before it is used.

Only proof rejects a checkpoint (a digest, a size, an absence, an extra file): those come back as faults, one line a
file. A read that fails proves nothing; it is tried again, and then it is a `StorageError`.

A file is read whole, in parallel, or only where a rank needs it: the manifest has a digest of each 16 MiB block, so a
slice is verified by the blocks that it touches.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from queue import SimpleQueue
from typing import BinaryIO

import torch
import xxhash

from outlast.checkpointing.errors import DamagedError
from outlast.checkpointing.format.layout import STATE_DIR
from outlast.checkpointing.format.manifest import BLOCK_BYTES, Digester, FileEntry, Manifest
from outlast.checkpointing.format.safetensors import (
    SafetensorsError,
    TensorSpec,
    bytes_view,
    header_bytes,
    parse_header,
)
from outlast.checkpointing.state.shards import Region
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.retry import retry

_NUM_READERS = 4
#: A block that goes to more places than this is read in one piece first.
_MAX_PIECES = 256


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or a part of one, in a file.

    Attributes:
        path: The file, relative to the checkpoint.
        begin: Its first byte there.
        spec: Its type and shape.
        box: Which elements of the tensor it holds.
        shape: Shape of the tensor.
    """

    path: str
    begin: int
    spec: TensorSpec
    box: Region
    shape: tuple[int, ...]


Index = dict[str, list[StoredTensor]]


def _truncated(entry: FileEntry, num_bytes: int) -> DamagedError:
    return DamagedError(f"{entry.path}: truncated to {num_bytes:,} of {entry.num_bytes:,} bytes")


def _longer(entry: FileEntry) -> DamagedError:
    return DamagedError(f"{entry.path}: longer than the {entry.num_bytes:,} bytes that were committed")


def _changed(entry: FileEntry, block: int | None) -> DamagedError:
    place = "by its whole digest" if block is None else f"first in the 16 MiB block at byte {block * BLOCK_BYTES:,}"
    return DamagedError(f"{entry.path}: bytes changed, {place}")


def read_index(storage: Storage, directory: str, entry: FileEntry) -> Index:
    """What a safetensors file holds, from its verified header.

    Raises:
        DamagedError: The file is missing or differs; the message says how.
        StorageError: It could not be read.
    """
    head = b""
    try:
        for number in range(len(entry.blocks)):
            block = torch.empty(_block_bytes(entry, number), dtype=torch.uint8)
            _read_block(storage, directory, entry, number, bytes_view(block))
            head += bytes_view(block)
            if len(head) >= header_bytes(head):
                break
        places, metadata = parse_header(head, entry.num_bytes)
        shards = json.loads(metadata.get("shards", "{}"))
    except (SafetensorsError, ValueError) as error:
        raise DamagedError(f"{entry.path}: {error}") from error
    index: Index = {}
    for name, (spec, begin) in places.items():
        shape, offset = shards.get(name, (spec.shape, (0,) * len(spec.shape)))
        index[name] = [StoredTensor(entry.path, begin, spec, Region(tuple(offset), spec.shape), tuple(shape))]
    return index


def _block_bytes(entry: FileEntry, number: int) -> int:
    return min(BLOCK_BYTES, entry.num_bytes - number * BLOCK_BYTES)


def _read_block(storage: Storage, directory: str, entry: FileEntry, number: int, *into: memoryview) -> None:
    """Reads one block into these places, one after the other, and verifies it.

    Raises DamagedError, or StorageError after some tries.
    """
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
                raise _truncated(entry, position)
            if end == entry.num_bytes and file.seek(0, os.SEEK_END) > end:
                raise _longer(entry)
    except FileNotFoundError:
        raise DamagedError(f"{entry.path}: missing") from None
    digest = xxhash.xxh3_64()
    for view in into:
        digest.update(view)
    if digest.hexdigest() != entry.blocks[number]:
        raise _changed(entry, number)


def _fill(file: BinaryIO, position: int, into: Sequence[memoryview]) -> int:
    """Reads from `position` on until all places are full or the file ends; returns where that was."""
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
    """One index of several files."""
    merged: Index = {}
    for index in indexes:
        for name, parts in index.items():
            merged.setdefault(name, []).extend(parts)
    return merged


def read_regions(
    storage: Storage,
    directory: str,
    manifest: Manifest,
    index: Index,
    targets: Mapping[str, tuple[Region, torch.Tensor]],
) -> list[str]:
    """Reads boxes of the named tensors into tensors that are there already. Returns the faults, one line a file.

    Several blocks at a time, straight into the targets where these are contiguous memory of the host, else through a
    small buffer that stays: fresh memory costs more than reading. With faults, the targets hold a mixture and are not
    to be used.

    Args:
        storage: The storage root.
        directory: The checkpoint's.
        manifest: Its manifest.
        index: What its files hold.
        targets: By name, what to read and where to put it; of the tensor's type and the box's shape, on any device.

    Raises:
        StorageError: A read failed for good.
    """
    entries = {entry.path: entry for entry in manifest.files}
    moves: dict[tuple[str, int], list[_Copy]] = {}
    afterwards: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, (box, target) in targets.items():
        missing = prod(box.shape)
        for part in index[name]:
            shared = box.intersection(part.box) if box.shape else part.box
            if shared is None:
                continue
            missing -= prod(shared.shape)
            begin, end, held = _rows(part, shared)
            place = shared.of(target, box)
            if held != shared or not place.is_contiguous():
                whole = torch.empty(held.shape, dtype=target.dtype)
                afterwards.append((place, shared.of(whole, held)))
                place = whole
            _plan(moves, part.path, begin, end, place.reshape(-1).view(torch.uint8))
        assert not missing, f"{missing} elements of {name} are in no file"
    faults = _execute(storage, directory, entries, moves)
    if not faults:
        for place, source in afterwards:
            place.copy_(source)
    return faults


@dataclass(frozen=True, slots=True)
class _Copy:
    """Bytes from `begin` in a block go to `target`."""

    begin: int
    target: torch.Tensor


def _rows(part: StoredTensor, shared: Region) -> tuple[int, int, Region]:
    """The fewest whole rows of a stored part that cover `shared`: (first byte, end, the box that they hold)."""
    if not shared.shape:
        return part.begin, part.begin + part.spec.num_bytes, shared
    row_bytes = part.spec.num_bytes // part.spec.shape[0]
    first = shared.offset[0] - part.box.offset[0]
    held = Region((shared.offset[0], *part.box.offset[1:]), (shared.shape[0], *part.box.shape[1:]))
    return part.begin + first * row_bytes, part.begin + (first + shared.shape[0]) * row_bytes, held


def _plan(moves: dict[tuple[str, int], list[_Copy]], path: str, begin: int, end: int, target: torch.Tensor) -> None:
    """Cuts one range of bytes by the blocks that it lies in."""
    for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
        first, last = max(begin, number * BLOCK_BYTES), min(end, (number + 1) * BLOCK_BYTES)
        move = _Copy(first - number * BLOCK_BYTES, target[first - begin : last - begin])
        moves.setdefault((path, number), []).append(move)


def _execute(
    storage: Storage, directory: str, entries: Mapping[str, FileEntry], moves: Mapping[tuple[str, int], list[_Copy]]
) -> list[str]:
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(_NUM_READERS):
        buffers.put(torch.empty(BLOCK_BYTES if moves else 0, dtype=torch.uint8))

    def fetch(path: str, number: int) -> None:
        buffer = buffers.get()
        try:
            block = buffer[: _block_bytes(entries[path], number)]
            pieces = _pieces(block, moves[path, number])
            _read_block(storage, directory, entries[path], number, *(pieces or [bytes_view(block)]))
            for move in moves[path, number] if pieces is None else ():
                move.target.copy_(block[move.begin : move.begin + move.target.numel()])
        finally:
            buffers.put(buffer)

    faults: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool, torch.no_grad():
        for (path, _), future in [(place, pool.submit(fetch, *place)) for place in sorted(moves)]:
            try:
                future.result()
            except DamagedError as error:
                faults.setdefault(path, error.message)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return sorted(faults.values())


def _pieces(block: torch.Tensor, moves: Sequence[_Copy]) -> list[memoryview] | None:
    """The places that a block's bytes go to, one after the other: targets, and `block` itself for what nobody wants.

    None where some target is not memory of the host, or they are too many.
    """
    if len(moves) > _MAX_PIECES or any(move.target.device.type != "cpu" for move in moves):
        return None
    pieces, position = [], 0
    for move in sorted(moves, key=lambda move: move.begin):
        pieces += [bytes_view(block[position : move.begin]), bytes_view(move.target)]
        position = move.begin + move.target.numel()
    return [*pieces, bytes_view(block[position:])]


def read_blocks(storage: Storage, directory: str, entry: FileEntry) -> Iterator[memoryview]:
    """The file, block by block, each verified and in memory of its own. Raises as `read_verified`."""
    for number in range(len(entry.blocks)):
        block = torch.empty(_block_bytes(entry, number), dtype=torch.uint8)
        _read_block(storage, directory, entry, number, bytes_view(block))
        yield bytes_view(block)


def read_verified(storage: Storage, directory: str, entry: FileEntry) -> torch.Tensor:
    """The file's bytes as a uint8 tensor of shape [num_bytes], verified.

    Raises:
        DamagedError: The file is missing or differs; the message says how.
        StorageError: It could not be read.
    """
    return retry(lambda: _read_verified(storage, directory, entry))


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
        raise _truncated(entry, position)
    if longer:
        raise _longer(entry)
    found = digester.entry(entry.path)
    if found != entry:
        pairs = zip(found.blocks, entry.blocks, strict=False)
        raise _changed(entry, next((number for number, (a, b) in enumerate(pairs) if a != b), None))
    return buffer


def read_tensors(
    storage: Storage, directory: str, manifest: Manifest, *, weights_only: bool = False
) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, verified; or only those of the model.

    Raises:
        DamagedError: A file that holds tensors is not whole.
        StorageError: It could not be read.
    """
    entries = [entry for entry in manifest.files if entry.path.endswith(".safetensors")]
    if weights_only:
        entries = [entry for entry in entries if not entry.path.startswith(STATE_DIR)]
    index = merge(read_index(storage, directory, entry) for entry in entries)
    tensors = {name: torch.empty(parts[0].shape, dtype=parts[0].spec.dtype) for name, parts in index.items()}
    targets = {name: (Region.whole(tuple(tensor.shape)), tensor) for name, tensor in tensors.items()}
    if faults := read_regions(storage, directory, manifest, index, targets):
        raise DamagedError("; ".join(faults))
    return tensors
