"""References to runs on the command line: a directory, a URI, a run file or a name. They must not create a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import ConfigError, OutlastError, StorageError
from outlast.checkpointing.storage.location import is_url

if TYPE_CHECKING:  # every command imports this module; `outlast --help` needs no more of it than RUN_FILES
    from outlast.checkpointing.run_store.retention_policy import Retention
    from outlast.checkpointing.run_store.store import RunStore
    from outlast.cluster.config.run_config import RunConfig
    from outlast.trainers.config.trust import Trust

#: TOML is no longer supported; reading a TOML file raises an error that explains it.
RUN_FILES = (".yaml", ".yml", ".toml")
#: Variable of a driver that a client started: the command with which the client resumes the run.
RESUME_VARIABLE = "OUTLAST_RESUME"


def find_run(text: str, root: str) -> tuple[RunStore, Retention]:
    """Resolve RUN: a run file, a run's directory or URI, or a name under `root`.

    Returns:
        The run, and the retention settings that define its best checkpoint: those of its newest claim, or the default.
    """
    from pydantic import ValidationError

    from outlast.checkpointing.format.layout import check_run_name
    from outlast.checkpointing.run_store.retention_policy import Retention
    from outlast.checkpointing.run_store.store import RunStore
    from outlast.checkpointing.storage.factory import open_storage
    from outlast.cluster.config.run_file import expand, load_run
    from outlast.trainers.config.checkpoint import CheckpointSettings

    if text.endswith(RUN_FILES):
        config = load_run(text)[0].at_home(Path(text).parent)
        return config.store, config.checkpoint.retention
    if Path(text, "config.json").is_file():
        hint = "give the run and a checkpoint's step; `from_pretrained` reads the model itself"
        raise ConfigError(f"{text.rstrip('/')} is a model, not a run", hint=hint)
    place, name = _split(text)
    store = RunStore(open_storage(root if place is None else place), check_run_name(name))
    store.storage.list(store.run)  # no retries: the path may be mistyped
    try:
        declared = declared_settings(store).get("checkpoint", {})
        return store, CheckpointSettings.model_validate(expand(declared)).retention
    except (OutlastError, ValidationError):
        return store, Retention()


def run_name(text: str) -> str:
    """Return the run's name from any form of RUN, without looking for the run. Raises ConfigError if it is none."""
    if text.endswith(RUN_FILES):
        from outlast.cluster.config.run_file import load_run

        return load_run(text, elsewhere=True)[0].name
    from outlast.checkpointing.format.layout import check_run_name

    return check_run_name(_split(text)[1])


def _split(text: str) -> tuple[str | None, str]:
    """Return the storage and the name of a run that is a directory or a URI; None and the text if it is a name.

    Raises ConfigError if nothing is left for a name.
    """
    full, is_uri = text, is_url(text)
    text, mark, options = text.partition("?") if is_uri else (text, "", "")
    if "/" in options:  # of the storage, as in `s3://bucket/runs?region=x/my-run`
        options, _, name = options.rstrip("/").rpartition("/")
        return f"{text}?{options}", name
    text = text.rstrip("/") or text
    if not is_uri and Path(text).name in ("", "..") and _is_run(Path(text)):  # such as `.`
        text = str(Path(text).resolve())
    elif not is_uri and ("/" in text or _is_run(Path(text))):
        text = str(Path(text).absolute())
    elif is_uri and "/" not in text.partition("://")[2]:
        text = f"{text}/"  # a bucket alone, as `s3://bucket/$RUN` is while RUN is unset
    place, slash, name = text.rpartition("/")
    if not name.strip():
        hint = "give a run's name or its run file; a shell variable that is not set is empty"
        raise ConfigError(f"{full!r} names no run", hint=hint)
    return (f"{place}{mark}{options}" if slash else None), name


def _is_run(folder: Path) -> bool:
    return (folder / "attempts").is_dir() or (folder / "launches").is_dir()


def declared_settings(store: RunStore) -> dict[str, Any]:
    """Return the settings of the run's newest claim, as written; ConfigError if there is no such run."""
    from outlast.checkpointing.run_store.claims import read_claim
    from outlast.checkpointing.tools.query import existing_attempts

    for attempt in reversed(existing_attempts(store)):
        if settings := read_claim(store, attempt).get("settings"):
            return dict(settings)
    problem = f"run {store.run!r} in {store.storage.url} has no claim with settings"
    raise StorageError(problem, hint="give the run file instead")


def stored_config(
    run: str, store: RunStore, overrides: Sequence[str], *, trusted: bool, elsewhere: bool = False
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the settings of the run's newest claim, to run it again: as `load_run` does.

    Raises ConfigError also if they name code that is not trusted, or another run than `store`.
    """
    from outlast.checkpointing.storage.location import parse_location
    from outlast.cluster.config.run_file import settings_of
    from outlast.trainers.config.trust import named_code

    config, declared = settings_of(declared_settings(store), run, overrides, elsewhere=elsewhere)
    user_trust(run, overrides, trusted).check_code(named_code(config), f"run {store.run!r}")
    place = config.checkpoint.storage
    parsed = parse_location(place)
    if isinstance(parsed, Path):
        is_elsewhere = parsed.is_absolute() and parsed.resolve() != Path(store.storage.url).resolve()
    else:
        is_elsewhere = parsed.split("?")[0].rstrip("/") != store.storage.url.split("?")[0]
    if config.name != store.run or is_elsewhere:
        raise ConfigError(
            f"the settings of {store.url} are those of {place}/{config.name}, which would be written to",
            hint=f"name the run file that you wrote; or, if it was moved: -s checkpoint.storage={store.storage.url}",
        )
    return config, declared


def user_trust(run: str, overrides: Sequence[str], trusted: bool) -> Trust:
    """Return what the user wrote: the settings of RUN if it is a run file, and the -s options."""
    from outlast.cluster.config.run_file import load_run, override
    from outlast.trainers.config.trust import Trust, named_code

    if run.endswith(RUN_FILES):
        config = load_run(run, overrides)[0].at_home(Path(run).parent)
        return Trust(trusted, {**named_code(config), "model.path": config.model.path})
    given: dict[str, Any] = {}
    for item in overrides:
        override(given, item)
    model, train = (block if isinstance(block := given.get(name), dict) else {} for name in ("model", "train"))
    return Trust(
        trusted, {f"model.{key}": item for key, item in model.items()} | {"train.optimizer": train.get("optimizer")}
    )
