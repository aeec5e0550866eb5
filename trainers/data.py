"""From raw rows to Arrow files of samples, once.

Prepared data lies under `<storage>/.data/<fingerprint>/`, its own manifest written last, so that a crash leaves nothing
that counts and two preparers at once are harmless: both write the same bytes. The fingerprint covers the bytes of the
sources and every setting that changes what comes out.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.manifest import BLOCK_BYTES, Digester, FileEntry
from outlast.checkpointing.storage import LocalStorage, Storage, read_bytes
from outlast.checkpointing.writer import write_file
from outlast.trainers.columns import Chosen, choose_columns, name_of, texts_in
from outlast.trainers.config import TrainingConfig
from outlast.trainers.models import Tokenizer, files_of, load_tokenizer, train_bpe
from outlast.trainers.registry import find_task
from outlast.trainers.rows import BadRows, Row, read_rows, usable
from outlast.trainers.samples import ROWS_PER_BATCH, Samples, Written, in_batches, write_packed, write_samples
from outlast.trainers.sampling import mix
from outlast.trainers.sources import digest_sources
from outlast.trainers.tasks import Record, Task

FORMAT = 2
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_TOKENIZER = ("config.json", "generation_config.json", "trainer_state.json", "manifest.json")
_DATA_MANIFEST = "data.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What preparation made.

    Attributes:
        fingerprint: Names it.
        directory: Where it lies, relative to the storage root.
        num_samples: Training samples.
        num_eval_samples: Evaluation samples.
        num_rows: Rows used, by split.
        num_bad_rows: Rows left out because they could not be used.
        num_tokens: Tokens made, end tokens included, by split.
        num_dropped_tokens: Tokens in the last, short piece of each packed split.
        facts: What the task found in the training rows, such as the names of the classes.
        notes: What was guessed or left out, to be told.
        files: Every file with its digests.
    """

    fingerprint: str
    directory: str
    num_samples: int
    num_eval_samples: int
    num_rows: Mapping[str, int]
    num_bad_rows: int
    num_tokens: Mapping[str, int]
    num_dropped_tokens: Mapping[str, int]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    files: tuple[FileEntry, ...]

    def tokenizer(self, storage: Storage) -> Tokenizer:
        """The run's tokenizer, as it was when the data was made."""
        prefix = "tokenizer/"
        names = [entry.path for entry in self.files if entry.path.startswith(prefix)]
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                (Path(folder) / name.removeprefix(prefix)).write_bytes(read_bytes(storage, f"{self.directory}/{name}"))
            return load_tokenizer(folder)

    def split(self, storage: Storage, name: str) -> Samples:
        """The samples of `train` or `eval`; from a copy on this machine when the storage is not a file system."""
        file = f"{name}.arrow"
        if isinstance(storage, LocalStorage):
            return Samples(storage.path(f"{self.directory}/{file}"))
        entry = next(entry for entry in self.files if entry.path == file)
        cached = LocalStorage(cache_dir())
        path = f"{self.fingerprint}/{file}"
        try:
            for _ in _verified_chunks(cached, self.fingerprint, entry):
                pass
        except (FileNotFoundError, DamagedError):
            cached.put(path, _verified_chunks(storage, self.directory, entry))
        return Samples(cached.path(path))


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
    return Prepared(**{**body, "notes": tuple(body["notes"])}, files=files)


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
    kind = find_task(config.model.task)
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "task": [config.model.task, kind.version],
        "columns": {column.role: name_of(config.data, column.role) for column in kind.columns},
        "options": {name: getattr(config.data, name) for name in ("max_bad_rows", "options", *kind.options)},
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
    kind = find_task(config.model.task)
    reading = _Reading(config, choose_columns(kind.columns, config.data))
    facts = kind.survey(config.data, reading.records("train"))
    reading.begin(lambda record: None)
    tokenizer = _tokenizer(config, kind, reading)
    task = kind(config.data, tokenizer, facts)
    reading.begin(task.fault)
    files = [write_file(storage, directory, f"tokenizer/{name}", [data]) for name, data in files_of(tokenizer).items()]
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["train", "eval"] if config.data.eval else ["train"]:
            path = Path(folder) / f"{name}.arrow"
            written[name] = _write(task, reading.records(name), config, name, path)
            with path.open("rb") as file:
                chunks = iter(partial(file.read, BLOCK_BYTES), b"")
                files.append(write_file(storage, directory, f"{name}.arrow", chunks))
    prepared = Prepared(
        fingerprint=fingerprint,
        directory=directory,
        num_samples=written["train"].num_samples,
        num_eval_samples=written["eval"].num_samples if "eval" in written else 0,
        num_rows={name: reading.num_rows[name] for name in written},
        num_bad_rows=reading.bad.count,
        num_tokens={name: item.num_tokens for name, item in written.items()},
        num_dropped_tokens={name: item.num_dropped_tokens for name, item in written.items()},
        facts=facts,
        notes=(*reading.chosen.notes, *facts.get("notes", ()), *reading.notes()),
        files=tuple(files),
    )
    if _fingerprint(config) != fingerprint:
        hint = "run the same command again when nothing writes to them"
        raise ConfigError("the data files changed while they were read", hint=hint)
    body = asdict(prepared)
    storage.put(f"{directory}/{_DATA_MANIFEST}", [json.dumps({**body, "digest": _digest(body)}, indent=1).encode()])
    return prepared


