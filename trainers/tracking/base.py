"""Interface of tracker backends, and the data they receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from outlast.checkpointing.run_store.events import EvalEvent, SaveEvent, StepEvent, UnderWayEvent
from outlast.checkpointing.run_store.store import RunStore

TrackedEvent = StepEvent | EvalEvent | SaveEvent | UnderWayEvent


@dataclass(slots=True)
class Watermark:
    """Newest steps that a tracker has."""

    floor: int = -1  #: of values that are not in `by_name`
    by_name: dict[str, int] = field(default_factory=dict)

    def news(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Return the values that the tracker does not have yet, and mark them as sent."""
        fresh = {name: value for name, value in values.items() if step > self.by_name.get(name, self.floor)}
        self.by_name |= dict.fromkeys(fresh, step)
        return fresh


class TrackerBackend(Protocol):
    """Interface of a tracker, called from its own thread. Its methods may raise any exception and may block."""

    name: str

    def open(self) -> Watermark:
        """Find the tracker's record of the run, or create it."""

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        """Log the values of a step that took place at `at`, in seconds since the epoch."""

    def close(self) -> None:
        """Flush all values and close the tracker."""


@dataclass(frozen=True, slots=True)
class TrackerContext:
    """The run as a tracker sees it."""

    store: RunStore
    id: str  #: unique: another run of the same name has another id
    settings: Mapping[str, Any]  #: as declared, flattened
    project: str  #: the setting `track.project`
    options: Mapping[str, Any]  #: the tracker's entry of `track.options`
