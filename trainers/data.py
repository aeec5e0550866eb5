"""From raw text to packed Arrow files, once; and from an Arrow file to rows, memory-mapped.

Prepared data lies under `<storage>/.data/<fingerprint>/`, its own manifest written last, so that a crash leaves nothing
that counts and two preparers at once are harmless: both write the same bytes. The fingerprint covers the bytes of the
sources and every setting that changes what comes out.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.manifest import BLOCK_BYTES, Digester, FileEntry
from outlast.checkpointing.storage import LocalStorage, Storage, read_bytes
from outlast.checkpointing.writer import write_file
from outlast.trainers.config import TrainingConfig
from outlast.trainers.models import Tokenizer, files_of, load_tokenizer, train_bpe
from outlast.trainers.rows import Row, read_rows
from outlast.trainers.sampling import mix
from outlast.trainers.sources import digest_sources
from outlast.trainers.tasks import TASKS

T = TypeVar("T")

FORMAT = 1
ROWS_PER_BATCH = 1024
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_TOKENIZER = ("config.json", "generation_config.json", "trainer_state.json", "manifest.json")
_DATA_MANIFEST = "data.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What preparation made.

    Attributes:
        fingerprint: Names it.
        directory: Where it lies, relative to the storage root.
        num_samples: Training samples, each `max_length` tokens.
        num_eval_samples: Evaluation samples.
        num_rows: Rows read, by split.
        num_tokens: Tokens made, end tokens included, by split.
        num_dropped_tokens: Tokens in the last, short piece of each split.
        labels: Names of the classes, in the order of their numbers; empty for tasks without labels.
        files: Every file with its digests.
    """

    fingerprint: str
    directory: str
    num_samples: int
    num_eval_samples: int
    num_rows: Mapping[str, int]
    num_tokens: Mapping[str, int]
    num_dropped_tokens: Mapping[str, int]
    labels: tuple[str, ...]
    files: tuple[FileEntry, ...]

    def tokenizer(self, storage: Storage) -> Tokenizer:
        """The run's tokenizer, as it was when the data was made."""
        prefix = "tokenizer/"
        names = [entry.path for entry in self.files if entry.path.startswith(prefix)]
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                (Path(folder) / name.removeprefix(prefix)).write_bytes(read_bytes(storage, f"{self.directory}/{name}"))
            return load_tokenizer(folder)

    def split(self, storage: Storage, name: str) -> PackedData:
        """The samples of `train` or `eval`; from a copy on this machine when the storage is not a file system."""
        file = f"{name}.arrow"
        if isinstance(storage, LocalStorage):
            return PackedData(storage.path(f"{self.directory}/{file}"))
        entry = next(entry for entry in self.files if entry.path == file)
        cached = LocalStorage(cache_dir())
        path = f"{self.fingerprint}/{file}"
        try:
            for _ in _verified_chunks(cached, self.fingerprint, entry):
                pass
        except (FileNotFoundError, DamagedError):
            cached.put(path, _verified_chunks(storage, self.directory, entry))
        return PackedData(cached.path(path))


