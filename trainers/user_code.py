"""The user's code: imports by dotted path, and the user's own frames in tracebacks.

To find an error in user code, an error text names only the user's frames: not those of outlast, of installed libraries
or of Python.
"""

import sys
import sysconfig
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from outlast.checkpointing.error_hints import did_you_mean
from outlast.checkpointing.errors import ConfigError

_HINT = "put it beside the run file, or install it on every worker; `outlast submit --code DIR` uploads it"


def import_object(path: str, setting: str) -> Any:
    """Import the object at `package.module:Name`; errors name `setting`, the key that the user set.

    Raises:
        ConfigError: The module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ConfigError(f"{setting} {path!r} cannot be imported: {describe_error(error)}", hint=_HINT) from error
    if not hasattr(module, name):
        guess = did_you_mean(name, [key for key, item in vars(module).items() if isinstance(item, type)])
        raise ConfigError(f"{setting} {path!r} cannot be imported: {module_name} has no {name!r}{guess}", hint=_HINT)
    return getattr(module, name)


def make_importable(folder: str) -> None:
    """Append a directory to Python's path, after all others: it must not shadow installed modules."""
    if folder and Path(folder).is_dir() and folder not in sys.path:
        sys.path.append(folder)


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the user's frames of a traceback, outermost first; an empty list if no user code was involved."""
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for package in ("checkpointing", "trainers", "cluster"):
        installed += [Path(folder).resolve() for folder in import_module(f"outlast.{package}").__path__]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    return [frame for frame in frames if not any(Path(frame.filename).resolve().is_relative_to(it) for it in installed)]


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, with file and line of the user's code that raised it."""
    message = " ".join(str(error).split())[:300].rstrip(".")
    frames = user_frames(error)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"
