"""outlast.checkpointing: checkpoints that are whole or not there. Knows torch, pyarrow and xxhash, and nothing of Ray.

Names are imported when they are first used, so that a command line that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Catalog": "run_store.catalog",
    "Checkpointer": "checkpointer",
    "CheckpointRef": "format.layout",
    "ConfigError": "errors",
    "DamagedError": "errors",
    "LocalStorage": "storage.local",
    "Manifest": "format.manifest",
    "NoCheckpointError": "errors",
    "OutlastError": "errors",
    "PreflightError": "errors",
    "RankGroup": "state.rank_group",
    "Retention": "run_store.retention",
    "SaveInterval": "save.save_interval",
    "Storage": "storage.base",
    "StorageError": "errors",
    "StorageRefused": "errors",
    "WeightNaming": "state.model_weights",
    "newest_sealed": "tools.trainer_seal",
    "open_storage": "storage.factory",
    "read_catalog": "run_store.catalog",
    "seal": "tools.trainer_seal",
    "verify": "restore.verify",
}
#: Names of 0.1.0, for code that was written with it.
_RENAMED = {"Every": "SaveInterval", "Naming": "WeightNaming", "Ranks": "RankGroup", "catalogue": "read_catalog"}

__all__ = sorted([*_HOME, *_RENAMED])


def __getattr__(name: str) -> Any:
    name = _RENAMED.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
