"""A run's Prometheus gauges: rank 0 sets them, and Ray's agent on its node exports them as `ray_outlast_…`.

They are for charts and alerts; training must never depend on them. The loss of rank 0 leaves a gap in the series.
"""

import time

from ray.util.metrics import Counter, Gauge

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store import events

#: Name without Ray's prefix, and meaning. Each has the run's name as the tag `run`.
GAUGES = {
    "outlast_step": "The newest step that was made; it falls back where a run resumes",
    "outlast_num_steps": "Steps of the whole run",
    "outlast_step_seconds": "Seconds that the newest step took",
    "outlast_tokens_per_second": "Tokens of the newest step, a second; of a journal that does not count them, targets",
    "outlast_loss": "Training loss of the newest step",
    "outlast_eval_loss": "Loss of the newest evaluation",
    "outlast_workers": "Workers of the attempt",
    "outlast_attempt": "Number of the attempt: how often the worker group was started, over all launches",
    "outlast_checkpoint_step": "Step of the newest checkpoint",
    "outlast_checkpoint_time_seconds": "When the newest checkpoint was acknowledged, in seconds since the epoch",
    "outlast_save_seconds": "From the beginning of the last save to its commit",
    "outlast_save_wait_seconds": "Of which training waited",
}

REGROUPINGS = "outlast_regroupings"
COUNTERS = {REGROUPINGS: "Losses after which training went on in memory; each process that becomes rank 0 begins at 0"}


class PrometheusGauges:
    """The gauges and counters of one run."""

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, tag_keys=("run",)) for name, text in COUNTERS.items()}
        self._tags = {"run": run}

    def apply(self, event: events.Event, attempt: str | None) -> None:
        """Set the gauges from an event of rank 0 in `attempt`."""
        values: dict[str, float | None] = {}
        match event:
            case events.PlanEvent():
                values = {"num_steps": event.num_steps, "workers": event.world_size, "step": event.step}
                if known := AttemptId.parse(attempt or ""):
                    values["attempt"] = known.number
            case events.StepEvent():
                values = {"step": event.step, "step_seconds": event.seconds, "loss": event.loss}
                values["tokens_per_second"] = event.num_tokens / event.seconds if event.seconds > 0 else None
            case events.EvalEvent(scores=scores):
                values = {"eval_loss": scores.get("eval_loss")}
            case events.RegroupedEvent():
                self._counters[REGROUPINGS].inc(tags=self._tags)
            case events.ResumeEvent():
                values = {"checkpoint_step": event.step, "checkpoint_time_seconds": event.committed_at}
            case events.CommitEvent():
                values = {"checkpoint_step": event.step, "checkpoint_time_seconds": event.t or time.time()}
            case events.SaveEvent():
                values = {"save_seconds": event.commit_s, "save_wait_seconds": event.blocked_s}
        for name, value in values.items():
            if value is not None:
                self._gauges[f"outlast_{name}"].set(value, tags=self._tags)
