"""From what a run file names to files: a file, a directory, a pattern, or a list of these, here or on an object store.

Files come in a fixed order (a list's own order, sorted within a directory or pattern), because the order of rows is
part of what a run is. Nothing here looks into a file but a data set of the `datasets` library, which names its parts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow as pa
import xxhash

from outlast.checkpointing.errors import ConfigError, StorageError, first_line
from outlast.checkpointing.format.manifest import BLOCK_BYTES
from outlast.checkpointing.storage.base import Entry, Storage, read_bytes
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage

_PLAIN = (".txt", ".jsonl", ".json", ".csv", ".tsv")
KINDS = (*_PLAIN, ".parquet", ".arrow", ".feather")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 2**20
_DATASET, _DATASETS, _STATE = "dataset_info.json", "dataset_dict.json", "state.json"  # of the datasets library

List = Callable[[str], list[Entry]]


@dataclass(frozen=True, slots=True)
class Source:
    """One file with rows.

    Attributes:
        storage: What holds it.
        path: Where, in the storage.
        name: What to call it in a message.
        kind: One of `KINDS`.
        codec: How it is compressed; None when it is not.
        num_bytes: Its size.
    """

    storage: Storage
    path: str
    name: str
    kind: str
    codec: str | None
    num_bytes: int

    def open(self) -> BinaryIO:
        """Its bytes, for reading, decompressed. Raises as `Storage.open`."""
        raw = self.storage.open(self.path)
        if self.codec is None and (self.kind not in _PLAIN or isinstance(self.storage, LocalStorage)):
            return raw
        plain = raw if self.codec is None else pa.CompressedInputStream(raw, self.codec)
        return cast(BinaryIO, io.BufferedReader(plain, _BUFFER_BYTES))  # pyarrow's own files have no lines

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Says of what goes wrong inside whether it is the file or the place where it lies.

        Raises:
            ConfigError: The file is not what its name says.
            StorageError: It cannot be read.
        """
        try:
            yield
        except ConfigError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            said = first_line(error)
            is_place = isinstance(error, OSError) and (error.errno or not isinstance(self.storage, LocalStorage))
            if is_place and not isinstance(error, FileNotFoundError):
                hint = "check that it can be reached, then run the same command again"
                raise StorageError(f"cannot read {self.name}: {said}", hint=hint) from error
            raise ConfigError(f"{self.name} cannot be read as {self.kind}: {said}", hint="check that file") from error

    def digest(self) -> str:
        """Of its kind and its bytes as they lie there, not of its place."""
        digest = xxhash.xxh3_128(f"{self.kind} {self.codec} ".encode())
        with self.reading(), self.storage.open(self.path) as file:
            for chunk in iter(partial(file.read, BLOCK_BYTES), b""):
                digest.update(chunk)
        return str(digest.hexdigest())


def listed(source: str | Sequence[str] | None) -> list[str]:
    """The places that a setting names."""
    return [source] if isinstance(source, str) else list(source or [])


def find_sources(source: str | Sequence[str]) -> list[Source]:
    """The files of a source, in the order in which their rows count.

    Raises:
        ConfigError: Something named is not there, is empty, or is of no known kind.
        StorageError: A directory cannot be listed.
    """
    found: list[Source] = []
    opened = cache(lambda url: _listing(open_storage(url)))  # a directory is listed once for all its files
    for place in listed(source):
        url, path = _split(place)
        found += _expand(place, *opened(url), path)
    return found


def _listing(storage: Storage) -> tuple[Storage, List]:
    return storage, cache(storage.list)


def digest_sources(source: str | Sequence[str]) -> str:
    """A digest of every file's bytes and of their order, whatever they are called and wherever they lie."""
    return " ".join(item.digest() for item in find_sources(source))


def _split(place: str) -> tuple[str, str]:
    """The storage's URL, and the path in it."""
    parts = urlsplit(place)
    if "://" not in place or parts.scheme == "file":
        path = Path(parts.path if parts.scheme == "file" else place).expanduser().absolute()
        return path.anchor, path.as_posix().removeprefix(path.anchor)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{query}", parts.path.strip("/")


