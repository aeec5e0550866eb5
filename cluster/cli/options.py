"""What the verbs share: how a run is named on the command line, and the options that mean the same everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlast.checkpointing.errors import ConfigError, OutlastError

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.retention import Retention
    from outlast.checkpointing.storage.base import Storage

RUN_FILES = (".yaml", ".yml", ".toml")

Address = Annotated[
    str | None, typer.Option(help="The cluster's job server, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its run file, or its name.")]
Root = Annotated[str, typer.Option("--storage", help="Where runs named by name lie.")]
Code = Annotated[
    Path | None,
    typer.Option(help="Where your own Python files lie; default: beside the run file, or here."),
]
Base = Annotated[str | None, typer.Option(help="Of an adapter: where the model beneath lies; default: where it lay.")]
Trusted = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that lies in the checkpoint run.")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a setting.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ConfigError if what was asked for cannot be written there."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="name another place") from error


def bring_code(run: str, code: Path | None) -> None:
    """Makes the user's own modules importable: those in `code`, and those beside the run file, or here."""
    from outlast.trainers.models.custom_model import make_importable

    for folder in (code, Path(run).parent if run.endswith(RUN_FILES) else Path()):
        if folder is not None:
            make_importable(str(folder.absolute()))


def find_run(text: str, root: str) -> tuple[Storage, str, Retention]:
    """What RUN means: a run file, a run's directory or URI, or a name under `root`.

    Returns:
        The storage, the run's name, and what best means there.
    """
    from outlast.checkpointing.format.layout import check_run_name
    from outlast.checkpointing.storage.base import open_storage

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
    from outlast.cluster.monitoring.status import declared_settings
    from outlast.trainers.config.training_config import CheckpointSettings

    try:
        declared = declared_settings(storage, run).get("checkpoint", {})
        return CheckpointSettings.model_validate(expand(declared)).retention
    except (OutlastError, ValidationError):
        return Retention()
