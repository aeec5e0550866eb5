"""References to runs: a directory, a URI, a run file or a bare name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import ConfigError, OutlastError, StorageError
from outlast.checkpointing.run_store.claims import read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.query import existing_attempts

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.retention import Retention


RUN_FILES = (".yaml", ".yml", ".toml")


def find_run(text: str, root: str) -> tuple[RunStore, Retention]:
    """What RUN means: a run file, a run's directory or URI, or a name under `root`.

    Returns:
        The run, and what best means there.
    """
    from outlast.checkpointing.format.layout import check_run_name
    from outlast.checkpointing.storage.factory import open_storage

    if text.endswith(RUN_FILES):
        from outlast.cluster.config.run_config import load_run

        config = load_run(text)[0].at_home(Path(text).parent)
        return config.store, config.checkpoint.retention
    text = text.rstrip("/")
    if Path(text, "config.json").is_file():
        raise ConfigError(
            f"{text} is a model, not a run",
            hint="name the run that it is of, and the checkpoint by its step; `from_pretrained` reads the model itself",
        )
    if "/" in text or Path(text, "attempts").is_dir():
        whole = text if "://" in text else str(Path(text).absolute())
        root, _, text = whole.rpartition("/")
    store = RunStore(open_storage(root), check_run_name(text))
    store.storage.list(store.run)  # not with the patience that others have: the place may be wrong
    return store, _retention_of(store)


def _retention_of(store: RunStore) -> Retention:
    """What best means to a run, by its newest claim; the default for a run that cannot say."""
    from pydantic import ValidationError

    from outlast.checkpointing.run_store.retention import Retention
    from outlast.cluster.config.run_config import expand
    from outlast.trainers.config.checkpoint import CheckpointSettings

    try:
        declared = declared_settings(store).get("checkpoint", {})
        return CheckpointSettings.model_validate(expand(declared)).retention
    except (OutlastError, ValidationError):
        return Retention()


def declared_settings(store: RunStore) -> dict[str, Any]:
    """The settings of the run's newest claim, as their user wrote them.

    Raises:
        ConfigError: There is no such run.
        StorageError: No claim can be read.
    """
    for attempt in reversed(existing_attempts(store)):
        if settings := read_claim(store, attempt).get("settings"):
            return dict(settings)
    raise StorageError(
        f"run {store.run!r} in {store.storage.url} holds no claim with settings", hint="give the run file instead"
    )
