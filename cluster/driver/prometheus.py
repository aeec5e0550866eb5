"""What Prometheus may ask of a run: gauges that rank 0 sets, and Ray's agent on its node exports as `ray_outlast_…`.

They are for charts and alerts, and nothing depends on them. The loss of rank 0 leaves a gap; the next one's goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from outlast.checkpointing.format.layout import AttemptId

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


class PrometheusGauges:
    """The gauges of one run.

    Args:
        run: Its name.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in GAUGES.items()}
        self._tags = {"run": run}

    def apply(self, event: Mapping[str, Any], attempt: str | None) -> None:
        """Learns from an event of rank 0, whose attempt is called so."""
        match event["event"]:
            case "plan":
                if known := AttemptId.parse(attempt or ""):
                    self._set("attempt", known.number)
                self._set("num_steps", event["num_steps"])
                self._set("workers", event["world_size"])
                self._set("step", event["step"])
            case "step":
                self._step(event)
            case "eval":
                self._set("eval_loss", event["eval_loss"])
            case "resume":
                self._set("checkpoint_step", event["step"])
                self._set("checkpoint_time_seconds", event["committed_at"])
            case "commit":
                self._set("checkpoint_step", event["step"])
                self._set("checkpoint_time_seconds", event.get("t", time.time()))
            case "save":
                self._set("save_seconds", event["commit_s"])
                self._set("save_wait_seconds", event["blocked_s"])

    def _step(self, event: Mapping[str, Any]) -> None:
        self._set("step", event["step"])
        self._set("step_seconds", event["seconds"])
        if event["loss"] is not None:
            self._set("loss", event["loss"])
        if event["seconds"] > 0:
            self._set("tokens_per_second", event.get("tokens", event["count"]) / event["seconds"])

    def _set(self, name: str, value: float) -> None:
        self._gauges[f"outlast_{name}"].set(value, tags=self._tags)
