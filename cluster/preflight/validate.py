"""`outlast validate`: all errors of a run that can be found before any resources are allocated.

By default it must write nothing, and reads little: the first row of the data, the model's configuration, a listing of
the storage. The deep check prepares the data and builds the model, as `outlast train` does before it starts workers;
the prepared data is kept for the run.
"""

import contextlib
import itertools
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_file import (
    LocatedFinding,
    SettingsError,
    expand,
    load_run,
    locate_findings,
    override,
    read_run_file,
)
from outlast.cluster.preflight.doctor_probe import mount_of
from outlast.trainers.checks.dry_step import dry_step
from outlast.trainers.checks.model_checks import check_architecture, check_code, check_metric, check_model
from outlast.trainers.checks.pretrained_checks import check_pretrained
from outlast.trainers.checks.resume_checks import changed_settings
from outlast.trainers.config.model import is_hub_id
from outlast.trainers.config.task_table import is_dotted
from outlast.trainers.config.validation_errors import Path as KeyPath
from outlast.trainers.config.validation_errors import SettingsFinding
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.data.chat_template import missing_template_error
from outlast.trainers.data.columns import ColumnMapping, choose_columns
from outlast.trainers.data.readers import first_row, read_rows
from outlast.trainers.data.sources import missing_column_error
from outlast.trainers.data.tokenizer import has_chat_template
from outlast.trainers.preparation.data_summary import describe_summary, summarize_data
from outlast.trainers.preparation.held_out import check_held_out
from outlast.trainers.preparation.prepare import LARGE_BYTES, Prepared, data_fingerprint, prepare, stored_bytes
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tracking.follow import check_trackers
from outlast.trainers.user_code import make_importable


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    key: str  #: the setting to report unless the error names another
    run: Callable[[RunConfig], object]  #: it raises OutlastError, or returns a list of findings
    blocks: frozenset[str]  #: blocks of settings that it reads; it is skipped if one of them is invalid


#: Types of file systems that hold no files of users, whatever their permissions state.
_NO_FILES = ("proc", "sysfs", "cgroup", "cgroup2", "devpts", "debugfs", "securityfs", "tracefs")
#: Larger data is compared with an existing run's by --deep only: it takes longer than a second to read.
_QUICK_BYTES = LARGE_BYTES
_KEY = re.compile(r"\b(?:model|data|train|checkpoint|scale|failure|track)(?:\.[a-z_]+)+\b")


def validate(
    path: str, overrides: Sequence[str] = (), *, deep: bool = False, note: Callable[[str], object] = lambda _: None
) -> list[LocatedFinding]:
    """Return all errors of a run file; `deep` also prepares the data, builds the model, and writes to the storage.

    Args:
        path: The run file.
        overrides: Settings from the command line.
        deep: Whether to make the deep checks too.
        note: Receives what the deep checks could not try, and what they found that is no error, one sentence each.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        config: RunConfig | None = load_run(path, overrides)[0]
        invalid = list[LocatedFinding]()
    except SettingsError as error:
        invalid = list(error.findings)
        config = _load_without(path, overrides, [item.finding.path for item in invalid])
    if config is None:
        return invalid
    make_importable(str(Path(path).parent.absolute()))
    config = config.at_home(Path(path).parent)
    invalid_blocks = {str(item.finding.path[0]) for item in invalid}
    found = list(_findings(config, [check for check in _CHEAP if not check.blocks & invalid_blocks]))
    if deep and not invalid and not found:
        found = list(_findings(config, _deep_checks(note)))
    located = [*invalid, *locate_findings(found, read_run_file(path)[1], overrides)]
    return sorted(located, key=lambda item: item.line or 0)


def unverified(path: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return what `validate` guesses or does not verify of a valid run file, one sentence each."""
    config = load_run(path, overrides)[0].at_home(Path(path).parent)
    found = list(_chosen(config).notes)
    path_or_id = config.model.path or ""
    if is_hub_id(path_or_id):
        found.append(f"model.path {path_or_id} is taken for a hub id and was not checked (a directory: ./{path_or_id})")
    cpus = config.scale.min_workers * (config.scale.cpus_per_worker or 0)
    if cpus > (here := os.cpu_count() or 1):
        found.append(f"scale: the workers need {cpus:g} CPUs, and this machine has {here}; a cluster may have more")
    if stored_bytes(config.data) >= _QUICK_BYTES and build_catalog(config.store).declaration:
        found.append(f"run {config.name!r} exists; whether its data is the same is checked with --deep only")
    return found


