"""The command that trains from this machine: `train`."""

from __future__ import annotations

import os
import shlex
import threading
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from outlast.cluster.cli.options import Overrides, RunFile
from outlast.cluster.config.run_reference import RESUME_VARIABLE
from outlast.cluster.output import print_line

if TYPE_CHECKING:
    from outlast.cluster.driver.launch import Launch
    from outlast.cluster.monitoring.console_progress import ProgressReporter

#: How long a second Ctrl-C waits for the storage.
_QUIT_S = 1.0


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, Option(help="A Ray cluster; default: a new local one.")] = None,
    take_over: Annotated[bool, Option("--take-over", help="Take the run over from another launch at once.")] = False,
) -> None:
    """Start the run, or resume it, or report that it is done. Prints the path of the finished model.

    Ctrl-C and SIGTERM commit a checkpoint first (exit code 75); the second one quits at once.
    """
    from outlast.cluster.config.run_file import load_run
    from outlast.cluster.driver.signals import respond_to_signals

    config, declared = load_run(str(run_file), overrides or [])
    options = [part for item in overrides or [] for part in ("-s", item)] + (["--address", address] if address else [])
    of_client = os.environ.get(RESUME_VARIABLE)  # the client's run file has another name, or is on another machine
    again = of_client or shlex.join(["outlast", "train", str(run_file), *options])
    interruption = _Interruption(config.name, again)
    with respond_to_signals(interruption.announce, interruption.quit):
        print_line(f"{config.name}: starting", to_stderr=True)
        from outlast.cluster.driver.launch import Launch
        from outlast.cluster.monitoring.console_progress import ProgressReporter
        from outlast.trainers.loop.train_loop import Outcome

        config = config.at_home(run_file.parent)
        with ProgressReporter(config.name, store=config.store, keep=True) as reporter:
            code = str(run_file.parent.absolute())
            launch = Launch(config, declared, take_over=take_over, code=code, tell=reporter)
            interruption.reporter, interruption.launch = reporter, launch
            finished = launch.run(address)
    if finished.model is not None:
        reporter.print_line("done")
        print_line(f"{config.checkpoint.storage}/{finished.model}")
    elif finished.outcome is Outcome.STOPPED:
        reporter.print_line(f"stopped, with a committed checkpoint; to resume: {again}")
    else:
        taking = "" if of_client else f"; to take it over: {again} --take-over"
        reporter.print_line(f"another launch has this run{taking}")
    raise Exit(finished.outcome.exit_code)


class _Interruption:
    """What Ctrl-C prints and does at once, while the main thread may be busy for seconds."""

    def __init__(self, title: str, again: str) -> None:
        self._title, self._again = title, again
        self.reporter: ProgressReporter | None = None
        self.launch: Launch | None = None

    def announce(self) -> None:
        """Answer the first one; once training has begun, the launch does."""
        if self.reporter is None or not self.reporter.has_plan:
            self._print("stop requested; ending before the first step (press Ctrl-C again to quit immediately)")

    def quit(self) -> None:
        """Answer the second one: record and print what is saved, and end the process, as Ray ends with it."""
        found: list[tuple[int, str]] = [(130, "nothing is saved" if self.launch is None else "the storage is slow")]
        launch: Any = self.launch
        if launch is not None:
            thread = threading.Thread(target=lambda: found.append(launch.quit()), daemon=True)
            thread.start()
            thread.join(_QUIT_S)
        exit_code, saved = found[-1]
        self._print(f"quit immediately; {saved}; to resume: {self._again}")
        os._exit(exit_code)

    def _print(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.print_line(text)
        else:
            print_line(f"{self._title}: {text}", to_stderr=True)
