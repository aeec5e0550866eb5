"""Checks of what a script passes to a save, at the call: what could not be read back must not be acknowledged."""

import operator
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format import layout

MAX_STEP = 10**18 - 1


def checked_step(step: Any, newest: int = 0) -> int:
    """Return a step as an int; integers of numpy count. Raises ConfigError for all else, and below `newest`."""
    is_bool = isinstance(step, bool | np.bool_) or (isinstance(step, torch.Tensor) and step.dtype is torch.bool)
    try:
        number = None if is_bool else operator.index(step)
    except TypeError:
        number = None
    if number is None or not 0 <= number <= MAX_STEP:
        raise ConfigError(
            f"step {step!r} ({type(step).__name__}) is not usable: a step is an integer from 0 to {MAX_STEP:,}",
            hint="pass the number of steps done",
        )
    if number < newest:
        raise ConfigError(
            f"step {number} cannot be saved: steps must rise, and the newest one saved is {newest}",
            hint="count steps from the one in the state that resume returned",
        )
    return number


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return metrics as numbers of Python. Raises ConfigError for what is no number by name."""
    checked: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            number = value if type(value) in (int, float) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if not isinstance(name, str) or number is None or isinstance(value, str | bytes):
            raise ConfigError(
                f"metric {name!r} is {value!r} ({type(value).__name__}): a metric is a number, by a name that is text",
                hint="pass numbers, such as loss.item()",
            )
        checked[name] = number
    return checked


def checked_files(files: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Return small files as bytes of their own. Raises ConfigError for names that leave or shadow the checkpoint."""
    checked: dict[str, bytes] = {}
    folders = {str(folder) for name in files or {} for folder in PurePosixPath(str(name)).parents}
    for name, data in (files or {}).items():
        if name in folders:  # an object store would take both, and a directory could not
            text = f"a checkpoint cannot have the file {name!r}: another file lies in a directory of that name"
            raise ConfigError(text, hint="choose another name")
        is_own = name in (layout.MANIFEST, layout.STATE_DIR) or (
            isinstance(name, str) and layout.is_training_state(name)
        )
        if layout.path_fault(name) or is_own or _is_weights(name):
            raise ConfigError(
                f"a checkpoint cannot have the file {name!r}: names are relative paths with '/', without '..', and "
                f"neither {layout.MANIFEST}, nor in {layout.STATE_DIR}/, nor of weights",
                hint="choose another name, such as notes.json",
            )
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ConfigError(f"file {name!r} is of the type {type(data).__name__}, not bytes", hint="encode it")
        checked[name] = bytes(data)
    return checked


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))
