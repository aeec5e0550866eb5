"""Early stopping: a pure function of the evaluations so far, which are in every checkpoint.

It must never keep state of its own, so that a resumed run stops at the same step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.trainers.config.train import EarlyStoppingSettings


@dataclass(frozen=True, slots=True)
class PatienceState:
    """State of the metric.

    Attributes:
        best: Its best value; None before the first that is not NaN.
        best_step: The step of the best value.
        num_waited: Evaluations since then that were not better.
    """

    best: float | None = None
    best_step: int = 0
    num_waited: int = 0


def patience_state(settings: EarlyStoppingSettings, log_history: Sequence[Mapping[str, Any]]) -> PatienceState:
    """Evaluate `log_history`, oldest first. NaN is never better."""
    sign = 1.0 if settings.mode == "min" else -1.0
    state = PatienceState()
    for entry in log_history:
        value = entry[settings.metric]
        better = value == value if state.best is None else sign * (state.best - value) > settings.min_delta
        state = (
            PatienceState(value, entry["step"])
            if better
            else PatienceState(state.best, state.best_step, state.num_waited + 1)
        )
    return state
