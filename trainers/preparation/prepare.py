"""Preparation of data: raw rows to Arrow files of samples, once for all attempts and runs with the same data.

Prepared data is stored under `<storage>/.data/<fingerprint>/`. Its manifest is written last, so a crash leaves no
invalid data, and concurrent preparers are harmless: both write the same bytes. Once the manifest exists, unfinished
uploads below it are aborted: their writers are dead, or will find the prepared data. The fingerprint must cover the
bytes of the sources and every setting that changes the samples.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

import transformers
import xxhash

from outlast.checkpointing.errors import ConfigError, DamagedError, NotAFileError, OutlastError, StorageError
from outlast.checkpointing.format.manifest import BLOCK_BYTES, FileEntry, parse_files
from outlast.checkpointing.json_input import parse_json
from outlast.checkpointing.run_store.typed_json import from_json
from outlast.checkpointing.save.writer import write_file
from outlast.checkpointing.storage.base import Storage, read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.orphaned_uploads import abort_uploads
from outlast.trainers.config.base import Settings
from outlast.trainers.config.data import DataSettings, PrepareMode
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import PREPARE, DatasetStats, Sample, Samples, write_packed, write_samples
from outlast.trainers.data.columns import ColumnMapping, choose_columns, name_of, texts_in
from outlast.trainers.data.readers import BadRowCounter, usable_rows
from outlast.trainers.data.sources import digest_sources, find_data_files
from outlast.trainers.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files, tokenizer_source, train_bpe
from outlast.trainers.preparation.encode import Encoder, EncoderContext, Piece, Split, encode_here
from outlast.trainers.preparation.local_cache import local_copy, verified_chunks
from outlast.trainers.tasks.base import Record, Task, find_task

FORMAT = 2
LARGE_BYTES = 256 * 2**20
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
#: Names of other files of a tokenizer, which release 0.1.0 left out of the fingerprint.
_LATER_TOKENIZER_FILES = ("additional_chat_templates/*.jinja", "*.spm", "*.vocab", "*.codes", "*.tokenizer")
_NOT_TOKENIZER = ("config.json", "generation_config.json", "trainer_state.json", "manifest.json")
_DATA_MANIFEST = "data.json"
#: Options that release 0.1.0 had. Later ones count only if they are set, so that its data stays valid.
_FIRST_OPTIONS = ("options", "chat_template", "problem", "stride", "max_target_length", "mask_share")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prepared data of a run.

    Attributes:
        fingerprint: Identifies sources and settings.
        directory: Directory of its files, relative to the storage root.
        num_samples: Training samples.
        num_eval_samples: Evaluation samples.
        num_rows: Rows used, by split.
        num_bad_rows: Unusable rows that were skipped.
        num_tokens: Tokens encoded, end tokens included, by split.
        num_dropped_tokens: Tokens in the last, incomplete sample of each packed split.
        facts: The task's facts about the training rows, such as the names of the classes.
        notes: Guesses and skipped rows to report to the user.
        files: All files with their digests.
        longest: Tokens of the longest sample (or choice), by split; empty in data of earlier releases.
        num_cut: Rows whose sample is truncated, by split; empty in data of earlier releases.
        num_empty: Rows without a token of their own, by split; empty in data of earlier releases.
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
    num_cut: Mapping[str, int] = field(default_factory=dict)
    num_empty: Mapping[str, int] = field(default_factory=dict)

    def tokenizer(self, storage: Storage) -> Tokenizer:
        """Load the run's tokenizer as it was when the data was prepared. Raises DamagedError if it cannot be."""
        prefix = "tokenizer/"
        names = [entry.path for entry in self.files if entry.path.startswith(prefix)]
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                target = Path(folder) / name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read_bytes(storage, f"{self.directory}/{name}"))
            try:
                return load_tokenizer(folder)
            except ConfigError as error:
                message = error.message.replace(folder, f"{self.directory}/tokenizer")
                raise DamagedError(message, hint=PREPARE) from error

    def split(self, storage: Storage, name: str) -> Samples:
        """Open the samples of `train` or `eval`; from a local copy when the storage is not a file system.

        Raises DamagedError if they are not those that were prepared.
        """
        file = f"{name}.arrow"
        if isinstance(storage, LocalStorage):
            samples = Samples(storage.path(f"{self.directory}/{file}"))
        else:
            entry = next(entry for entry in self.files if entry.path == file)
            samples = Samples(local_copy(storage, self.directory, self.fingerprint, entry))
        expected = self.num_samples if name == "train" else self.num_eval_samples
        if len(samples) != expected:
            raise DamagedError(f"{self.directory}/{file}: {len(samples)} samples instead of {expected}", hint=PREPARE)
        return samples