def _expand(place: str, storage: Storage, names: List, path: str) -> list[Source]:
    hits = dict(_matches("", path.split("/"), names))
    if not hits and _is_pattern(path):
        hint = "check the directories and the end of the name; `**` stands for directories within directories"
        raise ConfigError(f"no data file fits the pattern {place}", hint=hint)
    if not hits:
        raise ConfigError(f"data file {place} is not there", hint="set data.train (and data.eval) to what is there")
    found: list[Source] = []
    for hit in sorted(hits):
        found += [_source(storage, hit, hits[hit] or 0)] if hits[hit] is not None else _directory(storage, hit, names)
    if list(hits) == [path] and not found:
        hint = f"name its files, for example {place.rstrip('/')}/**/*.jsonl"
        raise ConfigError(f"data directory {place} holds no file of a kind that outlast reads", hint=hint)
    unknown = [item for item in found if item.kind not in KINDS]
    if unknown and (len(hits) == 1 or len(unknown) == len(found)):
        suffix = PurePosixPath(unknown[0].path).suffix
        raise ConfigError(
            f"data file {unknown[0].name}: outlast reads {', '.join(KINDS)}, not {suffix!r}",
            hint="convert it, or rename it if it is one of these",
        )
    full = [item for item in found if item.kind in KINDS and item.num_bytes]
    if not full:
        raise ConfigError(f"data file {place} is empty", hint="set data.train (and data.eval) to files with rows")
    return full


def _matches(base: str, pattern: Sequence[str], names: List) -> Iterator[tuple[str, int | None]]:
    """Paths below `base` that fit the pattern, with their sizes. A name that is there literally is no pattern."""
    head, rest = pattern[0], pattern[1:]
    if rest and not _is_pattern(head):
        yield from _matches(_join(base, head), rest, names)
        return
    entries = names(base)
    if head == "**" and rest:
        yield from _matches(base, rest, names)
    literal = [entry for entry in entries if entry.name == head]
    for entry in literal or [entry for entry in entries if _fits(entry.name, head)]:
        path = _join(base, entry.name)
        if not rest:
            yield path, entry.num_bytes
        elif entry.num_bytes is None:
            yield from _matches(path, pattern if head == "**" else rest, names)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _fits(name: str, pattern: str) -> bool:
    return _is_pattern(pattern) and not name.startswith(".") and fnmatchcase(name, pattern)


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _directory(storage: Storage, path: str, names: List) -> list[Source]:
    """The files of a directory that hold rows; those that a data set of the `datasets` library names, in its order."""
    entries = {entry.name: entry.num_bytes for entry in names(path) if entry.num_bytes is not None}
    shown = _shown(storage, path)
    if _DATASETS in entries:
        splits = json.loads(read_bytes(storage, _join(path, _DATASETS)))["splits"]
        hint = f"name one of them, for example {shown}/{splits[0] if splits else 'train'}"
        raise ConfigError(f"data directory {shown} holds several data sets: {', '.join(splits)}", hint=hint)
    if _STATE in entries and _DATASET in entries:
        parts = json.loads(read_bytes(storage, _join(path, _STATE)))["_data_files"]
        order = [str(part["filename"]) for part in parts]
        if gone := [name for name in order if name not in entries]:
            raise ConfigError(f"data set {shown} names {gone[0]}, which is not there", hint="copy it again as a whole")
    else:
        order = sorted(name for name in entries if not name.startswith("."))
    found = [_source(storage, _join(path, name), entries[name] or 0) for name in order]
    found = [item for item in found if item.kind in KINDS]
    kinds = sorted({item.kind for item in found})
    if len(kinds) > 1:
        ends = sorted({item.kind + _suffix(item.codec) for item in found if item.kind == kinds[0]})
        patterns = ", ".join(f"{shown}/*{end}" for end in ends)
        hint = f"name those that you mean, for example {patterns if len(ends) == 1 else f'[{patterns}]'}"
        raise ConfigError(f"data directory {shown} holds files of several kinds: {', '.join(kinds)}", hint=hint)
    return found


def _suffix(codec: str | None) -> str:
    return next((suffix for suffix, name in _CODECS.items() if name == codec), "")


def _source(storage: Storage, path: str, num_bytes: int) -> Source:
    name = PurePosixPath(path)
    codec = _CODECS.get(name.suffix)
    kind = name.with_suffix("").suffix if codec and name.with_suffix("").suffix in _PLAIN else name.suffix
    return Source(storage, path, _shown(storage, path), kind, codec if kind in _PLAIN else None, num_bytes)


def _shown(storage: Storage, path: str) -> str:
    if isinstance(storage, LocalStorage):
        return str(storage.path(path))
    return f"{storage.url.split('?')[0]}/{path}"
