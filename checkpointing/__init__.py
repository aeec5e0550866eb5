"""outlast.checkpointing: checkpoints that are whole or not there. Knows torch, pyarrow and xxhash, and nothing of Ray.

Names are imported when they are first used, so that a command line that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Checkpointer": "checkpointer",
    "CheckpointRef": "layout",
    "ConfigError": "errors",
    "DamagedError": "errors",
    "Every": "schedule",
    "LocalStorage": "storage",
    "Manifest": "manifest",
    "Naming": "weights",
    "NoCheckpointError": "errors",
    "OutlastError": "errors",
    "PreflightError": "errors",
    "Ranks": "ranks",
    "Retention": "retention",
    "Storage": "storage",
    "StorageError": "errors",
    "StorageRefused": "errors",
    "catalogue": "lineage",
    "newest_sealed": "seal",
    "open_storage": "storage",
    "seal": "seal",
    "verify": "reader",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