def _load_without(path: str, overrides: Sequence[str], invalid: Sequence[KeyPath]) -> RunConfig | None:
    """Load the settings without the invalid ones, to check the rest; None if too little is left."""
    try:
        declared = read_run_file(path)[0]
        for item in overrides:
            override(declared, item)
        for *block, key in invalid:
            inner: Any = declared
            for part in block:
                inner = inner[part]
            inner.pop(key, None)
        declared.setdefault("name", "unnamed")
        return RunConfig.model_validate(expand(declared))
    except (ConfigError, ValueError, LookupError, TypeError):
        return None


def _findings(config: RunConfig, checks: Sequence[Check]) -> Iterator[SettingsFinding]:
    reported, paths = set[str](), set[KeyPath]()
    for check in checks:
        try:
            result = check.run(config)
            found = result if isinstance(result, list) else []
        except OutlastError as error:
            match = _KEY.search(error.message) if isinstance(error, ConfigError) else None
            key = match[0] if match else check.key
            found = [SettingsFinding(_path_of(key, error.message, config), error.message, error.hint)]
            if error.message in reported:  # one mistake may fail several checks
                continue
            reported.add(error.message)
        else:
            found = [item for item in found if item.path not in paths]
        paths |= {item.path for item in found}
        yield from found


def _path_of(key: str, message: str, config: RunConfig) -> KeyPath:
    """Return the path of a setting; of a list of data files, that of the one which the message names."""
    places = {name: place for name, place in config.data.places.items() if name.startswith(f"{key}[")}
    named = [name for name, place in places.items() if place in message]
    if not named:
        return tuple(key.split("."))
    most_specific = max(named, key=lambda name: len(places[name]))
    return *key.split("."), int(most_specific.removeprefix(f"{key}[").removesuffix("]"))


def _chosen(config: RunConfig) -> ColumnMapping:
    task = find_task(config.model.task)
    return choose_columns(task.columns, config.data, task.forms)


def _check_first_row(config: RunConfig, key: str, source: str | Sequence[str]) -> None:
    """Raise ConfigError if the first row cannot be used, as the preparation of the data would."""
    chosen = _chosen(config)
    for row in itertools.islice(read_rows(source, chosen.names, config.data.csv, chosen.sparse_names), 1):
        fault = row.fault or chosen.fault(row.values)
        if fault and not config.data.max_bad_rows:
            raise ConfigError(
                f"the first row of {key} cannot be used: {row.where}: {fault}",
                hint="fix it, or set data.max_bad_rows",
            )


def _columns(config: RunConfig) -> None:
    _check_first_row(config, "data.train", config.data.train)


def _eval_columns(config: RunConfig) -> None:
    """Check that the held-out rows have the columns chosen from the training rows."""
    source = config.data.eval
    if not source or config.data.eval_share:
        return
    row = first_row(source, config.data.csv)
    chosen = _chosen(config)
    missing = [name for name in chosen.names if name not in row and name not in chosen.sparse_names] if row else []
    if missing:
        raise missing_column_error(str(source), missing, row, "give it the columns of data.train")
    _check_first_row(config, "data.eval", source)


def _held_out(config: RunConfig) -> None:
    check_held_out(config, find_task(config.model.task), _chosen(config))


def _chat_template(config: RunConfig) -> None:
    """Raise ConfigError if a conversation has no chat template, as far as a local directory or none shows it."""
    tokenizer, path = config.model.tokenizer, config.model.path or ""
    if config.model.task != "chat" or config.data.chat_template is not None:
        return
    if tokenizer is not None and tokenizer.path:
        path = tokenizer.path
    is_trained = tokenizer is not None and tokenizer.train_bpe is not None
    if is_trained or (Path(path).is_dir() and not has_chat_template(path)):
        raise missing_template_error()


def _metric(config: RunConfig) -> None:
    """Check the metric without the rows; sequence-classification may find its problem type only there."""
    if is_dotted(config.model.task):
        return  # its metrics may depend on the rows
    problems = [config.data.problem] if config.data.problem else ["single-label", "regression"]
    errors = list[ConfigError]()
    for problem in problems:
        try:
            check_metric(config, {"problem": problem})
        except ConfigError as error:
            errors.append(error)
    if len(errors) == len(problems):
        raise errors[0]