def prepare(
    config: TrainingConfig, storage: Storage, cluster: EncoderContext | None = None, *, like: str | None = None
) -> Prepared:
    """Return the prepared data of a run: the existing one after verification, or else prepare it.

    Args:
        config: The run's settings.
        storage: Storage of the prepared data.
        cluster: Remote encoder for `data.prepare: cluster` (or auto); without it, rows are encoded in this process.
        like: The fingerprint that a run was started with: see `data_fingerprint`.

    Raises:
        ConfigError: A file or column is missing, too many rows are unusable, or there is less text than one sample.
        StorageError: Reading or writing failed.
    """
    fingerprint = data_fingerprint(config, like)
    directory = f".data/{fingerprint}"
    prepared = _find(config, storage, directory)
    if prepared is None:
        is_large = cluster is not None and _is_large(config.data)
        try:
            encoder = cluster() if cluster and is_large else nullcontext(encode_here)
            prepared = _make(config, storage, fingerprint, directory, encoder)
        except StorageError:  # another preparer may have finished first, and aborted the uploads of this one
            prepared = _find(config, storage, directory)
            if prepared is None:
                raise
    with suppress(StorageError):  # leftover uploads cost storage and nothing else
        abort_uploads(storage, directory)
    return prepared


def prepare_first(config: TrainingConfig, storage: Storage, name: str, num_rows: int) -> Prepared:
    """Prepare the first rows of a split, for a preview; `storage` is a temporary one.

    Facts such as the classes are those of all training rows unless the files are large; a tokenizer is trained on the
    first rows only. Raises as `prepare`.
    """
    encoder = nullcontext(encode_here)
    return _make(config, storage, "first-rows", ".data/first-rows", encoder, names=(name,), limit=num_rows)


#: Raised by JSON that is none, or has another form.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)


def _find(config: TrainingConfig, storage: Storage, directory: str) -> Prepared | None:
    """Return existing prepared data; None if there is none, it is damaged, or more rows were skipped than allowed."""
    try:
        prepared = _from_json(parse_json(read_bytes(storage, f"{directory}/{_DATA_MANIFEST}")))
        if prepared.directory != directory or prepared.fingerprint != directory.rpartition("/")[2]:
            return None
        for entry in prepared.files:
            for _ in verified_chunks(storage, prepared.directory, entry):
                pass
    except (FileNotFoundError, NotAFileError, DamagedError, *_MALFORMED):
        return None
    return prepared if prepared.num_bad_rows <= config.data.max_bad_rows else None


def _is_large(settings: DataSettings) -> bool:
    """Decide whether the cluster encodes the rows."""
    if settings.prepare is not PrepareMode.AUTO:
        return settings.prepare is PrepareMode.CLUSTER
    return stored_bytes(settings) >= LARGE_BYTES


def stored_bytes(settings: DataSettings) -> int:
    """Return the size of all data files as stored. Raises as `find_data_files`."""
    return sum(source.num_bytes for source in find_data_files(list(settings.places.values())))


def _digest(body: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest())


def _from_json(body: dict[str, Any]) -> Prepared:
    if body.pop("digest") != _digest(body):
        raise DamagedError(f"{_DATA_MANIFEST}: its own digest does not match")
    return replace(from_json(Prepared, body), files=parse_files(body["files"]))


def data_fingerprint(config: TrainingConfig, like: str | None = None) -> str:
    """Return the fingerprint of a run's data; it reads every byte of the sources. Raises as `prepare`.

    Args:
        config: The run's settings.
        like: The fingerprint that a run was started with. It is returned if it only differs by the version of the task,
            or by files of the tokenizer that earlier releases left out, so that the run goes on with the samples of an
            earlier release; `check_samples` compares them.
    """
    sources = xxhash.xxh3_128()
    for source in [config.data.train, *([config.data.eval] if config.data.eval and not config.data.eval_share else [])]:
        sources.update(digest_sources(source).encode())
    tokenizer = config.model.tokenizer.model_dump() if config.model.tokenizer else {"path": config.model.path}
    if path := tokenizer.get("path"):
        path = tokenizer["path"] = tokenizer_source(str(path))
    starts = [sources]
    if path and (folder := Path(path)).is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in _TOKENIZER_SUFFIXES and file.name not in _NOT_TOKENIZER and file.is_file():
                sources.update(f"{file.name}{_file_digest(file)}".encode())
        if later := sorted(file for pattern in _LATER_TOKENIZER_FILES for file in folder.glob(pattern)):
            starts.insert(0, sources.copy())
            for file in later:
                starts[0].update(f"{file.relative_to(folder)}{_file_digest(file)}".encode())
        tokenizer = {"files": "digested"}
    fingerprints = []
    newest = find_task(config.model.task).data_version(config.data, partial(_named_tokenizer, config))
    for version, start in itertools.product(range(newest, 0, -1), starts):
        digest = start.copy()
        settings = _data_settings(config, tokenizer, version)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        fingerprints.append(str(digest.hexdigest()))
    return like if like in fingerprints else fingerprints[0]


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return str(file_digest(opened, xxhash.xxh3_128).hexdigest())


