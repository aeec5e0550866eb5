"""References to runs: a directory, a URI, a run file or a bare name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import ConfigError, OutlastError, StorageError
from outlast.checkpointing.run_store.claims import read_claim
from outlast.checkpointing.tools.query import existing_attempts

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.retention import Retention
    from outlast.checkpointing.storage.base import Storage


RUN_FILES = (".yaml", ".yml", ".toml")


def find_run(text: str, root: str) -> tuple[Storage, str, Retention]:
    """What RUN means: a run file, a run's directory or URI, or a name under `root`.

    Returns:
        The storage, the run's name, and what best means there.
    """
    from outlast.checkpointing.format.layout import check_run_name
    from outlast.checkpointing.storage.factory import open_storage

    if text.endswith(RUN_FILES):
        from outlast.cluster.config.run_config import load_run

        config = load_run(text)[0].at_home(Path(text).parent)
        return open_storage(config.checkpoint.storage), config.name, config.checkpoint.retention
    text = text.rstrip("/")
    if Path(text, "config.json").is_file():
        raise ConfigError(
            f"{text} is a model, not a run",
            hint="name the run that it is of, and the checkpoint by its step; `from_pretrained` reads the model itself",
        )
    if "/" in text or Path(text, "attempts").is_dir():
        whole = text if "://" in text else str(Path(text).absolute())
        root, _, text = whole.rpartition("/")
    place, name = open_storage(root), check_run_name(text)
    place.list(name)  # not with the patience that others have: the place may be wrong
    return place, name, _retention_of(place, name)


def _retention_of(storage: Storage, run: str) -> Retention:
    """What best means to a run, by its newest claim; the default for a run that cannot say."""
    from pydantic import ValidationError

    from outlast.checkpointing.run_store.retention import Retention
    from outlast.cluster.config.run_config import expand
    from outlast.trainers.config.checkpoint import CheckpointSettings

    try:
        declared = declared_settings(storage, run).get("checkpoint", {})
        return CheckpointSettings.model_validate(expand(declared)).retention
    except (OutlastError, ValidationError):
        return Retention()


def declared_settings(storage: Storage, run: str) -> dict[str, Any]:
    """The settings of the run's newest claim, as their user wrote them.

    Raises:
        ConfigError: There is no such run.
        StorageError: No claim can be read.
    """
    for attempt in reversed(existing_attempts(storage, run)):
        if settings := read_claim(storage, run, attempt).get("settings"):
            return dict(settings)
    raise StorageError(f"run {run!r} in {storage.url} holds no claim with settings", hint="give the run file instead")
