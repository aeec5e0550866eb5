"""Checks of a directory that the user names as a model, a tokenizer or an adapter, before transformers reads it."""

import json
from contextlib import suppress
from pathlib import Path

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import path_fault
from outlast.checkpointing.storage.regular_files import read_small_file, special_kind


def check_model_directory(key: str, folder: Path) -> None:
    """Raise ConfigError for pipes, devices and sockets in a directory, and an index of weights that leads out of it.

    Links may be used.
    """
    for path in sorted(folder.iterdir()):
        with suppress(OSError):  # a link that leads nowhere: the reader of the file reports it
            if kind := special_kind(path.stat().st_mode):
                hint = "remove it, or name a copy of the directory"
                raise ConfigError(f"{key} {folder}: {path.name} is {kind}, not a file", hint=hint)
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = json.loads(read_small_file(index))["weight_map"].values()
            fault = next(filter(None, map(path_fault, names)), "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fault = f"it is not an index of weights ({type(error).__name__})"
        if fault:
            raise ConfigError(f"{key} {folder}: {index.name}: {fault}", hint="restore the file, or use another model")
