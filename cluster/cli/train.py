"""The commands that train from this machine: `train`, `demo` and `drill`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from outlast.cluster.cli.options import AsJson, Overrides, RunFile, writing


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: a new local one.")] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the run over from another launch at once.")
    ] = False,
) -> None:
    """Start the run, or resume it, or report that it is done. Prints the path of the finished model.

    Ctrl-C and SIGTERM commit a checkpoint first (exit code 75).
    """
    from outlast.cluster.config.run_file import load_run

    config, declared = load_run(str(run_file), overrides or [])
    from outlast.cluster.driver.launch import Launch
    from outlast.cluster.monitoring.console_progress import ProgressReporter
    from outlast.trainers.loop.train_loop import Outcome

    config = config.at_home(run_file.parent)
    with ProgressReporter(config.name, store=config.store, keep=True) as reporter:
        code = str(run_file.parent.absolute())
        finished = Launch(config, declared, take_over=take_over, code=code, tell=reporter).run(address)
    options = [part for item in overrides or [] for part in ("-s", item)] + (["--address", address] if address else [])
    again = shlex.join(["outlast", "train", str(run_file), *options])
    if finished.model is not None:
        reporter.print_line("done")
        print(f"{config.checkpoint.storage}/{finished.model}")
    elif finished.outcome is Outcome.STOPPED:
        reporter.print_line(f"stopped, with a committed checkpoint; to resume: {again}")
    else:
        reporter.print_line(f"another launch has this run; to take it over: {again} --take-over")
    raise typer.Exit(finished.outcome.exit_code)


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="The folder to write to.")] = Path("outlast-demo"),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings as JSON.")
    ] = None,
) -> None:
    """Train on two workers, kill one during a save, resume, and compare with an undisturbed run.

    Exit code 1 if one bit differs.
    """
    from outlast.cluster.drills.demo import run_demo

    findings = run_demo(folder)
    if json_file is not None:
        with writing(json_file):
            json_file.write_text(json.dumps(findings, indent=1) + "\n")
    raise typer.Exit(0 if all(findings["equal"].values()) else 1)


def drill(
    run_file: RunFile,
    overrides: Overrides = None,
    faults: Annotated[
        list[str] | None,
        typer.Option(
            "--fault", metavar="FAULT", help="kill, kill-in-save, error, stop, damage or driver; repeatable. All."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each copy.")] = 12,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: a new local one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the copies in the storage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Inject faults into short copies of your run; check that each resumes with the same bits, and how fast.

    Exit code 1 if one does not.
    """
    from dataclasses import asdict

    from outlast.cluster.drills.drill import parse_faults, run_drill

    results = run_drill(
        run_file, overrides or [], kinds=parse_faults(faults), num_steps=steps, address=address, keep=keep
    )
    if as_json:
        print(json.dumps([asdict(finding) for finding in results], indent=1))
    raise typer.Exit(0 if all(finding.is_good for finding in results) else 1)
