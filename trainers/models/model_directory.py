"""Checks of a directory that the user names as a model, a tokenizer or an adapter, before transformers reads it."""

import json
from pathlib import Path

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import path_fault
from outlast.checkpointing.storage.regular_files import check_files_in, read_small_file


def check_model_directory(key: str, folder: Path) -> None:
    """Raise ConfigError for pipes and devices in a directory, and for an index of weights that leads out of it."""
    check_files_in(key, folder)
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = json.loads(read_small_file(index))["weight_map"].values()
            fault = next(filter(None, map(path_fault, names)), "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fault = f"it is not an index of weights ({type(error).__name__})"
        if fault:
            raise ConfigError(f"{key} {folder}: {index.name}: {fault}", hint="restore the file, or use another model")
