"""Reads checkpoints back. Every byte passes its digest before it is used.

Only proof rejects a checkpoint (a digest, a size, an absence, an extra file): those come back as faults, one line a
file. A read that fails proves nothing; it is tried again, and then it is a `StorageError`.

A file is read whole, in parallel, or only where a rank needs it: the manifest has a digest of each 16 MiB block, so a
slice is verified by the blocks that it touches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
import xxhash

from outlast.checkpointing.errors import DamagedError
from outlast.checkpointing.layout import MANIFEST, STATE_DIR
from outlast.checkpointing.manifest import BLOCK_BYTES, Digester, FileEntry, Manifest
from outlast.checkpointing.safetensors import (
    SafetensorsError,
    Spec,
    as_tensor,
    bytes_view,
    header_bytes,
    parse_header,
    tensor_bytes,
)
from outlast.checkpointing.shards import Box
from outlast.checkpointing.storage import Storage, patiently, walk

_NUM_READERS = 4
_BLOCKS_A_READ = 2


@dataclass(frozen=True, slots=True)
class Stored:
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
    spec: Spec
    box: Box
    shape: tuple[int, ...]


Index = dict[str, list[Stored]]


class Bytes:
    """The verified bytes of one file, as far as they were asked for.

    Args:
        entry: The file.
        wanted: Ranges of bytes, as (begin, end).
    """

    def __init__(self, entry: FileEntry, wanted: Iterable[tuple[int, int]]) -> None:
        self.entry = entry
        numbers = {number for begin, end in wanted for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))}
        self._runs: list[tuple[int, torch.Tensor]] = []
        for first, count in _runs(sorted(numbers)):
            end = min((first + count) * BLOCK_BYTES, entry.num_bytes)
            self._runs.append((first * BLOCK_BYTES, torch.empty(end - first * BLOCK_BYTES, dtype=torch.uint8)))

    def __getitem__(self, place: slice) -> torch.Tensor:
        """A view of the bytes from `place.start` to `place.stop`, which must have been asked for."""
        for begin, buffer in self._runs:
            if begin <= place.start and place.stop <= begin + buffer.numel():
                return buffer[place.start - begin : place.stop - begin]
        assert place.start == place.stop
        return torch.empty(0, dtype=torch.uint8)

    def reads(self, storage: Storage, directory: str) -> Iterator[Callable[[], None]]:
        """The reads that fill it, which may run at the same time."""
        step = BLOCK_BYTES * _BLOCKS_A_READ
        for begin, buffer in self._runs:
            for start in range(0, buffer.numel(), step):
                part = buffer[start : start + step]
                yield lambda at=begin + start, part=part: patiently(  # type: ignore[misc]
                    lambda: self._read(storage, directory, at, part)
                )

    def _read(self, storage: Storage, directory: str, begin: int, part: torch.Tensor) -> None:
        view, position, entry = bytes_view(part), 0, self.entry
        try:
            with storage.open(f"{directory}/{entry.path}") as file:
                file.seek(begin)
                while position < view.nbytes:
                    count = file.readinto(view[position : position + BLOCK_BYTES])  # type: ignore[attr-defined]
                    if not count:
                        raise _truncated(entry, begin + position)
                    position += count
                longer = begin + position == entry.num_bytes and bool(file.read(1))
        except FileNotFoundError:
            raise DamagedError(f"{entry.path}: missing") from None
        if longer:
            raise _longer(entry)
        for start in range(0, view.nbytes, BLOCK_BYTES):
            number = (begin + start) // BLOCK_BYTES
            if xxhash.xxh3_64(view[start : start + BLOCK_BYTES]).hexdigest() != entry.blocks[number]:
                raise _changed(entry, number)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as (first, count)."""
    first, count = -1, 0
    for number in numbers:
        if number == first + count:
            count += 1
        else:
            if count:
                yield first, count
            first, count = number, 1
    if count:
        yield first, count


def _truncated(entry: FileEntry, num_bytes: int) -> DamagedError:
    return DamagedError(f"{entry.path}: truncated to {num_bytes:,} of {entry.num_bytes:,} bytes")


def _longer(entry: FileEntry) -> DamagedError:
    return DamagedError(f"{entry.path}: longer than the {entry.num_bytes:,} bytes that were committed")


def _changed(entry: FileEntry, block: int | None) -> DamagedError:
    place = "by its whole digest" if block is None else f"first in the 16 MiB block at byte {block * BLOCK_BYTES:,}"
    return DamagedError(f"{entry.path}: bytes changed, {place}")


def read_all(storage: Storage, directory: str, files: Sequence[Bytes]) -> list[str]:
    """Fills all of them, several reads at a time. Returns the faults, one line a damaged file.

    Raises:
        StorageError: A read failed for good.
    """
    faults: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        pending = [(file, pool.submit(read)) for file in files for read in file.reads(storage, directory)]
        for file, future in pending:
            try:
                future.result()
            except DamagedError as error:
                faults.setdefault(file.entry.path, error.message)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return sorted(faults.values())