def check_storage(config: RunConfig) -> None:
    """Raise ConfigError if the storage is a directory that is certainly not writable; it writes nothing."""
    storage = open_storage(config.checkpoint.storage)
    storage.list(config.name)
    if isinstance(storage, LocalStorage):
        path = Path(storage.url)
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not existing.is_dir():
            raise ConfigError(f"checkpoint.storage {path}: {existing} is not a directory", hint="name another path")
        if not os.access(existing, os.W_OK | os.X_OK) or mount_of(existing.resolve())[2] in _NO_FILES:
            raise ConfigError(f"checkpoint.storage {path}: {existing} is not writable", hint="name another path")


def compare_existing_run(config: RunConfig, fingerprint: str | None = None) -> list[SettingsFinding]:
    """Return the differences from a run of this name that exists in the storage, in settings and data.

    Without the data's fingerprint, files of less than `_QUICK_BYTES` are read to compare them.
    """
    check_storage(config)
    base = build_catalog(config.store).declaration
    with contextlib.suppress(ConfigError):  # data that cannot be read is reported by itself
        if base and not fingerprint and stored_bytes(config.data) < _QUICK_BYTES:
            fingerprint = data_fingerprint(config, base["data"])
    hint = f"run {config.name!r} exists: restore it, or start a new run with another `name:`"
    changed = changed_settings(base, config, fingerprint)
    return [SettingsFinding(tuple(key.split(".")), text, hint) for key, text in changed.items()]


@dataclass(slots=True)
class _Trial:
    """The deep checks of data and model; the second needs what the first prepared."""

    note: Callable[[str], object]
    prepared: Prepared | None = None

    def check_data(self, config: RunConfig) -> list[SettingsFinding]:
        started = build_catalog(config.store).declaration
        prepared = prepare(config, open_storage(config.checkpoint.storage), like=started.get("data"))
        if found := compare_existing_run(config, prepared.fingerprint):
            return found
        for text in (*prepared.notes, *describe_summary(summarize_data(config, prepared))):
            self.note(text)
        check_metric(config, prepared.facts)
        self.prepared = prepared
        return []

    def check_model(self, config: RunConfig) -> None:
        if self.prepared is None:
            return
        storage = open_storage(config.checkpoint.storage)
        model = check_model(config, self.prepared, storage)[0]
        for text in check_pretrained(config, self.prepared, storage, model):
            self.note(text)
        on_gpu = config.scale.gpus_per_worker > 0
        found = dry_step(config, self.prepared, storage, model, num_workers=config.scale.max_workers, on_gpu=on_gpu)
        for text in found.notes:
            self.note(text)


def _write(config: RunConfig) -> None:
    storage = open_storage(config.checkpoint.storage)
    name = f".validate-{secrets.token_hex(4)}"
    storage.put(name, [b"outlast"])
    storage.delete(name)


_ALL = frozenset(RunConfig.model_fields)
_CHEAP = (
    Check("data.train", _columns, frozenset({"model", "data"})),
    Check("data.eval", _eval_columns, frozenset({"model", "data"})),
    Check("data.eval", _held_out, frozenset({"model", "data"})),
    Check("data.chat_template", _chat_template, frozenset({"model", "data"})),
    Check("model", check_code, frozenset({"model"})),
    Check("model.path", check_architecture, frozenset({"model"})),
    Check("train.batch", lambda config: make_plan(config, 1, config.scale.max_workers), frozenset({"train", "scale"})),
    Check("checkpoint.metric", _metric, frozenset({"model", "data", "train", "checkpoint"})),
    Check("track.to", lambda config: check_trackers(config.track), frozenset({"track"})),
    Check("checkpoint.storage", check_storage, frozenset({"checkpoint"})),
    Check("name", compare_existing_run, _ALL),
)


def _deep_checks(note: Callable[[str], object]) -> tuple[Check, ...]:
    trial = _Trial(note)
    return (
        Check("data", trial.check_data, _ALL),
        Check("model", trial.check_model, _ALL),
        Check("checkpoint.storage", _write, _ALL),
    )
