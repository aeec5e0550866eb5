"""outlast.trainers: the exact step loop and what it trains. Knows transformers, and nothing of Ray.

Names are imported when they are first used, so that a command line that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Assignment": "attempt",
    "Control": "control",
    "Loop": "loop",
    "Outcome": "loop",
    "Prepared": "data",
    "SealCheckpoints": "hf_trainer",
    "Task": "tasks",
    "TrainingConfig": "config",
    "World": "world",
    "prepare": "data",
    "run_attempt": "attempt",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
