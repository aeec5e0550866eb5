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
    from outlast.cluster.config.run_config import RunConfig
    from outlast.cluster.driver.detached.attachment import Attachment
    from outlast.cluster.driver.launch import Finished, Launch
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
    from outlast.cluster.driver.signals import exit_when_interrupted, respond_to_signals

    config, declared = load_run(str(run_file), overrides or [])
    options = [part for item in overrides or [] for part in ("-s", item)] + (["--address", address] if address else [])
    of_client = os.environ.get(RESUME_VARIABLE)  # the client's run file has another name, or is on another machine
    again = of_client or shlex.join(["outlast", "train", str(run_file), *options])
    interruption = _Interruption(config.name, again)
    with respond_to_signals(interruption.announce, interruption.quit):
        print_line(f"{config.name}: starting", to_stderr=True)
        from outlast.cluster.monitoring.console_progress import ProgressReporter

        config = config.at_home(run_file.parent)
        with ProgressReporter(config.name, store=config.store, keep=True) as reporter:
            interruption.reporter = reporter
            # A job of `submit` has --take-over for launches that are dead or elsewhere; one on this cluster it keeps.
            ends_root = take_over and not of_client
            finished = _attach(config, declared, address, interruption, ends_root=ends_root)
            if finished is None:
                from outlast.cluster.driver.detached.host import detached_host
                from outlast.cluster.driver.launch import Launch

                code = str(run_file.parent.absolute())
                launch = Launch(config, declared, take_over=take_over, code=code, tell=reporter, host=detached_host)
                interruption.launch = launch
                finished = launch.run(address)
    from outlast.trainers.loop.train_loop import Outcome

    if finished.model is not None:
        reporter.print_line("done")
        print_line(f"{config.checkpoint.storage}/{finished.model}")
    elif finished.outcome is Outcome.STOPPED:
        # Not always of the last step: a group that has lost a worker cannot save.
        reporter.print_line(f"stopped; {exit_when_interrupted(config.store)[1]}; to resume: {again}")
    else:
        taking = "" if of_client else f"; to take it over: {again} --take-over"
        reporter.print_line(f"another launch has this run{taking}")
    raise Exit(finished.outcome.exit_code)


def _attach(
    config: RunConfig, declared: dict[str, Any], address: str | None, interruption: _Interruption, *, ends_root: bool
) -> Finished | None:
    """Follow the run's launch whose workers outlived their driver to its end. Return None if there is none here.

    With `ends_root` its workers are ended instead, so that the next launch has their place.
    """
    reporter = interruption.reporter
    if reporter is None or not (address or os.environ.get("RAY_ADDRESS")) or not config.failure.survive_driver:
        return None
    from outlast.checkpointing.run_store import events
    from outlast.checkpointing.run_store.attempt_history import settings_digest
    from outlast.cluster.driver.detached.attachment import attached
    from outlast.cluster.driver.signals import INTERRUPTIONS, exit_when_interrupted

    with attached(config.store, address) as found:
        if found is None:
            return None
        attachment, alive = found
        if ends_root:
            attachment.quit()
            return None
        interruption.launch = attachment
        phase = events.PhaseEvent(name="attached", launch=attachment.launch)
        reporter({"t": alive.get("began", 0.0), **phase.to_json()})
        if alive.get("settings") != settings_digest(declared):
            text = "its settings are others than those given; it keeps them (--take-over starts anew with these)"
            reporter(events.NoteEvent(text=text).to_json())
        try:
            return attachment.follow(reporter)
        except INTERRUPTIONS:
            from outlast.cluster.driver.launch import Interrupted

            raise Interrupted(f"interrupted; {exit_when_interrupted(config.store)[1]}") from None


class _Interruption:
    """What Ctrl-C prints and does at once, while the main thread may be busy for seconds."""

    def __init__(self, title: str, again: str) -> None:
        self._title, self._again = title, again
        self.reporter: ProgressReporter | None = None
        self.launch: Launch | Attachment | None = None

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