class PackedData:
    """Samples of equal length in an Arrow file, memory-mapped: opening costs nothing, reading costs what is read."""

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        last = self._reader.num_record_batches - 1
        self._length = 0 if last < 0 else last * ROWS_PER_BATCH + self._reader.get_batch(last).num_rows

    def __len__(self) -> int:
        return self._length

    def rows(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The samples with these numbers, shape [len(numbers), max_length]."""
        return np.stack([self._row(int(number)) for number in numbers])

    def _row(self, number: int) -> npt.NDArray[np.int32]:
        column = self._reader.get_batch(number // ROWS_PER_BATCH).column(0)
        row: npt.NDArray[np.int32] = column[number % ROWS_PER_BATCH].values.to_numpy()
        return row


def prepare(config: TrainingConfig, storage: Storage) -> Prepared:
    """The prepared data of a run: found if it was made before, verified; made now if not.

    Raises:
        ConfigError: A file or column is missing, a row is not text, or there is less text than one sample.
        StorageError: Reading or writing failed.
    """
    fingerprint = _fingerprint(config)
    directory = f".data/{fingerprint}"
    try:
        prepared = _from_json(json.loads(read_bytes(storage, f"{directory}/{_DATA_MANIFEST}")))
        _verify(storage, prepared)
        return prepared
    except (FileNotFoundError, DamagedError, ValueError, KeyError, TypeError):
        return _make(config, storage, fingerprint, directory)


def _digest(body: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest())


def _from_json(body: dict[str, Any]) -> Prepared:
    if body.pop("digest") != _digest(body):
        raise DamagedError(f"{_DATA_MANIFEST}: its own digest does not match")
    files = tuple(FileEntry(**{**item, "blocks": tuple(item["blocks"])}) for item in body.pop("files"))
    return Prepared(**{**body, "labels": tuple(body["labels"])}, files=files)


def cache_dir() -> Path:
    """Where this machine keeps copies of prepared data: `$OUTLAST_CACHE`, or `~/.cache/outlast`."""
    return Path(os.environ.get("OUTLAST_CACHE", "~/.cache/outlast")).expanduser() / "data"


def _verified_chunks(storage: Storage, directory: str, entry: FileEntry) -> Iterator[bytes]:
    """The file's bytes. Raises DamagedError after the last of them if they are not what was written."""
    digester = Digester()
    with storage.open(f"{directory}/{entry.path}") as file:
        for chunk in iter(partial(file.read, BLOCK_BYTES), b""):
            digester.update(chunk)
            yield chunk
    if digester.entry(entry.path) != entry:
        raise DamagedError(f"{directory}/{entry.path}: bytes changed since the data was prepared")


def _verify(storage: Storage, prepared: Prepared) -> None:
    for entry in prepared.files:
        for _ in _verified_chunks(storage, prepared.directory, entry):
            pass


def _fingerprint(config: TrainingConfig) -> str:
    digest = xxhash.xxh3_128()
    for source in [config.data.train, *([config.data.eval] if config.data.eval and not config.data.eval_share else [])]:
        digest.update(digest_sources(source).encode())
    tokenizer = config.model.tokenizer.model_dump() if config.model.tokenizer else {"path": config.model.path}
    for path in [item for item in (tokenizer.get("path"),) if item and Path(item).is_dir()]:
        for file in sorted(Path(path).iterdir()):
            if file.suffix in _TOKENIZER_SUFFIXES and file.name not in _NOT_TOKENIZER and file.is_file():
                digest.update(f"{file.name}{_digest_file(file)}".encode())
        tokenizer = {"files": "digested"}
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "task": config.model.task,
        "text": config.data.text,
        "label": config.data.label if TASKS[config.model.task].has_labels else None,
        "max_length": config.data.max_length,
        "eval": config.data.eval_share,
        "seed": config.seed if config.data.eval_share else 0,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return str(digest.hexdigest())


def _digest_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        for chunk in iter(partial(file.read, BLOCK_BYTES), b""):
            digest.update(chunk)
    return str(digest.hexdigest())


def _make(config: TrainingConfig, storage: Storage, fingerprint: str, directory: str) -> Prepared:
    settings = config.data
    tokenizer, labels = _tokenizer(config), _labels(config)
    splits = {"train": _rows(config, held_out=False)}
    if settings.eval:
        splits["eval"] = _rows(config, held_out=True)
    files = [write_file(storage, directory, f"tokenizer/{name}", [data]) for name, data in files_of(tokenizer).items()]
    packed = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in splits.items():
            path = Path(folder) / f"{name}.arrow"
            if labels:
                packed[name] = _write_apart(rows, tokenizer, settings.max_length, labels, path)
            else:
                packed[name] = _pack((row[0] for row in rows), tokenizer, settings.max_length, path)
            if not packed[name].num_samples:
                raise ConfigError(
                    f"{settings.eval if name == 'eval' and not settings.eval_share else settings.train}: the {name} "
                    f"split has {packed[name].num_tokens:,} tokens, less than one sample (data.max_length "
                    f"{settings.max_length})",
                    hint="give more text, or a smaller data.max_length",
                )
            with path.open("rb") as file:
                chunks = iter(partial(file.read, BLOCK_BYTES), b"")
                files.append(write_file(storage, directory, f"{name}.arrow", chunks))
    prepared = Prepared(
        fingerprint=fingerprint,
        directory=directory,
        num_samples=packed["train"].num_samples,
        num_eval_samples=packed["eval"].num_samples if "eval" in packed else 0,
        num_rows={name: item.num_rows for name, item in packed.items()},
        num_tokens={name: item.num_tokens for name, item in packed.items()},
        num_dropped_tokens={name: item.num_dropped_tokens for name, item in packed.items()},
        labels=labels,
        files=tuple(files),
    )
    if _fingerprint(config) != fingerprint:
        hint = "run the same command again when nothing writes to them"
        raise ConfigError("the data files changed while they were read", hint=hint)
    body = asdict(prepared)
    storage.put(f"{directory}/{_DATA_MANIFEST}", [json.dumps({**body, "digest": _digest(body)}, indent=1).encode()])
    return prepared


def _tokenizer(config: TrainingConfig) -> Tokenizer:
    wanted = config.model.tokenizer
    if wanted is not None and wanted.train_bpe is not None:
        return train_bpe((row[0] for row in _rows(config, held_out=False)), wanted.train_bpe)
    return load_tokenizer(wanted.path if wanted and wanted.path else str(config.model.path))


def _labels(config: TrainingConfig) -> tuple[str, ...]:
    """The classes in the training rows, sorted; empty for a task without labels."""
    if not TASKS[config.model.task].has_labels:
        return ()
    found = {row[1] for row in _rows(config, held_out=False)}
    if len(found) < 2:
        raise ConfigError(f"{config.data.train}: column {config.data.label!r} holds one class only: {sorted(found)}")
    return tuple(sorted(found, key=lambda label: (int(label), "") if label.isdecimal() else (-1, label)))


def _rows(config: TrainingConfig, *, held_out: bool) -> Iterator[tuple[str, ...]]:
    """The rows of the training split, or those for evaluation: (text,) or (text, label)."""
    data = config.data
    columns = [data.text, data.label] if TASKS[config.model.task].has_labels else [data.text]
    if held_out and data.eval_share is None:
        yield from (_checked(row, columns) for row in read_rows(data.eval or [], columns))
        return
    border = int((data.eval_share or 0.0) * 2**64)
    for number, row in enumerate(read_rows(data.train, columns)):
        if (mix(config.seed, number) < border) is held_out:
            yield _checked(row, columns)


def _checked(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The values as text. Raises ConfigError when the row cannot be read, or the first is not text."""
    if row.fault:
        raise ConfigError(f"{row.where}: {row.fault}", hint="mend that row")
    for place, value in enumerate(row.values):
        if not isinstance(value, str if place == 0 else (str, int)):
            raise ConfigError(
                f"{row.where}: column {columns[place]!r} holds {value!r}, not text",
                hint="mend that row, or name another column with data.text (or data.label)",
            )
    return tuple(map(str, row.values))


@dataclass(frozen=True, slots=True)
class _Packed:
    num_rows: int
    num_tokens: int
    num_samples: int
    num_dropped_tokens: int


def _pack(texts: Iterator[str], tokenizer: Tokenizer, length: int, path: Path) -> _Packed:
    """Tokenizes, joins with end tokens, cuts into samples of `length`, writes them to an Arrow file."""
    kind = pa.list_(pa.int32(), length)
    schema = pa.schema([("input_ids", kind)])
    num_rows = num_tokens = num_samples = 0
    rest = np.empty(0, dtype=np.int32)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def write(tokens: npt.NDArray[np.int32]) -> None:
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), type=kind)
            writer.write_batch(pa.record_batch([column], schema=schema))

        full = ROWS_PER_BATCH * length
        for rows in _batches(texts, 1000):
            pieces = [np.asarray(ids, dtype=np.int32) for ids in tokenizer.encode(rows)]
            num_rows += len(rows)
            num_tokens += sum(piece.size for piece in pieces)
            rest = np.concatenate([rest, *pieces])
            while rest.size >= full:
                write(rest[:full])
                rest, num_samples = rest[full:], num_samples + ROWS_PER_BATCH
        last = rest.size // length
        if last:
            write(rest[: last * length])
    return _Packed(num_rows, num_tokens, num_samples + last, rest.size - last * length)


def _write_apart(
    rows: Iterator[tuple[str, ...]], tokenizer: Tokenizer, length: int, labels: Sequence[str], path: Path
) -> _Packed:
    """One sample a row: its tokens padded to `length`, their number, the number of its label."""
    numbers = {label: number for number, label in enumerate(labels)}
    kind = pa.list_(pa.int32(), length + 2)
    schema = pa.schema([("row", kind)])
    num_rows = num_tokens = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in _batches(rows, ROWS_PER_BATCH):
            table = np.full((len(part), length + 2), tokenizer.inner.pad_token_id, dtype=np.int32)
            for place, ids in enumerate(tokenizer.encode_apart([row[0] for row in part], length)):
                label = part[place][1]
                if label not in numbers:
                    raise ConfigError(f"label {label!r} is in the evaluation data, and not in the training data")
                table[place, : len(ids)] = ids
                table[place, length:] = len(ids), numbers[label]
                num_tokens += len(ids)
            column = pa.FixedSizeListArray.from_arrays(pa.array(table.reshape(-1)), type=kind)
            writer.write_batch(pa.record_batch([column], schema=schema))
            num_rows += len(part)
    return _Packed(num_rows, num_tokens, num_rows, 0)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