def _data_settings(config: TrainingConfig, tokenizer: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return all settings that determine the samples; those that release 0.1.0 did not have, if they are set."""
    task = find_task(config.model.task)
    own = [column.role for column in task.columns if not column.is_sparse]
    names = {column.role: name_of(config.data, column.role) for column in task.all_columns()}
    options = {name: getattr(config.data, name) for name in ("options", "csv", *task.options)}
    plain = {
        name: value.model_dump(mode="json") if isinstance(value, Settings) else value for name, value in options.items()
    }
    defaults = {name: DataSettings.model_fields[name].get_default(call_default_factory=True) for name in options}
    model = _model_facts(config, task) if version > 1 else {}
    return {
        **({"model": model} if model else {}),
        **({"add_tokens": list(config.model.add_tokens)} if config.model.add_tokens else {}),
        "format": FORMAT,
        "tokenizer": tokenizer,
        "task": [config.model.task, version],
        "columns": {role: name for role, name in names.items() if role in own or name != role},
        # 0: earlier releases included the limit, although it does not change the samples
        "options": {
            "max_bad_rows": 0,
            **{name: plain[name] for name in options if name in _FIRST_OPTIONS or options[name] != defaults[name]},
        },
        "max_length": config.data.max_length,
        "eval": config.data.eval_share,
        "seed": config.seed if config.data.eval_share else 0,
    }


def _make(
    config: TrainingConfig,
    storage: Storage,
    fingerprint: str,
    directory: str,
    encoder: AbstractContextManager[Encoder],
    *,
    names: Sequence[str] = (),
    limit: int | None = None,
) -> Prepared:
    """Prepare the splits `names`, by default all; with a limit, of that many rows each."""
    task_class, settings = find_task(config.model.task), config.data
    chosen = choose_columns(task_class.columns, settings, task_class.forms)
    survey_limit = limit if limit and stored_bytes(settings) >= LARGE_BYTES else None
    labels = {"labels": list(chosen.labels)} if chosen.labels and settings.labels is None else {}
    facts = task_class.survey(settings.model_copy(update=labels), _records(config, chosen, survey_limit))
    facts = task_class.match_model(settings, facts, _model_facts(config, task_class))
    tokenizer = _tokenizer(config, task_class, chosen, limit)
    task = task_class(settings, tokenizer, facts)
    files = [
        write_file(storage, directory, f"tokenizer/{name}", [data]) for name, data in tokenizer_files(tokenizer).items()
    ]
    bad, counts, stats = BadRowCounter(settings.max_bad_rows), dict[str, RowCounts](), {}
    with tempfile.TemporaryDirectory() as folder, encoder as encode:
        for name in names or (["train", "eval"] if settings.eval else ["train"]):
            counts[name] = RowCounts()
            path = Path(folder) / f"{name}.arrow"
            split = Split(config, name, chosen, limit)
            with closing(encode(task, split)) as pieces:
                stats[name] = _write(task, _samples(pieces, bad, counts[name]), split, path, counts[name], bad.first)
            with path.open("rb") as file:
                chunks = iter(partial(file.read, BLOCK_BYTES), b"")
                files.append(write_file(storage, directory, f"{name}.arrow", chunks))
    notes = [f"skipped {bad.count} unusable rows, the first: {'; '.join(bad.first)}"]
    prepared = Prepared(
        fingerprint=fingerprint,
        directory=directory,
        num_samples=stats["train"].num_samples if "train" in stats else 0,
        num_eval_samples=stats["eval"].num_samples if "eval" in stats else 0,
        num_rows={name: item.rows for name, item in counts.items()},
        num_bad_rows=bad.count,
        num_tokens={name: item.num_tokens for name, item in stats.items()},
        num_dropped_tokens={name: item.num_dropped_tokens for name, item in stats.items()},
        facts=facts,
        notes=(*chosen.notes, *facts.get("notes", ()), *(notes if bad.count else ())),
        files=tuple(files),
        longest={name: item.longest for name, item in stats.items()},
        num_cut={name: item.cut for name, item in counts.items()},
        num_empty={name: item.empty for name, item in counts.items()},
    )
    if limit is None and data_fingerprint(config, fingerprint) != fingerprint:
        hint = "run the same command again when no process writes to them"
        raise ConfigError("the data files changed while they were read", hint=hint)
    body = asdict(prepared)
    storage.put(f"{directory}/{_DATA_MANIFEST}", [json.dumps({**body, "digest": _digest(body)}, indent=1).encode()])
    return prepared


@dataclass(slots=True)
class RowCounts:
    """Counts of a split's usable rows."""

    rows: int = 0  #: all of them
    cut: int = 0  #: truncated ones
    empty: int = 0  #: those without a token of their own


def _records(config: TrainingConfig, chosen: ColumnMapping, limit: int | None) -> Iterator[Record]:
    """Read the training rows whose columns have the right types. Raises ConfigError for too many other rows."""
    split = Split(config, "train", chosen, limit)
    for row in usable_rows(split.rows(split.sources()), BadRowCounter(config.data.max_bad_rows), chosen.fault):
        yield chosen.record(row)


def _samples(pieces: Iterator[Piece], bad: BadRowCounter, counts: RowCounts) -> Iterator[Sample]:
    """Iterate over the samples; count the rows in `counts`, the unusable ones in `bad`, which may raise."""
    for piece in pieces:
        if isinstance(piece, OutlastError):
            bad.end()
            raise piece
        bad.see(piece.num_rows, piece.faults)
        if not bad.are_too_many:
            counts.rows += piece.num_rows - len(piece.faults)
            counts.cut += piece.num_cut
            counts.empty += piece.num_empty
            yield from piece.samples
    bad.end()


def _write(
    task: Task, samples: Iterator[Sample], split: Split, path: Path, counts: RowCounts, faults: Sequence[str]
) -> DatasetStats:
    settings = split.config.data
    stats = write_packed(samples, settings.max_length, path) if task.packs else write_samples(samples, path)
    if not stats.num_samples:
        raise _no_sample_error(task, split, counts.rows, stats.num_tokens, faults)
    return stats


def _no_sample_error(task: Task, split: Split, num_rows: int, num_tokens: int, faults: Sequence[str]) -> ConfigError:
    """Make the error of a split without a sample: `num_rows` are usable, `faults` are those of the first others."""
    settings = split.config.data
    source = settings.eval if split.name == "eval" and not split.is_share else settings.train
    where, hint = f"{source}: the {split.name} split has", "give it more rows"
    if split.is_share:
        where = f"data.eval: {settings.eval} of the rows of {source} are held out, and the {split.name} split has"
        which = "larger" if split.name == "eval" else "smaller"
        hint = f"set a {which} share, or data.eval to a file of its own"
    if not num_rows:
        reasons = "\n  ".join(["; the first unusable ones:", *faults]) if faults else ""
        return ConfigError(f"{where} no usable row{reasons}", hint=hint)
    rows = f"{num_rows:,} row{'' if num_rows == 1 else 's'}"
    if not task.packs:
        return ConfigError(f"{where} {rows} without any text", hint=hint)
    short = f"{num_tokens:,} tokens, less than one sample (data.max_length {settings.max_length})"
    hint = f"{hint if split.is_share else 'provide more text'}, or set a smaller data.max_length"
    return ConfigError(f"{where} {rows} with {short}", hint=hint)


def _model_facts(config: TrainingConfig, task: type[Task]) -> dict[str, Any]:
    """Return what the task's samples depend on in the pretrained model's configuration."""
    if config.model.path is None or task.model_facts.__func__ is Task.model_facts.__func__:  # type: ignore[attr-defined]
        return {}
    try:
        body, _ = transformers.PreTrainedConfig.get_config_dict(config.model.path)
    except (OSError, ValueError):  # loading the model reports it
        return {}
    return task.model_facts(body)


def _tokenizer(config: TrainingConfig, task: type[Task], chosen: ColumnMapping, limit: int | None) -> Tokenizer:
    if (named := _named_tokenizer(config)) is not None:
        return named
    texts = (text for record in _records(config, chosen, limit) for text in texts_in(list(record.values())))
    num_entries = config.model.tokenizer.train_bpe if config.model.tokenizer else None
    assert num_entries is not None
    return train_bpe(texts, num_entries, task.special_tokens, task.template)


def _named_tokenizer(config: TrainingConfig) -> Tokenizer | None:
    """Load the tokenizer that the settings name; None if it is trained on the data."""
    settings = config.model.tokenizer
    if settings is not None and settings.train_bpe is not None:
        return None
    path = settings.path if settings and settings.path else str(config.model.path)
    return load_tokenizer(path, config.model.add_tokens)
