"""A run in Prometheus: gauges that rank 0 sets, and that Ray's own agent on its node exports as `ray_outlast_…`.

They are for charts and alerts. Nothing is decided by them, and a failure to set one is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ray.util.metrics import Counter, Gauge, Metric

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.journal import read_ends
from outlast.checkpointing.layout import AttemptId, attempt_dir
from outlast.checkpointing.lineage import list_attempts
from outlast.checkpointing.storage import Storage

#: Name, without `outlast_`, to what it says. Each has the run's name as the tag `run`.
GAUGES = {
    "step": "Steps done",
    "num_steps": "Steps of the whole run",
    "loss": "Training loss of the newest step",
    "eval_loss": "Loss of the newest evaluation",
    "tokens_per_second": "Tokens of the newest step, a second; of a journal that does not count them, targets",
    "workers": "Workers of the attempt",
    "restarts": "Attempts before this one",
    "newest_checkpoint_step": "Step of the newest checkpoint",
    "newest_checkpoint_timestamp_seconds": "When it was committed, in seconds since the epoch",
    "save_seconds": "From the beginning of the last save to its commit",
    "save_wait_seconds": "Of which training waited",
}
COUNTERS = {"useful_seconds": "Seconds spent on steps that were done for the first time"}
PREFIX = "outlast_"


def exported() -> set[str]:
    """The names under which Ray exports them; it ends a counter's with _total."""
    return {f"ray_{PREFIX}{name}" for name in GAUGES} | {f"ray_{PREFIX}{name}_total" for name in COUNTERS}


class Metrics:
    """The metrics of one attempt, set from rank 0's events.

    Args:
        storage: Where the run lies.
        run: Its name.
        attempt: Tells the attempt's name, once it has claimed.
    """

    def __init__(self, storage: Storage, run: str, attempt: Callable[[], str | None]) -> None:
        self._storage, self._run, self._attempt = storage, run, attempt
        self._known: dict[str, Metric] = {}
        self._furthest = 0

    def hear(self, event: Mapping[str, Any]) -> None:
        """Learns from an event, which has its time as `t`."""
        match event["event"]:
            case "start" | "resume":
                self._begin(event)
            case "plan":
                self._set("num_steps", event["num_steps"])
                self._set("workers", event["world_size"])
                self._set("step", event["step"])
            case "step":
                self._step(event)
            case "eval":
                self._set("eval_loss", event["eval_loss"])
            case "commit":
                self._set("newest_checkpoint_step", event["step"])
                self._set("newest_checkpoint_timestamp_seconds", event["t"])
            case "save":
                self._set("save_seconds", event["commit_s"])
                self._set("save_wait_seconds", event["blocked_s"])

    def _begin(self, event: Mapping[str, Any]) -> None:
        attempt = AttemptId.parse(self._attempt() or "")
        if attempt is not None:
            self._set("restarts", attempt.number - 1)
            with suppress(StorageError):
                self._furthest = furthest(self._storage, self._run, attempt)
        if event["event"] == "resume":
            self._set("newest_checkpoint_step", event["step"])
            self._set("newest_checkpoint_timestamp_seconds", event["committed_at"])

    def _step(self, event: Mapping[str, Any]) -> None:
        self._set("step", event["step"])
        if event["loss"] is not None:
            self._set("loss", event["loss"])
        if event["seconds"] > 0:
            self._set("tokens_per_second", event.get("tokens", event["count"]) / event["seconds"])
            if event["step"] > self._furthest:
                self._furthest = event["step"]
                self._metric("useful_seconds", Counter, COUNTERS).inc(event["seconds"])

    def _set(self, name: str, value: float) -> None:
        self._metric(name, Gauge, GAUGES).set(value)

    def _metric(self, name: str, kind: Any, texts: Mapping[str, str]) -> Any:
        if name not in self._known:
            made = kind(f"{PREFIX}{name}", texts[name], tag_keys=("run",))
            self._known[name] = made.set_default_tags({"run": self._run})
        return self._known[name]


def furthest(storage: Storage, run: str, attempt: AttemptId) -> int:
    """The furthest step that an earlier attempt has told of, as far as the last parts of their journals say.

    Raises:
        StorageError: A read failed.
    """
    lower = [item for item in list_attempts(storage, run) if item < attempt]
    events = (event for item in lower[-3:] for event in read_ends(storage, attempt_dir(run, item)))
    return max((event["step"] for event in events if event["event"] == "step"), default=0)
