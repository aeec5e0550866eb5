"""Arguments and options that commands share. An option has one meaning in all commands."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_reference import RUN_FILES
from outlast.cluster.output import print_line

Texts = list[str] | None
Address = Annotated[
    str | None, Option(help="The cluster's job server, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")
]
RunFile = Annotated[Path, Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Follow = Annotated[bool, Option("--follow", help="Show its log until it ends; exit with its exit code.")]
Run = Annotated[str, Argument(metavar="RUN", help="A run's directory, run file or name.")]
StorageRoot = Annotated[str, Option("--storage", help="The storage of runs that are given by name.")]
Code = Annotated[
    Path | None, Option(help="The directory of your own Python files; default: the run file's, or the current one.")
]
Base = Annotated[str | None, Option(help="For an adapter: path of its base model; default: the path at training.")]
Trusted = Annotated[
    bool, Option("--trust-remote-code", help="Run code that the run names, or that is in its checkpoint.")
]
Overrides = Annotated[Texts, Option("-s", "--set", metavar="KEY=VALUE", help="Override a setting.")]
Ship = Annotated[bool, Option(help="Send this outlast along, so that the cluster runs the same version.")]
ShippedCode = Annotated[
    Path | None, Option("--code", help="A directory of your own Python files, importable on the workers.")
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConfigError if `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="name another path") from error


def print_runs(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line for each run or job, of the values of `list_runs` or those of a job."""
    for row in rows:
        state = row.get("status") or f"{row['state']:8} step {row['step']}/{row['num_steps'] or '?'}"
        print_line(f"{row.get('id') or row['run']:32}  {state}")


def print_unreadable(unreadable: Mapping[str, str]) -> None:
    """Name on stderr what could not be read; everything else was shown without it."""
    for path, reason in sorted(unreadable.items()):
        print_line(f"unreadable: {path}: {reason}", to_stderr=True)


def make_code_importable(run: str, code: Path | None) -> None:
    """Make the user's modules importable: those in `code`, and those in the run file's directory or the current one."""
    from outlast.trainers.user_code import make_importable

    for folder in (code, Path(run).parent if run.endswith(RUN_FILES) else Path()):
        if folder is not None:
            make_importable(str(folder.absolute()))
