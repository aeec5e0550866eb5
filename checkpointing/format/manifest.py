"""The manifest of a checkpoint: its files with sizes and digests, and the older checkpoints it builds on.

Writing the manifest is the commit. It contains a digest of itself, so a damaged manifest is detected, and it is plain
JSON, so reading one never runs code. Digests are XXH3 (github.com/Cyan4973/xxHash): `xxh3_128` of each file, `xxh3_64`
of each 16 MiB block. They detect accidental damage, not attacks: a manifest may come from anywhere, so its paths,
sizes and types are checked when it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from string import hexdigits
from typing import Any

import xxhash

from outlast.checkpointing.format.layout import MANIFEST, AttemptId, CheckpointRef, path_fault
from outlast.checkpointing.json_input import parse_json
from outlast.checkpointing.storage.base import Buffer

FORMAT = 1
BLOCK_BYTES = 16 * 2**20


class ManifestError(ValueError):
    """The bytes are not an intact manifest."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: `path` relative to it, its size, and its digests in hexadecimal."""

    path: str
    num_bytes: int
    xxh3_128: str
    blocks: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise ManifestError for a path outside the directory, an impossible size, or a malformed digest."""
        if (fault := path_fault(self.path)) or self.path == MANIFEST:
            raise ManifestError(fault or f"it lists itself, {MANIFEST}")
        if not _is_count(self.num_bytes):
            raise ManifestError(f"{self.path} has {self.num_bytes!r} bytes")
        if len(self.blocks) != -(-self.num_bytes // BLOCK_BYTES):
            raise ManifestError(f"{self.path} has {self.num_bytes:,} bytes and {len(self.blocks)} digests of blocks")
        if not _is_digest(self.xxh3_128, 32) or not all(_is_digest(block, 16) for block in self.blocks):
            raise ManifestError(f"{self.path} has a malformed digest")


def parse_files(items: Any) -> tuple[FileEntry, ...]:
    """Parse the files of a JSON manifest. Raises ManifestError for damage, and if two of them have one path."""
    if not isinstance(items, list):
        raise ManifestError("it has no list of files")
    try:
        files = tuple(FileEntry(**{**item, "blocks": tuple(item["blocks"])}) for item in items)
    except (KeyError, TypeError) as error:
        raise ManifestError(f"its files are malformed ({type(error).__name__}: {error})") from error
    taken: set[str] = {str(folder) for entry in files for folder in PurePosixPath(entry.path).parents}
    for entry in files:
        if entry.path in taken:
            raise ManifestError(f"two of its files have the path {entry.path}")
        taken.add(entry.path)
    return files


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of one commit."""

    ref: CheckpointRef  #: the checkpoint itself
    #: The resume point of the attempt and the older checkpoints kept with it; not its own commits
    lineage: tuple[CheckpointRef, ...]
    files: tuple[FileEntry, ...]  #: every file, sorted by path, the manifest itself excepted
    world_size: int  #: number of ranks that wrote it
    metrics: Mapping[str, float]  #: metrics at this step, such as `loss` and `eval_loss`
    committed_at: float  #: seconds since the epoch, by rank 0's clock. Informational only.
    launch: str  #: the launch that wrote it
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.files)

    @property
    def digest(self) -> str:
        """XXH3-128 of all other fields."""
        return str(json.loads(self.to_json())["digest"])

    def to_json(self) -> bytes:
        """Return the canonical bytes, with the digest."""
        body = {
            "format": FORMAT,
            "attempt": str(self.ref.attempt),
            "step": self.ref.step,
            "launch": self.launch,
            "lineage": [{"attempt": str(ref.attempt), "step": ref.step} for ref in self.lineage],
            "files": [asdict(entry) for entry in self.files],
            "world_size": self.world_size,
            "metrics": dict(self.metrics),
            "committed_at": self.committed_at,
            "extra": dict(self.extra),
        }
        body["digest"] = _digest(body)
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=True).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Parse and check a manifest. Raises ManifestError for unknown formats and for damage."""
        try:
            body = parse_json(data)
            digest = body.pop("digest")
            if body["format"] != FORMAT:
                raise ManifestError(f"format {body['format']!r} is not known to this version of outlast")
            if digest != _digest(body):
                raise ManifestError("its own digest does not match")
            manifest = cls(
                ref=_ref(body),
                lineage=tuple(_ref(item) for item in body["lineage"]),
                files=parse_files(body["files"]),
                world_size=body["world_size"],
                metrics=body["metrics"],
                committed_at=body["committed_at"],
                launch=body["launch"],
                extra=body["extra"],
            )
            manifest._check_types()
            return manifest
        except ManifestError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"it is not a manifest ({type(error).__name__}: {error})") from error

    def _check_types(self) -> None:
        """Raise ManifestError for a value of a wrong type; readers rely on them."""
        is_number = {name: isinstance(value, int | float) for name, value in self.metrics.items()}
        declaration = self.extra.get("declaration", {})
        fault = {
            "world_size": not _is_count(self.world_size),
            "metrics": not all(is_number.values()),
            "committed_at": not isinstance(self.committed_at, int | float),
            "launch": self.launch != "" and path_fault(self.launch) != "",
            "extra": not isinstance(declaration, dict),
        }
        if wrong := [name for name, is_wrong in fault.items() if is_wrong]:
            raise ManifestError(f"its {wrong[0]} is not of the right type")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_digest(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and set(value) <= set(hexdigits.lower())


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _ref(item: Mapping[str, Any]) -> CheckpointRef:
    attempt = AttemptId.parse(item["attempt"])
    if attempt is None:
        raise ManifestError(f"{item['attempt']!r} is not the name of an attempt")
    if not _is_count(item["step"]):
        raise ManifestError(f"{item['step']!r} is not a step")
    return CheckpointRef(step=item["step"], attempt=attempt)


class Digester:
    """Computes digests of a stream of buffers while they are written or read."""

    def __init__(self) -> None:
        self._file = xxhash.xxh3_128()
        self._block = xxhash.xxh3_64()
        self._blocks: list[str] = []
        self._in_block = 0
        self.num_bytes = 0

    def update(self, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        self._file.update(view)
        self.num_bytes += view.nbytes
        while view.nbytes:
            chunk = view[: BLOCK_BYTES - self._in_block]
            self._block.update(chunk)
            self._in_block += chunk.nbytes
            view = view[chunk.nbytes :]
            if self._in_block == BLOCK_BYTES:
                self._close_block()

    def entry(self, path: str) -> FileEntry:
        """Return the manifest entry of the stream so far. Ends the stream."""
        if self._in_block:
            self._close_block()
        return FileEntry(path, self.num_bytes, self._file.hexdigest(), tuple(self._blocks))

    def through(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        for chunk in chunks:
            self.update(chunk)
            yield chunk
            del chunk  # the next one may need its memory

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()
        self._in_block = 0
