"""The commands before a run: `init` writes a run file, `validate` checks it, `plan` estimates the run."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.options import AsJson, Overrides, RunFile, writing
from outlast.cluster.output import print_json, print_line, print_text
from outlast.trainers.config.task_table import TASKS


def init(
    file: Annotated[Path, Argument(metavar="FILE", help="The file to write.")] = Path("run.yaml"),
    task: Annotated[str, Option(help=f"The model's task: {', '.join(TASKS)}.")] = "causal-lm",
) -> None:
    """Write a commented starter run file. Never overwrites a file."""
    from outlast.cluster.config.starter_files import template

    if file.suffix == ".toml":
        raise ConfigError("run files are YAML; TOML is not read", hint=f"outlast init {file.with_suffix('.yaml')}")
    text = template(task, str(file))
    with writing(file):
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(text)
        except FileExistsError:
            raise ConfigError(f"{file} already exists; nothing was written", hint="name another file") from None
    print_line(file)
    print_line(f"set model.path and data.train in it, then: outlast validate {file}", to_stderr=True)


def validate(
    run_file: RunFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool,
        Option("--deep", help="Also prepare the data (kept for the run), try the first step, write to the storage."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List all errors of a run file, each with its line. Exit code 2 if there are any."""
    from outlast.cluster.preflight.validate import unverified
    from outlast.cluster.preflight.validate import validate as findings_of

    def note(text: str) -> None:
        print_line(f"{run_file}: {text}", to_stderr=True)

    findings = findings_of(str(run_file), overrides or [], deep=deep, note=note)
    if as_json:
        print_json([item.as_json() for item in findings])
    else:
        for item in findings:
            print_text(f"{run_file}: {item}", indent="  ")
        if not findings:
            print_line(f"{run_file}: no errors found" + ("" if deep else " (--deep also reads all rows)"))
    if not findings and not deep:
        for line in unverified(str(run_file), overrides or []):
            note(line)
    raise Exit(2 if findings else 0)


def plan(run_file: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Estimate a run: steps, memory, checkpoints, cost of saves. Prepares the data, which is kept for the run."""
    from outlast.cluster.config.run_file import load_run
    from outlast.cluster.preflight.estimate import describe, estimate_run
    from outlast.cluster.preflight.validate import compare_existing_run
    from outlast.trainers.user_code import make_importable

    config, _ = load_run(str(run_file), overrides or [])
    make_importable(str(run_file.parent.absolute()))
    config = config.at_home(run_file.parent)
    estimate = estimate_run(config)
    if as_json:
        print_json(estimate.as_json())
    else:
        for line in describe(estimate):
            print_line(line)
    if estimate.shortage:
        print_line(f"outlast train may fail: {estimate.shortage}", to_stderr=True)
    for found in compare_existing_run(config, estimate.walk.fingerprint):
        print_line(f"outlast train will fail: {found}", to_stderr=True)
