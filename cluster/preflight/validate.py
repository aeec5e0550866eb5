"""Everything that can be known to be wrong with a run before anything is held: `outlast validate`.

By default nothing is written and nothing is read through: the first row of the data, the model's configuration, the
names in the storage. The deep check prepares the data and builds the model, as `outlast train` does before it starts
workers; what it prepares stays and is found there.
"""

from __future__ import annotations

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
from outlast.cluster.config.run_config import RunConfig, expand, load_run, override, read_run_file
from outlast.cluster.config.run_file import LocatedFinding, SettingsError, located_in
from outlast.trainers.config.model import is_hub_id
from outlast.trainers.config.task_names import is_dotted
from outlast.trainers.config.validation_errors import Path as Place
from outlast.trainers.config.validation_errors import SettingsFinding


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at.

    Attributes:
        key: The setting that is at fault unless the error names another.
        look: Raises the error.
        blocks: What it goes by; a fault there has been found already, or would be blamed on the wrong setting.
    """

    key: str
    look: Callable[[RunConfig], None]
    blocks: frozenset[str]


_KEY = re.compile(r"\b(?:model|data|train|checkpoint|scale|failure|track)(?:\.[a-z_]+)+\b")


def validate(path: str, overrides: Sequence[str] = (), *, deep: bool = False) -> list[LocatedFinding]:
    """What is wrong with a run file; empty when nothing is.

    Args:
        path: The run file.
        overrides: `key=value`, as for `load_run`.
        deep: Also prepare the data, build the model, and write to the storage.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        config: RunConfig | None = load_run(path, overrides)[0]
        wrong = list[LocatedFinding]()
    except SettingsError as error:
        wrong = list(error.findings)
        config = _without(path, overrides, [item.finding.path for item in wrong])
    if config is None:
        return wrong
    from outlast.trainers.user_code import make_importable

    make_importable(str(Path(path).parent.absolute()))
    config = config.at_home(Path(path).parent)
    doubtful = {str(item.finding.path[0]) for item in wrong}
    found = list(_findings(config, [check for check in _CHEAP if not check.blocks & doubtful]))
    if deep and not wrong and not found:
        found = list(_findings(config, _DEEP))
    seen = [*wrong, *located_in(found, read_run_file(path)[1], overrides)]
    return sorted(seen, key=lambda item: item.line or 0)


def unchecked(path: str, overrides: Sequence[str] = ()) -> list[str]:
    """What a check of a run file without faults leaves open, in words."""
    config = load_run(path, overrides)[0].at_home(Path(path).parent)
    given = config.model.path or ""
    if is_hub_id(given):
        return [
            f"model.path {given} is taken for a name on the hub, which nobody was asked for (a directory: ./{given})"
        ]
    return []


def _without(path: str, overrides: Sequence[str], wrong: Sequence[Place]) -> RunConfig | None:
    """The settings but for the wrong ones, so that the others can be looked at; None where that makes no run."""
    try:
        declared = read_run_file(path)[0]
        for item in overrides:
            override(declared, item)
        for *block, key in wrong:
            inner: Any = declared
            for part in block:
                inner = inner[part]
            inner.pop(key, None)
        declared.setdefault("name", "unnamed")
        return RunConfig.model_validate(expand(declared))
    except (ConfigError, ValueError, LookupError, TypeError):  # too little is left
        return None


def _findings(config: RunConfig, checks: Sequence[Check]) -> Iterator[SettingsFinding]:
    said = set()
    for check in checks:
        try:
            check.look(config)
        except OutlastError as error:
            named = _KEY.search(error.message) if isinstance(error, ConfigError) else None
            place = named[0] if named else check.key
            if error.message not in said:  # one mistake may be in the way of several checks
                said.add(error.message)
                yield SettingsFinding(tuple(place.split(".")), error.message, error.hint)


def _code(config: RunConfig) -> None:
    from outlast.trainers.checks.preflight import check_code

    check_code(config)


def _architecture(config: RunConfig) -> None:
    from outlast.trainers.checks.preflight import check_architecture

    check_architecture(config)


