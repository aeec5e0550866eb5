"""What trackers are given, and what a backend implements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from outlast.checkpointing.run_store.store import RunStore

if TYPE_CHECKING:
    pass


TrackedEvent = Mapping[str, Any]


@dataclass(slots=True)
class Watermark:
    """How far a tracker has come.

    Attributes:
        floor: The newest step of whatever is not in `by_name`.
        by_name: The newest step of each value.
    """

    floor: int = -1
    by_name: dict[str, int] = field(default_factory=dict)

    def news(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Those of the values that the tracker has not got yet, which from now on it has."""
        fresh = {name: value for name, value in values.items() if step > self.by_name.get(name, self.floor)}
        self.by_name |= dict.fromkeys(fresh, step)
        return fresh


class TrackerBackend(Protocol):
    """A tracker, as its thread uses it. All but `name` may raise anything, and take long."""

    name: str

    def open(self) -> Watermark:
        """Finds the run's tracker run, or begins it."""

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        """Takes values of a step, which happened at `at`, in seconds since the epoch."""

    def close(self) -> None:
        """Hands everything over."""


@dataclass(frozen=True, slots=True)
class TrackerContext:
    """What a tracker knows of the run.

    Attributes:
        store: The run.
        id: Names it among all runs: another one of this name has another.
        settings: Its settings as declared, flat.
        project: The setting of that name.
        options: Those of this tracker.
    """

    store: RunStore
    id: str
    settings: Mapping[str, Any]
    project: str
    options: Mapping[str, Any]
