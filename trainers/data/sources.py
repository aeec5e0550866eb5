"""Data sources of a run file resolved to files: a file, directory, pattern or list of these, local or in a store.

The order of files is fixed (the list's own order, sorted within a directory or pattern), because the order of rows is
part of a run's identity. Nothing here reads a file's content, except the metadata of a `datasets` directory, which
names its files.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow as pa
import xxhash

from outlast.checkpointing.error_hints import first_line, nearest
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.format.manifest import BLOCK_BYTES
from outlast.checkpointing.storage.base import Entry, Storage, read_bytes
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.location import is_url, parse_location
from outlast.trainers.config.data import CsvSettings

_PLAIN = (".txt", ".jsonl", ".json", ".csv", ".tsv")
COLUMNAR = (".parquet", ".arrow", ".feather")
KINDS = (*_PLAIN, *COLUMNAR)
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 2**20
_DATASET, _DATASETS, _STATE = "dataset_info.json", "dataset_dict.json", "state.json"  # of the datasets library

DEFAULT_CSV = CsvSettings()
IN_EVERY_FILE = "every file needs this column: rename the right column, or leave this file out"

#: Rows that show the columns of a file and their types.
FIRST_ROWS = 100
#: The values of a row, or the error text; and the line on which it ends, for files with lines.
RawRow = tuple[tuple[Any, ...] | str, int | None]

ListDir = Callable[[str], list[Entry]]


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file."""

    storage: Storage
    path: str  #: in the storage
    name: str  #: in messages
    kind: str  #: file type, one of `KINDS`
    codec: str | None  #: compression
    num_bytes: int  #: size as stored
    csv: CsvSettings = DEFAULT_CSV  #: dialect of .csv and .tsv files

    def open(self) -> BinaryIO:
        """Open the file for reading, decompressed. Raises as `Storage.open`."""
        raw = self.storage.open(self.path)
        if self.codec is None and (self.kind not in _PLAIN or isinstance(self.storage, LocalStorage)):
            return raw
        plain = raw if self.codec is None else pa.CompressedInputStream(raw, self.codec)
        return cast(BinaryIO, io.BufferedReader(plain, _BUFFER_BYTES))  # pyarrow's own files cannot iterate over lines

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Convert errors of reading to errors of the file or of the storage.

        Raises:
            ConfigError: The file is not of the type its name states.
            StorageError: The file cannot be read.
        """
        try:
            yield
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = first_line(error)
            is_storage = isinstance(error, OSError) and (error.errno or not isinstance(self.storage, LocalStorage))
            if is_storage and not isinstance(error, FileNotFoundError):
                hint = "check that it can be reached, then run the same command again"
                raise StorageError(f"cannot read {self.name}: {reason}", hint=hint) from error
            raise ConfigError(f"{self.name} cannot be read as {self.kind}: {reason}", hint="check that file") from error

    def digest(self) -> str:
        """Digest the file's type and its bytes as stored; its location does not count."""
        digest = xxhash.xxh3_128(f"{self.kind} {self.codec} ".encode())
        with self.reading(), self.storage.open(self.path) as file:
            for chunk in iter(partial(file.read, BLOCK_BYTES), b""):
                digest.update(chunk)
        return str(digest.hexdigest())


def find_data_files(source: str | Sequence[str], csv: CsvSettings = DEFAULT_CSV) -> list[DataFile]:
    """Find the files of a source, in the order of their rows.

    Args:
        source: Paths, patterns or URLs.
        csv: Dialect of the .csv and .tsv files among them.

    Raises:
        ConfigError: A file does not exist, is empty, or is of an unknown type.
        StorageError: A directory cannot be listed.
    """
    sources: list[DataFile] = []
    opened = cache(_open)  # a directory is listed once for all its files
    for location in [source] if isinstance(source, str) else source:
        url, path = _split(location)
        sources += _expand(location, *opened(url), path)
    return [replace(item, csv=csv) for item in sources]


def _open(url: str) -> tuple[Storage, ListDir]:
    storage = open_storage(url) if is_url(url) else LocalStorage(Path(url), follow_links=True)
    return storage, cache(storage.list)


def digest_sources(source: str | Sequence[str]) -> str:
    """Digest every file's bytes and their order; names and locations do not count."""
    return " ".join(item.digest() for item in find_data_files(source))


def _split(location: str) -> tuple[str, str]:
    """Split a path or URL into the storage's URL and the path in the storage."""
    parsed = parse_location(location)
    if isinstance(parsed, Path):
        path = parsed.absolute()
        return path.anchor, path.as_posix().removeprefix(path.anchor)
    parts = urlsplit(parsed)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{query}", parts.path.strip("/")


def _expand(location: str, storage: Storage, list_dir: ListDir, path: str) -> list[DataFile]:
    found = list(_matches("", path.split("/"), list_dir))
    matches = {match: entry.num_bytes for match, entry in found}
    for match, entry in found:
        if entry.special and (match == path or PurePosixPath(match).suffix in (*KINDS, *_CODECS)):
            raise _not_a_file(storage, match, entry)
    if not matches and _is_pattern(path):
        hint = "check the directories and the end of the name; `**` stands for directories within directories"
        raise ConfigError(f"no data file matches the pattern {location}", hint=hint)
    if not matches:
        hint = "set data.train (and data.eval) to existing files"
        if near := _nearest_file(location, path, list_dir):
            hint = f"did you mean {near}? Or {hint}"
        raise ConfigError(f"data file {location} does not exist", hint=hint)
    sources: list[DataFile] = []
    for match, num_bytes in sorted(matches.items()):
        is_directory = num_bytes is None
        sources += _directory(storage, match, list_dir) if is_directory else [_source(storage, match, num_bytes or 0)]
    if list(matches) == [path] and not sources:
        hint = f"name its files, for example {location.rstrip('/')}/**/*.jsonl"
        raise ConfigError(f"data directory {location} has no file of a type that outlast reads", hint=hint)
    unknown = [item for item in sources if item.kind not in KINDS]
    if unknown and (len(matches) == 1 or len(unknown) == len(sources)):
        suffix = PurePosixPath(unknown[0].path).suffix
        raise ConfigError(
            f"data file {unknown[0].name}: outlast reads {', '.join(KINDS)}, not {suffix!r}",
            hint="convert it, or rename it if it is one of these",
        )
    non_empty = [item for item in sources if item.kind in KINDS and item.num_bytes]
    if not non_empty:
        raise ConfigError(f"data file {location} is empty", hint="set data.train (and data.eval) to files with rows")
    return non_empty


