"""The command that trains from this machine: `train`."""

import shlex
from typing import Annotated

from typer import Exit, Option

from outlast.cluster.cli.options import Overrides, RunFile


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, Option(help="A Ray cluster; default: a new local one.")] = None,
    take_over: Annotated[bool, Option("--take-over", help="Take the run over from another launch at once.")] = False,
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
    raise Exit(finished.outcome.exit_code)
