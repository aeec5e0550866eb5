"""The coordinator: one small actor between the driver and the ranks. It passes stop requests to the workers and live
events to the driver, and holds the heartbeats of the ranks' watchdogs.

If this actor dies, training and checkpoints are unaffected: it must never hold what decides on either. Until it is
restarted, a stop request waits for the next signal, the live display is not updated, and an announced loss may count
as a failure.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store import events
from outlast.cluster.fault_tolerance.hang_detection import GroupProgress, Hang, Heartbeat

NAMESPACE = "outlast"
CALL_TIMEOUT_S = 10.0


class SaveRequest:
    """A requested commit and its progress; without a reason, no request. Pure."""

    def __init__(self, reason: str = "") -> None:
        self._reason = reason
        self._is_taken = False
        self._step: int | None = None
        self.is_fulfilled = not reason

    def take(self, *, is_training: bool) -> str | None:
        """Return the reason, once."""
        if self._is_taken or self.is_fulfilled:
            return None
        self._is_taken, self.is_fulfilled = True, not is_training
        return self._reason if is_training else None

    def apply(self, event: events.Event) -> None:
        """Update from an event of rank 0."""
        match event:
            case events.SaveRequestedEvent(step=step) if event.reason == self._reason:
                self._step = step
            case events.CommitEvent(step=step) if self._step is not None and step >= self._step:
                self.is_fulfilled = True
            case events.DoneEvent() | events.StopEvent() | events.SupersededEvent():
                self.is_fulfilled = True  # no more steps will come


class Coordinator:
    """Stop and save requests, live events and heartbeats of one launch; runs as a Ray actor."""

    def __init__(self) -> None:
        self._stop = False
        self._events: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._failures: dict[int, OutlastError] = {}
        self._verdict: OutlastError | None = None
        self._drained: set[str] = set()
        self._reached: dict[str, events.Reached] = {}
        self._groups: dict[str, GroupProgress] = {}
        self._save = SaveRequest()
        self._last_call_at = time.monotonic()

    def stop(self) -> None:
        """Make the workers commit and end."""
        self._stop = True

    def exchange(self, bodies: list[dict[str, Any]]) -> bool:
        """Add rank 0's events. Returns whether to stop."""
        self._events.extend({"t": time.time(), **body} for body in bodies)
        for body in bodies:
            event = events.parse_event(body)
            self._save.apply(event)
            match event:
                case events.CommitEvent():  # progress: a verdict that came while the next group was running is void
                    self._verdict = None
                case events.StepEvent(step=step, ended_at=float(ended_at)) if "sender" in body:
                    self._reached[body["sender"]] = events.Reached(step, ended_at)
        return self._stop

    def reached(self, attempt: str) -> events.Reached | None:
        """Return an attempt's last known step and its end: a killed rank 0 loses the last seconds of its journal."""
        return self._reached.get(attempt)

    def request_save(self, reason: str) -> None:
        """Request a commit from rank 0, because the group is about to be ended on purpose."""
        self._save = SaveRequest(reason)
        self._last_call_at = time.monotonic()

    def take_save_request(self, *, is_training: bool) -> str | None:
        """Return to rank 0, once, why to save. Before the first step there is nothing to save."""
        self._last_call_at = time.monotonic()
        return self._save.take(is_training=is_training)

    def is_saved(self, silence_s: float) -> bool:
        """Return whether the requested commit is made, or rank 0 has been silent for so long that it will not be."""
        return self._save.is_fulfilled or time.monotonic() - self._last_call_at > silence_s

    def drain(self) -> list[dict[str, Any]]:
        """Return the events that the driver has not seen."""
        bodies, self._events = list(self._events), deque(maxlen=10_000)
        return bodies

    def drain_noticed(self, attempt: str) -> None:
        """Record that the loss of a node of this attempt was announced."""
        self._drained.add(attempt)

    def was_drained(self, attempt: str) -> bool:
        """Return whether the loss of a node of this attempt was announced."""
        return attempt in self._drained

    def beat(self, group: str, beat: Heartbeat) -> tuple[Hang | None, list[events.SlowRank]]:
        """Record a heartbeat. Returns the hang of the rank's group, if any, and to rank 0 the slow ranks."""
        progress = self._groups.setdefault(group, GroupProgress())
        return progress.apply(beat, time.monotonic()), progress.slow() if beat.rank == 0 else []

    def last_report(self, group: str, rank: int) -> bool:
        """Record that a rank of a hanging group has written its stacks. True once all have."""
        return self._groups.setdefault(group, GroupProgress()).write(rank, time.monotonic())

    def beats(self, group: str) -> dict[int, tuple[Heartbeat, float]]:
        """Return the last heartbeat of each rank of a group, and its age in seconds."""
        return self._groups.setdefault(group, GroupProgress()).ages(time.monotonic())

    def take_hang(self) -> Hang | None:
        """Return the hang of the newest group, if any, once."""
        for group in list(self._groups.values())[-1:]:
            hang, group.reported = (None if group.reported else group.check(time.monotonic())), True
            return hang
        return None

    def fail(self, rank: int, error: OutlastError) -> int:
        """Record a rank's permanent error. Returns how many ranks have one."""
        self._failures[rank] = error
        return len(self._failures)

    def give_up(self, error: OutlastError) -> None:
        """Record that the run is given up; `fail` does not count it, because no rank failed."""
        self._verdict = error

    def failure(self) -> OutlastError | None:
        """Return the lowest rank's permanent error, or why the run is given up, if either."""
        return self._failures[min(self._failures)] if self._failures else self._verdict


def start_coordinator(launch: str) -> Any:
    """Start the coordinator of a launch on the driver's node; it ends with the driver.

    The affinity is hard: with a soft one Ray puts it on another node where the driver's offers no CPUs (a head on
    Kubernetes), and a coordinator that is lost with that node loses which losses were announced.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Coordinator)
    return actor.options(name=f"coordinator-{launch}", namespace=NAMESPACE).remote()


class CoordinatorHandle:
    """The coordinator, called from another process by the names of its methods. Calls return None if it is gone."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.actor is None:
                return None
            with suppress(RayError):
                return ray.get(getattr(self.actor, method).remote(*arguments, **options), timeout=CALL_TIMEOUT_S)
            return None

        return call


def find_coordinator(launch: str) -> CoordinatorHandle:
    """Return the coordinator of a launch; its `actor` is None if it is gone."""
    with suppress(ValueError, RayError):
        return CoordinatorHandle(ray.get_actor(f"coordinator-{launch}", namespace=NAMESPACE))
    return CoordinatorHandle(None)
