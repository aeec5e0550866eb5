"""outlast.trainers: the exact step loop and what it trains. Uses transformers; must not import ray.

Names are imported when they are first used, so that a command line that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Assignment": "attempt",
    "Column": "data.columns",
    "ColumnType": "data.columns",
    "Control": "loop.control",
    "Loop": "loop.train_loop",
    "Outcome": "loop.train_loop",
    "Prepared": "preparation.prepare",
    "SealCheckpoints": "hf_trainer_seal_callback",
    "Task": "tasks.base",
    "TrainingConfig": "config.training_config",
    "World": "distributed.world",
    "prepare": "preparation.prepare",
    "run_attempt": "attempt",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