def _write(task: Task, records: Iterator[Record], config: TrainingConfig, split: str, path: Path) -> Written:
    settings = config.data
    samples = (sample for part in in_batches(records, ROWS_PER_BATCH) for sample in task.encode(part))
    written = write_packed(samples, settings.max_length, path) if task.packs else write_samples(samples, path)
    if not written.num_samples:
        source = settings.eval if split == "eval" and not settings.eval_share else settings.train
        raise ConfigError(
            f"{source}: the {split} split has {written.num_tokens:,} tokens, less than one sample "
            f"(data.max_length {settings.max_length})",
            hint="give more text, or a smaller data.max_length",
        )
    return written


def _tokenizer(config: TrainingConfig, kind: type[Task], reading: _Reading) -> Tokenizer:
    wanted = config.model.tokenizer
    if wanted is not None and wanted.train_bpe is not None:
        texts = (text for record in reading.records("train") for text in texts_in(list(record.values())))
        return train_bpe(texts, wanted.train_bpe, kind.special_tokens, kind.template)
    return load_tokenizer(wanted.path if wanted and wanted.path else str(config.model.path))


class _Reading:
    """Reads the rows of a run, as often as asked, and keeps account of those that cannot be used.

    Attributes:
        chosen: What is read.
        num_rows: Rows used, by split, in the pass at hand.
        bad: Rows that could not be used, in the pass at hand.
    """

    def __init__(self, config: TrainingConfig, chosen: Chosen) -> None:
        self.config, self.chosen = config, chosen
        self.begin(lambda record: None)

    def begin(self, fault: Callable[[Record], str | None]) -> None:
        """Begins a pass in which `fault` finds rows that cannot be used, besides what their columns tell."""
        self._fault = fault
        self.num_rows, self.bad = {"train": 0, "eval": 0}, BadRows(self.config.data.max_bad_rows)

    def records(self, split: str) -> Iterator[Record]:
        """The usable rows of `train` or `eval`. Raises ConfigError when there are too many others."""
        for row in usable(_rows(self.config, self.chosen.names, split), self.bad, self._judge):
            self.num_rows[split] += 1
            yield self.chosen.record(row.values)

    def _judge(self, values: Sequence[Any]) -> str | None:
        return self.chosen.fault(values) or self._fault(self.chosen.record(values))

    def notes(self) -> tuple[str, ...]:
        """What is to be told of the rows left out."""
        if not self.bad.count:
            return ()
        return (f"{self.bad.count} rows cannot be used and are left out, the first: {'; '.join(self.bad.first)}",)


def _rows(config: TrainingConfig, names: Sequence[str], split: str) -> Iterator[Row]:
    data = config.data
    if split == "eval" and data.eval_share is None:
        yield from read_rows(data.eval or [], names)
        return
    border = int((data.eval_share or 0.0) * 2**64)
    for number, row in enumerate(read_rows(data.train, names)):
        if (mix(config.seed, number) < border) is (split == "eval"):
            yield row
