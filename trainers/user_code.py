"""Code of the user: imported by dotted path, and found in tracebacks.

In a traceback only the user's own frames help to find a mistake of theirs: not outlast's, nor those of installed
libraries or of Python itself.
"""

from __future__ import annotations

import difflib
import sys
import sysconfig
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import ConfigError

if TYPE_CHECKING:
    pass


_HINT = "put it beside the run file, or install it on every worker; `outlast submit --code DIR` takes it along"


def import_object(place: str, setting: str) -> Any:
    """What `package.module:Name` names; `setting` is where the user wrote it.

    Raises:
        ConfigError: The module cannot be imported, or has no such name.
    """
    module, _, name = place.partition(":")
    try:
        whole = import_module(module)
    except Exception as error:
        raise ConfigError(f"{setting} {place!r} cannot be imported: {describe_error(error)}", hint=_HINT) from error
    if not hasattr(whole, name):
        near = difflib.get_close_matches(name, [key for key, item in vars(whole).items() if isinstance(item, type)], 1)
        raise ConfigError(
            f"{setting} {place!r} cannot be imported: {module} has no {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=_HINT,
        )
    return getattr(whole, name)


def make_importable(folder: str) -> None:
    """Lets Python find modules in this directory, after all others: it must not hide what is installed."""
    if folder and Path(folder).is_dir() and folder not in sys.path:
        sys.path.append(folder)


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The user's frames, outermost first; none when the error has not passed through code of theirs."""
    theirs = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for room in ("checkpointing", "trainers", "cluster"):
        theirs += [Path(place).resolve() for place in import_module(f"outlast.{room}").__path__]
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    return [frame for frame in found if not any(Path(frame.filename).resolve().is_relative_to(it) for it in theirs)]


def describe_error(error: BaseException) -> str:
    """The error in one line, with the place in the user's code where it was raised."""
    said = " ".join(str(error).split())[:300]
    frames = user_frames(error)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said}{where}"
