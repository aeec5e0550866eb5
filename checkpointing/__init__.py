"""Fault-tolerant checkpoints of a training run: the public names of `outlast.checkpointing`.

A checkpoint is either complete or does not exist. This package uses torch, pyarrow and xxhash, and never imports Ray.
Names are imported on first use, so a command that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_MODULES = {
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
    "Retention": "run_store.retention_policy",
    "SaveInterval": "save.save_schedule",
    "Storage": "storage.base",
    "StorageError": "errors",
    "StorageRefused": "errors",
    "WeightNaming": "state.named_weights",
    "newest_sealed": "hf_trainer_seals",
    "open_storage": "storage.factory",
    "read_catalog": "run_store.catalog",
    "seal": "hf_trainer_seals",
    "verify": "restore.verify",
}
#: Names that 0.1.0 used.
_RENAMED = {"Every": "SaveInterval", "Naming": "WeightNaming", "Ranks": "RankGroup", "catalogue": "read_catalog"}

__all__ = sorted([*_MODULES, *_RENAMED])


def __getattr__(name: str) -> Any:
    name = _RENAMED.get(name, name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
