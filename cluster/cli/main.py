"""The command `outlast`: registers the commands, and turns each error into a message, a hint and an exit code.

Data goes to stdout, progress and errors to stderr. `outlast --help` must import neither torch nor ray, so large
packages are imported where they are used.
"""

import signal
import sys
import traceback
from typing import Annotated, Any

from typer import Exit, Option, Typer

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import OutlastError
from outlast.cluster.cli.checkpoints import checkpoints
from outlast.cluster.cli.doctor import doctor
from outlast.cluster.cli.drills import demo, drill
from outlast.cluster.cli.init_validate_plan import init, plan, validate
from outlast.cluster.cli.jobs import list_, logs, resume, stop, submit, supervise
from outlast.cluster.cli.kubernetes import k8s
from outlast.cluster.cli.options import AsJson
from outlast.cluster.cli.preview import preview
from outlast.cluster.cli.status import report, status
from outlast.cluster.cli.train import train
from outlast.cluster.cli.try_command import try_
from outlast.cluster.output import print_json, print_line, print_text

app = Typer(
    name="outlast",
    help="Fine-tune Hugging Face models on Ray; outlast the machines the run is on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup doubles the start-up time
    context_settings={"max_content_width": 120},
)


def _print_version(is_set: bool) -> None:
    if is_set:
        version()
        raise Exit


@app.callback()
def _options(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print versions, then exit.")
    ] = False,
) -> None:
    """Global options; `main` reads --debug itself."""


def version(as_json: AsJson = False) -> None:
    """Print versions for a bug report."""
    from outlast.cluster.cli.version_report import versions

    numbers = versions()
    if as_json:
        print_json(numbers, indent=None)
        return
    for name, value in numbers.items():
        print_line(f"{name} {value or '-'}")


_COMMANDS: list[Any] = [init, preview, validate, plan, try_, doctor, status, report, train, demo, drill, version]
_COMMANDS += [submit, supervise, resume, list_, logs, stop]
for _function in _COMMANDS:
    app.command(_function.__name__.rstrip("_"))(_function)
app.add_typer(checkpoints, name="checkpoints", short_help=checkpoints.info.help)
app.add_typer(k8s, name="k8s")
for _group in (app, checkpoints, k8s):
    for _command in _group.registered_commands:  # the docstring's first sentence
        _command.short_help = (_command.callback.__doc__ or "").partition("\n")[0].split(". ")[0].rstrip(".") + "."


def main() -> None:
    """Run a command; turn every error into one message and an exit code."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="outlast")
    except OutlastError as error:
        _fail(error.message, error.hint, error.exit_code, debug)
    except SystemExit as error:
        if not isinstance(error.__context__ and error.__context__.__cause__, KeyboardInterrupt):
            raise  # typer exits without a message after Ctrl-C
        _fail("interrupted", "run the same command again", 130, debug)
    except Exception as error:  # noqa: BLE001 - last resort: report it, and how to get the traceback
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            hint = "stop other programs on this machine, or use a machine with more memory"
            _fail(f"this machine is out of memory: {first_line(error)}", hint, 1, debug)
        hint = "run again as `outlast --debug …` for the traceback"
        _fail(f"unexpected {type(error).__name__}: {error}", hint, 1, debug)


def _fail(message: str, hint: str, code: int, debug: bool) -> None:
    if debug:
        print_text(traceback.format_exc().rstrip("\n"), to_stderr=True, indent="  ")
    print_text(f"outlast: {message}", to_stderr=True, indent="  ")
    if hint:
        print_text(f"  → {hint}", to_stderr=True, indent="    ")
    sys.exit(code)


if __name__ == "__main__":
    main()