def _nearest_file(location: str, path: str, list_dir: ListDir) -> str | None:
    """Return the location of the entry with the most similar name, in the directory of a missing file; None if none."""
    folder, _, name = path.rpartition("/")
    with suppress(StorageError):  # the directory does not exist
        if near := nearest(name, [entry.name for entry in list_dir(folder) if not entry.name.startswith(".")]):
            return f"{location.rstrip('/').removesuffix(name)}{near}"
    return None


def _not_a_file(storage: Storage, path: str, entry: Entry) -> ConfigError:
    message = f"data file {_display_name(storage, path)} is {entry.special}; outlast reads files, and reads them twice"
    return ConfigError(message, hint="write its content to a file, and name that")


def _matches(base: str, pattern: Sequence[str], list_dir: ListDir) -> Iterator[tuple[str, Entry]]:
    """Find paths below `base` that match the pattern, with their entries. Literal matches go first."""
    head, rest = pattern[0], pattern[1:]
    if rest and not _is_pattern(head):
        yield from _matches(_join(base, head), rest, list_dir)
        return
    entries = list_dir(base)
    if head == "**" and rest:
        yield from _matches(base, rest, list_dir)
    found = [entry for entry in entries if entry.name == head]
    if not found and _is_pattern(head):
        found = [entry for entry in entries if not entry.name.startswith(".") and fnmatchcase(entry.name, head)]
    for entry in found:
        path = _join(base, entry.name)
        if not rest:
            yield path, entry
        elif entry.num_bytes is None:
            yield from _matches(path, pattern if head == "**" else rest, list_dir)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _directory(storage: Storage, path: str, list_dir: ListDir) -> list[DataFile]:
    """Find the data files of a directory; for a data set of the `datasets` library its files, in its order."""
    listed = [entry for entry in list_dir(path) if entry.num_bytes is not None]
    for entry in listed:
        if entry.special and PurePosixPath(entry.name).suffix in (*KINDS, *_CODECS):
            raise _not_a_file(storage, _join(path, entry.name), entry)
    entries = {entry.name: entry.num_bytes for entry in listed}
    shown = _display_name(storage, path)
    if _DATASETS in entries:
        splits = _named_in(storage, _join(path, _DATASETS), lambda body: body["splits"])
        hint = f"name one of them, for example {shown}/{splits[0] if splits else 'train'}"
        raise ConfigError(f"data directory {shown} has several data sets: {', '.join(splits)}", hint=hint)
    if _STATE in entries and _DATASET in entries:
        order = _named_in(storage, _join(path, _STATE), lambda body: [part["filename"] for part in body["_data_files"]])
        if missing := [name for name in order if name not in entries]:
            raise ConfigError(f"data set {shown} lacks its file {missing[0]}", hint="copy the whole data set again")
    else:
        order = sorted(name for name in entries if not name.startswith("."))
    sources = [_source(storage, _join(path, name), entries[name] or 0) for name in order]
    sources = [item for item in sources if item.kind in KINDS]
    kinds = sorted({item.kind for item in sources})
    if len(kinds) > 1:
        codecs = {item.codec for item in sources if item.kind == kinds[0]}
        suffixes = sorted(kinds[0] + suffix for suffix, codec in {"": None, **_CODECS}.items() if codec in codecs)
        patterns = ", ".join(f"{shown}/*{suffix}" for suffix in suffixes)
        hint = f"name the files to read, for example {patterns if len(suffixes) == 1 else f'[{patterns}]'}"
        raise ConfigError(f"data directory {shown} has files of several types: {', '.join(kinds)}", hint=hint)
    return sources


def _source(storage: Storage, path: str, num_bytes: int) -> DataFile:
    name = PurePosixPath(path)
    codec = _CODECS.get(name.suffix)
    kind = name.with_suffix("").suffix if codec and name.with_suffix("").suffix in _PLAIN else name.suffix
    return DataFile(storage, path, _display_name(storage, path), kind, codec if kind in _PLAIN else None, num_bytes)


def _display_name(storage: Storage, path: str) -> str:
    if isinstance(storage, LocalStorage):
        return str(storage.path(path))
    return f"{storage.url.split('?')[0]}/{path}"


def missing_column_error(where: str, missing: Sequence[str], available: Iterable[str], hint: str) -> ConfigError:
    """Make the error for missing columns; it lists the available ones."""
    names = f"column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
    return ConfigError(f"{where} has no {names}; it has {', '.join(available)}", hint=hint)


def _named_in(storage: Storage, path: str, select: Callable[[Any], list[str]]) -> list[str]:
    """Return the names that a file of the datasets library lists. Raises ConfigError if it lists none."""
    try:
        names = select(json.loads(read_bytes(storage, path)))
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
        reason = "it has no list of names"
    except (ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    raise ConfigError(
        f"{_display_name(storage, path)} is not what the datasets library writes: {reason}",
        hint="save the data set again",
    )
