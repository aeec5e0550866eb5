"""Early stopping: a pure function of the evaluations so far, which are in every checkpoint. No other state is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.trainers.config.train import EarlyStoppingSettings


@dataclass(frozen=True, slots=True)
class PatienceState:
    """Where the metric stands.

    Attributes:
        best: Its best value, None before the first that is a number.
        best_step: The step it was measured at.
        num_waited: Evaluations since then that were not better.
    """

    best: float | None = None
    best_step: int = 0
    num_waited: int = 0


def evaluate_patience(settings: EarlyStoppingSettings, log_history: Sequence[Mapping[str, Any]]) -> PatienceState:
    """Judges the evaluations, oldest first. A value that is no number is never better."""
    sign = 1.0 if settings.mode == "min" else -1.0
    now = PatienceState()
    for entry in log_history:
        value = entry[settings.metric]
        better = value == value if now.best is None else sign * (now.best - value) > settings.min_delta
        now = (
            PatienceState(value, entry["step"])
            if better
            else PatienceState(now.best, now.best_step, now.num_waited + 1)
        )
    return now
