"""From raw rows to Arrow files of samples, once.

Prepared data lies under `<storage>/.data/<fingerprint>/`, its own manifest written last, so that a crash leaves nothing
that counts and two preparers at once are harmless: both write the same bytes. Once the manifest is there, no upload
below it is needed, and whoever sees it aborts those that are unfinished: their writers are dead, or will find the data
made. The fingerprint covers the bytes of the sources and every setting that changes what comes out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpointing.errors import ConfigError, DamagedError, StorageError
from outlast.checkpointing.format.manifest import BLOCK_BYTES, FileEntry
from outlast.checkpointing.save.writer import write_file
from outlast.checkpointing.storage.base import Storage, read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.multipart_uploads import abort_uploads
from outlast.trainers.config.data import DataSettings, PrepareMode
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import DatasetStats, Sample, Samples, write_packed, write_samples
from outlast.trainers.data.columns import ColumnMapping, choose_columns, name_of, texts_in
from outlast.trainers.data.readers import BadRows, usable
from outlast.trainers.data.sources import digest_sources, find_sources
from outlast.trainers.data.tokenizer import Tokenizer, files_of, load_tokenizer, train_bpe
from outlast.trainers.preparation.encode import EncoderContext, Piece, Split, local_encoder, usable_pieces
from outlast.trainers.preparation.local_cache import local_copy, verified_chunks
from outlast.trainers.tasks.base import Record, Task
from outlast.trainers.tasks.registry import find_task

FORMAT = 2
LARGE_BYTES = 256 * 2**20
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
        longest: Tokens of the longest sample (or choice of one), by split; earlier releases did not tell.
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
    longest: Mapping[str, int] = field(default_factory=dict)

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
        return Samples(local_copy(storage, self.directory, self.fingerprint, entry))


def prepare(config: TrainingConfig, storage: Storage, cluster: EncoderContext | None = None) -> Prepared:
    """The prepared data of a run: found if it was made before, verified; made now if not.

    Args:
        config: The run's settings.
        storage: Where it lies.
        cluster: Where rows are encoded when `data.prepare` says so; without it, here.

    Raises:
        ConfigError: A file or column is missing, a row is not text, or there is less text than one sample.
        StorageError: Reading or writing failed.
    """
    fingerprint = _fingerprint(config)
    directory = f".data/{fingerprint}"
    prepared = _find(config, storage, directory)
    if prepared is None:
        is_large = cluster is not None and _is_large(config.data)
        try:
            prepared = _make(
                config, storage, fingerprint, directory, cluster if cluster and is_large else local_encoder
            )
        except StorageError:  # perhaps because somebody else has made it meanwhile, and aborted what was uploaded here
            prepared = _find(config, storage, directory)
            if prepared is None:
                raise
    with suppress(StorageError):  # what is left there costs money and nothing else
        abort_uploads(storage, directory)
    return prepared


def _find(config: TrainingConfig, storage: Storage, directory: str) -> Prepared | None:
    """What was made before, verified; None if it is not there, not whole, or made of fewer rows than it may be."""
    try:
        prepared = _from_json(json.loads(read_bytes(storage, f"{directory}/{_DATA_MANIFEST}")))
        _verify(storage, prepared)
    except (FileNotFoundError, DamagedError, ValueError, KeyError, TypeError):
        return None
    return prepared if prepared.num_bad_rows <= config.data.max_bad_rows else None


def _is_large(settings: DataSettings) -> bool:
    """Whether the cluster is to encode the rows."""
    if settings.prepare is not PrepareMode.AUTO:
        return settings.prepare is PrepareMode.CLUSTER
    return sum(source.num_bytes for source in find_sources(list(settings.places.values()))) >= LARGE_BYTES


def _digest(body: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest())


def _from_json(body: dict[str, Any]) -> Prepared:
    if body.pop("digest") != _digest(body):
        raise DamagedError(f"{_DATA_MANIFEST}: its own digest does not match")
    files = tuple(FileEntry(**{**item, "blocks": tuple(item["blocks"])}) for item in body.pop("files"))
    return Prepared(**{**body, "notes": tuple(body["notes"])}, files=files)


def _verify(storage: Storage, prepared: Prepared) -> None:
    for entry in prepared.files:
        for _ in verified_chunks(storage, prepared.directory, entry):
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
        # 0: earlier releases had the limit here, though it does not change what comes out
        "options": {"max_bad_rows": 0, **{name: getattr(config.data, name) for name in ("options", *kind.options)}},
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


def _make(
    config: TrainingConfig, storage: Storage, fingerprint: str, directory: str, place: EncoderContext
) -> Prepared:
    kind, settings = find_task(config.model.task), config.data
    chosen = choose_columns(kind.columns, settings)
    facts = kind.survey(settings, _records(config, chosen))
    tokenizer = _tokenizer(config, kind, chosen)
    task = kind(settings, tokenizer, facts)
    files = [write_file(storage, directory, f"tokenizer/{name}", [data]) for name, data in files_of(tokenizer).items()]
    bad, num_rows, written = BadRows(settings.max_bad_rows), dict[str, int](), {}
    with tempfile.TemporaryDirectory() as folder, place() as encode:
        for name in ["train", "eval"] if settings.eval else ["train"]:
            path = Path(folder) / f"{name}.arrow"
            split = Split(config, name, chosen)
            with closing(encode(task, split)) as pieces:
                written[name] = _write(task, _samples(pieces, bad, name, num_rows), split, path)
            with path.open("rb") as file:
                chunks = iter(partial(file.read, BLOCK_BYTES), b"")
                files.append(write_file(storage, directory, f"{name}.arrow", chunks))
    notes = [f"rows that cannot be used and are left out: {bad.count}, the first: {'; '.join(bad.first)}"]
    prepared = Prepared(
        fingerprint=fingerprint,
        directory=directory,
        num_samples=written["train"].num_samples,
        num_eval_samples=written["eval"].num_samples if "eval" in written else 0,
        num_rows=num_rows,
        num_bad_rows=bad.count,
        num_tokens={name: item.num_tokens for name, item in written.items()},
        num_dropped_tokens={name: item.num_dropped_tokens for name, item in written.items()},
        facts=facts,
        notes=(*chosen.notes, *facts.get("notes", ()), *(notes if bad.count else ())),
        files=tuple(files),
        longest={name: item.longest for name, item in written.items()},
    )
    if _fingerprint(config) != fingerprint:
        hint = "run the same command again when nothing writes to them"
        raise ConfigError("the data files changed while they were read", hint=hint)
    body = asdict(prepared)
    storage.put(f"{directory}/{_DATA_MANIFEST}", [json.dumps({**body, "digest": _digest(body)}, indent=1).encode()])
    return prepared


def _records(config: TrainingConfig, chosen: ColumnMapping) -> Iterator[Record]:
    """The training rows whose columns hold what they should. Raises ConfigError when there are too many others."""
    split = Split(config, "train", chosen)
    for row in usable(split.rows(split.sources()), BadRows(config.data.max_bad_rows), chosen.fault):
        yield chosen.record(row.values)


def _samples(pieces: Iterator[Piece], bad: BadRows, name: str, num_rows: dict[str, int]) -> Iterator[Sample]:
    num_rows[name] = 0
    for piece in usable_pieces(pieces, bad):
        num_rows[name] += piece.num_rows - len(piece.faults)
        yield from piece.samples


def _write(task: Task, samples: Iterator[Sample], split: Split, path: Path) -> DatasetStats:
    settings = split.config.data
    written = write_packed(samples, settings.max_length, path) if task.packs else write_samples(samples, path)
    if not written.num_samples:
        source = settings.eval if split.name == "eval" and not split.is_share else settings.train
        raise ConfigError(
            f"{source}: the {split.name} split has {written.num_tokens:,} tokens, less than one sample "
            f"(data.max_length {settings.max_length})",
            hint="give more text, or a smaller data.max_length",
        )
    return written


def _tokenizer(config: TrainingConfig, kind: type[Task], chosen: ColumnMapping) -> Tokenizer:
    wanted = config.model.tokenizer
    if wanted is not None and wanted.train_bpe is not None:
        texts = (text for record in _records(config, chosen) for text in texts_in(list(record.values())))
        return train_bpe(texts, wanted.train_bpe, kind.special_tokens, kind.template)
    return load_tokenizer(wanted.path if wanted and wanted.path else str(config.model.path))