def _columns(config: RunConfig) -> None:
    from outlast.trainers.data.columns import choose_columns
    from outlast.trainers.data.readers import first_row
    from outlast.trainers.tasks.registry import find_task

    chosen = choose_columns(find_task(config.model.task).columns, config.data)
    there = first_row(config.data.train)
    values = [there.get(name) for name in chosen.names]
    fault = chosen.fault(values) if there and any(value is not None for value in values) else None
    if fault and not config.data.max_bad_rows:
        raise ConfigError(
            f"the first row of data.train cannot be used: {fault}", hint="mend it, or set data.max_bad_rows"
        )


def _eval_columns(config: RunConfig) -> None:
    """That the held-out rows have the columns that were found in the training rows."""
    from outlast.trainers.data.columns import choose_columns
    from outlast.trainers.data.readers import first_row, no_column
    from outlast.trainers.tasks.registry import find_task

    source = config.data.eval
    if not source or config.data.eval_share:
        return
    there = first_row(source)
    chosen = choose_columns(find_task(config.model.task).columns, config.data)
    missing = [name for name in chosen.names if name not in there] if there else []
    if missing:
        raise no_column(str(source), missing, there, "give it the columns of data.train")


def _batch(config: RunConfig) -> None:
    from outlast.trainers.data.sampler import make_plan

    make_plan(config, 1, config.scale.max_workers)


def _metric(config: RunConfig) -> None:
    """Without having read the rows, from which alone sequence-classification may know what it predicts."""
    from outlast.trainers.checks.preflight import check_metric

    if is_dotted(config.model.task):
        return  # its scores may follow from anything in the rows
    problems = [config.data.problem] if config.data.problem else ["single-label", "regression"]
    refused = list[ConfigError]()
    for problem in problems:
        try:
            check_metric(config, {"problem": problem})
        except ConfigError as error:
            refused.append(error)
    if len(refused) == len(problems):
        raise refused[0]


def _trackers(config: RunConfig) -> None:
    from outlast.trainers.tracking.follow import check_trackers

    check_trackers(config.track)


def _storage(config: RunConfig) -> None:
    storage = open_storage(config.checkpoint.storage)
    storage.list(config.name)
    if isinstance(storage, LocalStorage):
        place = Path(storage.url)
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if not there.is_dir():
            raise ConfigError(
                f"checkpoint.storage {place}: {there} is a file, where a directory is needed", hint="name another place"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"checkpoint.storage {place}: {there} is not writable", hint="name another place")


def check_begun(config: RunConfig) -> None:
    """Raises ConfigError if a run of this name has begun in the storage, and with other settings."""
    from outlast.trainers.checks.resume_checks import check_unchanged

    _storage(config)
    check_unchanged(build_catalog(config.store).declaration, config, None)


def _prepared(config: RunConfig) -> None:
    from outlast.trainers.checks.preflight import check_metric, check_model
    from outlast.trainers.preparation.prepare import prepare

    storage = open_storage(config.checkpoint.storage)
    prepared = prepare(config, storage)
    check_metric(config, prepared.facts)
    check_model(config, prepared, storage)


def _writable(config: RunConfig) -> None:
    storage = open_storage(config.checkpoint.storage)
    name = f".validate-{secrets.token_hex(4)}"
    storage.put(name, [b"outlast"])
    storage.delete(name)


_ALL = frozenset(RunConfig.model_fields)
_CHEAP = (
    Check("data.train", _columns, frozenset({"model", "data"})),
    Check("data.eval", _eval_columns, frozenset({"model", "data"})),
    Check("model", _code, frozenset({"model"})),
    Check("model.path", _architecture, frozenset({"model"})),
    Check("train.batch", _batch, frozenset({"train", "scale"})),
    Check("checkpoint.metric", _metric, frozenset({"model", "data", "train", "checkpoint"})),
    Check("track.to", _trackers, frozenset({"track"})),
    Check("checkpoint.storage", _storage, frozenset({"checkpoint"})),
    Check("name", check_begun, _ALL),
)
_DEEP = (Check("data", _prepared, _ALL), Check("checkpoint.storage", _writable, _ALL))
