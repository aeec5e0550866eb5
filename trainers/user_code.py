"""Code that the user brings: imported by dotted path."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.blame import told

if TYPE_CHECKING:
    pass


_HINT = "put it beside the run file, or install it on every worker; `outlast submit --code DIR` takes it along"


def imported(place: str, setting: str) -> Any:
    """What `package.module:Name` names; `setting` is where the user wrote it.

    Raises:
        ConfigError: The module cannot be imported, or has no such name.
    """
    module, _, name = place.partition(":")
    try:
        whole = import_module(module)
    except Exception as error:
        raise ConfigError(f"{setting} {place!r} cannot be imported: {told(error)}", hint=_HINT) from error
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
