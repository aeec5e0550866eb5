"""What Prometheus may ask of a run, through the metrics that each Ray node exports (`k8s/components/monitoring`).

Rank 0 measures; its loss leaves a gap, and the next attempt's rank 0 goes on. Nothing depends on it.
"""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Gauge

from outlast.checkpointing.layout import AttemptId

#: Name without Ray's prefix, and meaning.
GAUGES = {
    "outlast_step": "The newest step that was made; it falls back where a run resumes.",
    "outlast_step_seconds": "Seconds that the newest step took.",
    "outlast_checkpoint_time_seconds": "When the newest checkpoint was acknowledged, in seconds since the epoch.",
    "outlast_attempt": "Number of the attempt: how often the worker group was started, over all launches.",
}


class Meter:
    """The gauges of one run.

    Args:
        run: Its name, the value of the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in GAUGES.items()}
        self._tags = {"run": run}

    def hear(self, event: dict[str, Any], attempt: str | None) -> None:
        """Learns from an event of rank 0."""
        match event["event"]:
            case "plan":
                if known := AttemptId.parse(attempt or ""):
                    self._set("outlast_attempt", known.number)
                self._set("outlast_step", event["step"])
            case "step":
                self._set("outlast_step", event["step"])
                self._set("outlast_step_seconds", event["seconds"])
            case "commit":
                self._set("outlast_checkpoint_time_seconds", event.get("t", time.time()))

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, tags=self._tags)
