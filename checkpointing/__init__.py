"""outlast.checkpointing: checkpoints that are whole or not there. Knows torch, pyarrow and xxhash, and nothing of Ray.

Names are imported when they are first used, so that a command line that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Checkpointer": "checkpointer",
    "CheckpointRef": "format.layout",
    "ConfigError": "errors",
    "DamagedError": "errors",
    "Every": "save.save_interval",
    "LocalStorage": "storage.local",
    "Manifest": "format.manifest",
    "Naming": "state.model_weights",
    "NoCheckpointError": "errors",
    "OutlastError": "errors",
    "PreflightError": "errors",
    "Ranks": "state.rank_group",
    "Retention": "run_store.retention",
    "Storage": "storage.base",
    "StorageError": "errors",
    "StorageRefused": "errors",
    "catalogue": "run_store.catalog",
    "newest_sealed": "tools.trainer_seal",
    "open_storage": "storage.factory",
    "seal": "tools.trainer_seal",
    "verify": "restore.verify",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
