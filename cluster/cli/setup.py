"""The verbs before a run: `init` writes a run file, `validate` checks it, `plan` says what the run will take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.options import AsJson, Overrides
from outlast.trainers.config.task_names import TASKS

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("run.yaml"),
    task: Annotated[str, typer.Option(help=f"What the model is to learn: {', '.join(TASKS)}.")] = "causal-lm",
) -> None:
    """Write a commented run file to begin with. Never replaces one."""
    from outlast.cluster.config.starter_files import template

    text = template(task, str(file))
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} is there already; nothing was written", hint="name another file") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}", hint="name another place") from error
    print(file)
    print(f"edit it, above all model.path and data.train; then: outlast validate {file}", file=sys.stderr)


def validate(
    run_file: RunFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also prepare the data (it stays, for the run), build the model, write to the storage."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with a run file, each with its line. Exit code 2 if anything is."""
    from outlast.cluster.preflight.validate import unchecked
    from outlast.cluster.preflight.validate import validate as findings_of

    found = findings_of(str(run_file), overrides or [], deep=deep)
    if as_json:
        print(json.dumps([item.as_json() for item in found], indent=1))
    else:
        for item in found:
            print(f"{run_file}: {item}")
        if not found:
            print(f"{run_file}: nothing wrong was found" + ("" if deep else " (--deep looks at all rows too)"))
    if not found and not deep:
        for line in unchecked(str(run_file), overrides or []):
            print(f"{run_file}: {line}", file=sys.stderr)
    raise typer.Exit(2 if found else 0)


def plan(run_file: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run will take: steps, memory, checkpoints, and what saves cost. Prepares the data, and keeps that."""
    from outlast.cluster.config.run_config import load_run
    from outlast.cluster.preflight.estimate import forecast, lines
    from outlast.cluster.preflight.validate import check_begun
    from outlast.trainers.user_code import make_importable

    config, _ = load_run(str(run_file), overrides or [])
    make_importable(str(run_file.parent.absolute()))
    config = config.at_home(run_file.parent)
    found = forecast(config)
    print(json.dumps(found.as_json(), indent=1) if as_json else "\n".join(lines(found)))
    try:
        check_begun(config)
    except ConfigError as error:
        print(f"outlast train will refuse this: {error.message}\n  → {error.hint}", file=sys.stderr)
