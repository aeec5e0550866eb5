"""History of a run in the form of the Hugging Face Trainer: its logged steps and evaluations, and what follows from it.

The history is in every checkpoint, so that a resumed run continues it with the same entries. The best evaluation and
early stopping are pure functions of it, so that a resumed run stops at the same step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.trainers.config.train import EarlyStoppingSettings
from outlast.trainers.data.batch_plan import BatchPlan
from outlast.trainers.loop.step_exchange import DeferredMetrics

#: Entries of training steps at most: with the default interval, and with any interval.
_NUM_BY_DEFAULT, _NUM_AT_MOST = 500, 2000
#: What an entry takes in a checkpoint's two files, about.
ENTRY_BYTES = 280


class LogHistory:
    """Entries of logged steps and of evaluations, oldest first.

    Args:
        plan: The batches of the run.
        every: Steps between two entries of training steps; None for the default.

    Attributes:
        entries: `log_history` of the Trainer.
        every: Steps between two entries of training steps, limited so that they stay few.
    """

    def __init__(self, plan: BatchPlan, every: int | None) -> None:
        self._plan = plan
        self.entries: list[dict[str, Any]] = []
        self.every = max(every or 1, -(-plan.num_steps // (_NUM_AT_MOST if every else _NUM_BY_DEFAULT)))
        self._loss_sum, self._num_losses = 0.0, 0

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if "eval_loss" in entry]

    def add_step(self, done: DeferredMetrics, loss: float) -> None:
        """Add a step. An entry has the mean loss of the steps since the last entry, without those that are not finite.

        Call it with each step, in order. It waits for the device only where it adds an entry.
        """
        if math.isfinite(loss):
            self._loss_sum, self._num_losses = self._loss_sum + loss, self._num_losses + 1
        step = done.step + 1
        if step % self.every:
            return
        entry: dict[str, Any] = {"loss": self._loss_sum / self._num_losses} if self._num_losses else {}
        if done.grad_norm is not None:
            entry["grad_norm"] = done.grad_norm.item()
        self._append(step, {**entry, "learning_rate": done.lr})
        self._loss_sum, self._num_losses = 0.0, 0

    def add_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self._append(step, scores)

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        self.entries.append({"step": step, "epoch": self._plan.epoch(step), **values})

    def state(self) -> dict[str, Any]:
        """Return the history and the losses since its last entry, as JSON."""
        return {"log_history": self.entries, "unlogged": [self._loss_sum, self._num_losses]}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore `state`. Version 0.1.0 saved evaluations only: there the entries of steps begin at the resume."""
        self.entries = saved["log_history"]
        self._loss_sum, self._num_losses = saved.get("unlogged", (0.0, 0))

    def trainer_state(self, step: int, metric: str, mode: str) -> dict[str, Any]:
        """Return what follows from the history in the Trainer's `trainer_state.json`, after `step` steps.

        Args:
            step: Steps done.
            metric: Metric that defines the best evaluation; without it in the history there is no best one.
            mode: `min` or `max`.
        """
        best = best_evaluation(self.evaluations, metric, mode)
        return {
            "global_step": step,
            "epoch": self._plan.epoch(step),
            "max_steps": self._plan.num_steps,
            "num_train_epochs": math.ceil(self._plan.epoch(self._plan.num_steps)),
            "train_batch_size": self._plan.micro_batch,
            "logging_steps": self.every,
            "log_history": self.entries,
            "best_metric": best and best[1],
            "best_global_step": best and best[0],
            "best_model_checkpoint": None,
            "is_world_process_zero": True,
            "is_local_process_zero": True,
        }


def best_evaluation(evaluations: Sequence[Mapping[str, Any]], metric: str, mode: str) -> tuple[int, float] | None:
    """Return step and value of the best evaluation, the first of equals; None if none has the metric as a number.

    As in the Trainer, the evaluation before the first step does not count: there is no checkpoint of that step.
    """
    sign = 1.0 if mode == "min" else -1.0
    later = [entry for entry in evaluations if entry["step"]]
    rated = [(entry["step"], entry[metric]) for entry in later if not math.isnan(entry.get(metric, math.nan))]
    return min(rated, key=lambda item: sign * item[1], default=None)


@dataclass(frozen=True, slots=True)
class PatienceState:
    """State of the metric of early stopping.

    Attributes:
        best: Its best value; None before the first that is not NaN.
        best_step: The step of the best value.
        num_waited: Evaluations since then that were not better.
    """

    best: float | None = None
    best_step: int = 0
    num_waited: int = 0


def patience_state(settings: EarlyStoppingSettings, evaluations: Sequence[Mapping[str, Any]]) -> PatienceState:
    """Evaluate early stopping from the evaluations, oldest first. NaN is never better."""
    sign = 1.0 if settings.mode == "min" else -1.0
    state = PatienceState()
    for entry in evaluations:
        value = entry[settings.metric]
        better = value == value if state.best is None else sign * (state.best - value) > settings.min_delta
        state = (
            PatienceState(value, entry["step"])
            if better
            else PatienceState(state.best, state.best_step, state.num_waited + 1)
        )
    return state
