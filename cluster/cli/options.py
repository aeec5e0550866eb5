"""What the verbs share: how a run is named on the command line, and the options that mean the same everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_reference import RUN_FILES

Address = Annotated[
    str | None, typer.Option(help="The cluster's job server, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")
]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its run file, or its name.")]
Root = Annotated[str, typer.Option("--storage", help="Where runs named by name lie.")]
Code = Annotated[
    Path | None,
    typer.Option(help="Where your own Python files lie; default: beside the run file, or here."),
]
Base = Annotated[str | None, typer.Option(help="Of an adapter: where the model beneath lies; default: where it lay.")]
Trusted = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that lies in the checkpoint run.")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a setting.")]
Ship = Annotated[bool, typer.Option(help="Send this outlast along, so that the cluster runs the same version.")]
SentCode = Annotated[
    Path | None, typer.Option("--code", help="A directory of your own Python files, importable on the workers.")
]
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
    from outlast.trainers.user_code import make_importable

    for folder in (code, Path(run).parent if run.endswith(RUN_FILES) else Path()):
        if folder is not None:
            make_importable(str(folder.absolute()))
