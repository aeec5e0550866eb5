"""`outlast validate`: all errors of a run that can be found before any resources are allocated.

By default it must write nothing, and reads little: the first row of the data, the model's configuration, a listing of
the storage. The deep check prepares the data and builds the model, as `outlast train` does before it starts workers;
the prepared data is kept for the run.
"""

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
from outlast.trainers.checks.dry_step import dry_step
from outlast.trainers.checks.model_checks import check_architecture, check_code, check_metric, check_model
from outlast.trainers.checks.resume_checks import check_unchanged
from outlast.trainers.config.model import is_hub_id
from outlast.trainers.config.task_table import is_dotted
from outlast.trainers.config.validation_errors import Path as KeyPath
from outlast.trainers.config.validation_errors import SettingsFinding
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.data.columns import choose_columns
from outlast.trainers.data.readers import first_row
from outlast.trainers.data.sources import missing_column_error
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tracking.follow import check_trackers
from outlast.trainers.user_code import make_importable


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    key: str  #: the setting to report unless the error names another
    run: Callable[[RunConfig], object]  #: it raises OutlastError
    blocks: frozenset[str]  #: blocks of settings that it reads; it is skipped if one of them is invalid


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
    """Return what `validate` does not verify of a valid run file, one sentence each."""
    config = load_run(path, overrides)[0].at_home(Path(path).parent)
    path_or_id = config.model.path or ""
    if is_hub_id(path_or_id):
        return [f"model.path {path_or_id} is taken for a hub id and was not checked (a directory: ./{path_or_id})"]
    return []


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
    reported = set()
    for check in checks:
        try:
            check.run(config)
        except OutlastError as error:
            match = _KEY.search(error.message) if isinstance(error, ConfigError) else None
            key = match[0] if match else check.key
            if error.message not in reported:  # one mistake may fail several checks
                reported.add(error.message)
                yield SettingsFinding(tuple(key.split(".")), error.message, error.hint)


def _columns(config: RunConfig) -> None:
    chosen = choose_columns(find_task(config.model.task).columns, config.data)
    row = first_row(config.data.train, config.data.csv)
    values = [row.get(name) for name in chosen.names]
    fault = chosen.fault(values) if row and any(value is not None for value in values) else None
    if fault and not config.data.max_bad_rows:
        raise ConfigError(
            f"the first row of data.train cannot be used: {fault}", hint="fix it, or set data.max_bad_rows"
        )


def _eval_columns(config: RunConfig) -> None:
    """Check that the held-out rows have the columns chosen from the training rows."""
    source = config.data.eval
    if not source or config.data.eval_share:
        return
    row = first_row(source, config.data.csv)
    chosen = choose_columns(find_task(config.model.task).columns, config.data)
    missing = [name for name in chosen.names if name not in row] if row else []
    if missing:
        raise missing_column_error(str(source), missing, row, "give it the columns of data.train")


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


def _storage(config: RunConfig) -> None:
    storage = open_storage(config.checkpoint.storage)
    storage.list(config.name)
    if isinstance(storage, LocalStorage):
        path = Path(storage.url)
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not existing.is_dir():
            raise ConfigError(f"checkpoint.storage {path}: {existing} is not a directory", hint="name another path")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"checkpoint.storage {path}: {existing} is not writable", hint="name another path")


def check_existing_run(config: RunConfig) -> None:
    """Raise ConfigError if a run of this name exists in the storage with other settings."""
    _storage(config)
    check_unchanged(build_catalog(config.store).declaration, config, None)


def _prepare(config: RunConfig, note: Callable[[str], object]) -> None:
    storage = open_storage(config.checkpoint.storage)
    prepared = prepare(config, storage)
    check_metric(config, prepared.facts)
    model = check_model(config, prepared, storage)[0]
    found = dry_step(
        config, prepared, storage, model, num_workers=config.scale.max_workers, on_gpu=config.scale.gpus_per_worker > 0
    )
    for text in found.notes:
        note(text)


def _write(config: RunConfig) -> None:
    storage = open_storage(config.checkpoint.storage)
    name = f".validate-{secrets.token_hex(4)}"
    storage.put(name, [b"outlast"])
    storage.delete(name)


_ALL = frozenset(RunConfig.model_fields)
_CHEAP = (
    Check("data.train", _columns, frozenset({"model", "data"})),
    Check("data.eval", _eval_columns, frozenset({"model", "data"})),
    Check("model", check_code, frozenset({"model"})),
    Check("model.path", check_architecture, frozenset({"model"})),
    Check("train.batch", lambda config: make_plan(config, 1, config.scale.max_workers), frozenset({"train", "scale"})),
    Check("checkpoint.metric", _metric, frozenset({"model", "data", "train", "checkpoint"})),
    Check("track.to", lambda config: check_trackers(config.track), frozenset({"track"})),
    Check("checkpoint.storage", _storage, frozenset({"checkpoint"})),
    Check("name", check_existing_run, _ALL),
)


def _deep_checks(note: Callable[[str], object]) -> tuple[Check, ...]:
    return Check("data", lambda config: _prepare(config, note), _ALL), Check("checkpoint.storage", _write, _ALL)
