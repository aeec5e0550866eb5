"""Whose code an exception comes from: of a traceback, the frames that are the user's own.

Neither outlast's frames, nor those of installed libraries or of Python itself, help somebody to find a mistake of
theirs.
"""

from __future__ import annotations

import sysconfig
import traceback
from importlib import import_module
from pathlib import Path


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The user's frames, outermost first; none when the error has not passed through code of theirs."""
    theirs = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for room in ("checkpointing", "trainers", "cluster"):
        theirs += [Path(place).resolve() for place in import_module(f"outlast.{room}").__path__]
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    return [frame for frame in found if not any(Path(frame.filename).resolve().is_relative_to(it) for it in theirs)]


def told(error: BaseException) -> str:
    """The error in one line, with the place in the user's code where it was raised."""
    said = " ".join(str(error).split())[:300]
    frames = own_frames(error)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said}{where}"