def read_index(storage: Storage, directory: str, entry: FileEntry) -> Index:
    """What a safetensors file holds, from its verified header.

    Raises:
        DamagedError: The file is missing or differs; the message says how.
        StorageError: It could not be read.
    """
    head = _verified(storage, directory, entry, min(8, entry.num_bytes))
    try:
        head = _verified(storage, directory, entry, min(header_bytes(bytes_view(head)), entry.num_bytes))
        places, metadata = parse_header(bytes_view(head), entry.num_bytes)
        shards = json.loads(metadata.get("shards", "{}"))
    except (SafetensorsError, ValueError) as error:
        raise DamagedError(f"{entry.path}: {error}") from error
    index: Index = {}
    for name, (spec, begin) in places.items():
        shape, offset = shards.get(name, (spec.shape, (0,) * len(spec.shape)))
        index[name] = [Stored(entry.path, begin, spec, Box(tuple(offset), spec.shape), tuple(shape))]
    return index


def _verified(storage: Storage, directory: str, entry: FileEntry, num_bytes: int) -> torch.Tensor:
    file = Bytes(entry, [(0, num_bytes)])
    for read in file.reads(storage, directory):
        read()
    return file[0:num_bytes]


def merge(indexes: Iterable[Index]) -> Index:
    """One index of several files."""
    merged: Index = {}
    for index in indexes:
        for name, parts in index.items():
            merged.setdefault(name, []).extend(parts)
    return merged


def read_boxes(
    storage: Storage,
    directory: str,
    manifest: Manifest,
    index: Index,
    boxes: Mapping[str, Box],
    into: dict[str, torch.Tensor],
) -> list[str]:
    """Reads the boxes of the named tensors. Returns the faults, one line a damaged file.

    Args:
        storage: The storage root.
        directory: The checkpoint's.
        manifest: Its manifest.
        index: What its files hold.
        boxes: What to read, by name.
        into: Takes the tensors, if nothing is damaged.

    Raises:
        StorageError: A read failed for good.
    """
    plan = {name: [(part, _rows(part, box)) for part in index[name]] for name, box in boxes.items()}
    wanted: dict[str, list[tuple[int, int]]] = {}
    for parts in plan.values():
        for part, place in parts:
            if place is not None:
                wanted.setdefault(part.path, []).append(place[:2])
    entries = {entry.path: entry for entry in manifest.files}
    files = {path: Bytes(entries[path], ranges) for path, ranges in wanted.items()}
    faults = read_all(storage, directory, list(files.values()))
    if not faults:
        into.update({name: _assemble(plan[name], box, files) for name, box in boxes.items()})
    return faults


Place = tuple[int, int, Box]


def _rows(part: Stored, box: Box) -> Place | None:
    """Which bytes of a file cover what a box shares with the part that lies there: (begin, end, the box they hold)."""
    if not box.shape:
        return part.begin, part.begin + part.spec.num_bytes, part.box
    shared = box.intersection(part.box)
    if shared is None:
        return None
    row_bytes = part.spec.num_bytes // part.spec.shape[0]
    first = shared.offset[0] - part.box.offset[0]
    held = Box((shared.offset[0], *part.box.offset[1:]), (shared.shape[0], *part.box.shape[1:]))
    return part.begin + first * row_bytes, part.begin + (first + shared.shape[0]) * row_bytes, held


def _assemble(parts: Sequence[tuple[Stored, Place | None]], box: Box, files: Mapping[str, Bytes]) -> torch.Tensor:
    dtype = parts[0][0].spec.dtype
    found = [(part, *place) for part, place in parts if place is not None]
    views = [
        (held, as_tensor(files[part.path][begin:end], Spec(dtype, held.shape))) for part, begin, end, held in found
    ]
    if len(views) == 1 and views[0][0] == box:
        return views[0][1]
    whole, missing = torch.empty(box.shape, dtype=dtype), prod(box.shape)
    for held, view in views:
        shared = box.intersection(held)
        assert shared is not None
        shared.of(whole, box).copy_(shared.of(view, held))
        missing -= prod(shared.shape)
    assert not missing, f"{missing} elements of {box} are in no file"
    return whole


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
    boxes = {name: Box.whole(parts[0].shape) for name, parts in index.items()}
    tensors: dict[str, torch.Tensor] = {}
    if faults := read_boxes(storage, directory, manifest, index, boxes, tensors):
        raise DamagedError("; ".join(faults))
    return tensors


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

    Equal states have equal digests, however many ranks wrote them.

    Raises:
        DamagedError: The checkpoint is not whole.
        StorageError: It could not be read.
    """
    return {name: tensor_digest(tensor) for name, tensor in read_tensors(storage, directory, manifest).items()}


def tensor_digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and bytes."""
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor_bytes(tensor)).hexdigest()
