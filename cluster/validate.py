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
from pathlib import Path

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.lineage import catalogue
from outlast.checkpointing.storage import LocalStorage, open_storage
from outlast.cluster.config import RunConfig, load_run, read_run_file
from outlast.cluster.run_file import Located, SettingsError, located_in
from outlast.trainers.findings import Finding
from outlast.trainers.inputs import is_hub_id

Check = Callable[[RunConfig], None]
_KEY = re.compile(r"\b(?:model|data|train|checkpoint|scale|failure|track)(?:\.[a-z_]+)+\b")


def validate(path: str, overrides: Sequence[str] = (), *, deep: bool = False) -> list[Located]:
    """What is wrong with a run file; empty when nothing is.

    Args:
        path: The run file.
        overrides: `key=value`, as for `load_run`.
        deep: Also prepare the data, build the model, and write to the storage.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        config = load_run(path, overrides)[0]
    except SettingsError as error:
        return list(error.findings)
    from outlast.trainers.custom import make_importable

    make_importable(str(Path(path).parent.absolute()))
    found = list(_findings(config.at_home(Path(path).parent), _CHEAP))
    if deep and not found:
        found = list(_findings(config.at_home(Path(path).parent), {"data": _prepared, "checkpoint.storage": _writable}))
    return located_in(found, read_run_file(path)[1], overrides)


def not_looked_at(path: str, overrides: Sequence[str] = ()) -> list[str]:
    """What a check of a run file without faults leaves open, in words."""
    config = load_run(path, overrides)[0].at_home(Path(path).parent)
    given = config.model.path or ""
    if is_hub_id(given):
        return [
            f"model.path {given} is taken for a name on the hub, which nobody was asked for (a directory: ./{given})"
        ]
    return []


def _findings(config: RunConfig, checks: dict[str, Check]) -> Iterator[Finding]:
    said = set()
    for key, check in checks.items():
        try:
            check(config)
        except OutlastError as error:
            named = _KEY.search(error.message) if isinstance(error, ConfigError) else None
            place = named[0] if named else key
            if error.message not in said:  # one mistake may be in the way of several checks
                said.add(error.message)
                yield Finding(tuple(place.split(".")), error.message, error.hint)


def _code(config: RunConfig) -> None:
    from outlast.trainers.preflight import check_code

    check_code(config)


def _architecture(config: RunConfig) -> None:
    from outlast.trainers.preflight import check_architecture

    check_architecture(config)


def _columns(config: RunConfig) -> None:
    from outlast.trainers.columns import choose_columns
    from outlast.trainers.registry import find_task
    from outlast.trainers.rows import first_row

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
    from outlast.trainers.columns import choose_columns
    from outlast.trainers.registry import find_task
    from outlast.trainers.rows import first_row, no_column

    source = config.data.eval
    if not source or config.data.eval_share:
        return
    there = first_row(source)
    chosen = choose_columns(find_task(config.model.task).columns, config.data)
    missing = [name for name in chosen.names if name not in there] if there else []
    if missing:
        raise no_column(str(source), missing, there, "give it the columns of data.train")


def _batch(config: RunConfig) -> None:
    from outlast.trainers.loop import make_plan

    make_plan(config, 1, config.scale.max_workers)


def _trackers(config: RunConfig) -> None:
    from outlast.trainers.trackers import check_trackers

    check_trackers(config.track)


def _storage(config: RunConfig) -> None:
    """The place, and against the run of this name, if it has begun."""
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
    from outlast.trainers.attempt import check_unchanged

    check_unchanged(catalogue(storage, config.name).declaration, config, None)


def _prepared(config: RunConfig) -> None:
    from outlast.trainers.data import prepare
    from outlast.trainers.preflight import check_metric, check_model

    storage = open_storage(config.checkpoint.storage)
    prepared = prepare(config, storage)
    check_metric(config, prepared.facts)
    check_model(config, prepared, storage)


def _writable(config: RunConfig) -> None:
    storage = open_storage(config.checkpoint.storage)
    name = f".validate-{secrets.token_hex(4)}"
    storage.put(name, [b"outlast"])
    storage.delete(name)


_CHEAP: dict[str, Check] = {
    "data.train": _columns,
    "data.eval": _eval_columns,
    "model": _code,
    "model.path": _architecture,
    "train.batch": _batch,
    "track.to": _trackers,
    "checkpoint.storage": _storage,
}
