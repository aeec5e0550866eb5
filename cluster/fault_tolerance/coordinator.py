"""The hub: one small actor between the driver and the ranks. Stop requests go down, live events come up, and the ranks'
watchdogs meet there.

Its loss costs no step: nothing that decides what is trained or kept passes through it. Without it a stop request waits
for the next signal, the screen stays still, and a loss that was announced before may count as a failure.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store import events
from outlast.cluster.fault_tolerance.hang_detection import GroupProgress, Hang, Heartbeat

NAMESPACE = "outlast"
_TIMEOUT_S = 10.0


class SaveRequest:
    """A commit that somebody outside asks rank 0 for, and how far it is. Pure.

    Args:
        reason: Why; empty for no wish.
    """

    def __init__(self, reason: str = "") -> None:
        self._reason = reason
        self._is_taken = False
        self._step: int | None = None
        self.is_fulfilled = not reason

    def take(self, *, is_training: bool) -> str | None:
        """The reason, once."""
        if self._is_taken or self.is_fulfilled:
            return None
        self._is_taken, self.is_fulfilled = True, not is_training
        return self._reason if is_training else None

    def apply(self, event: events.Event) -> None:
        """Learns from an event of rank 0."""
        match event:
            case events.SaveRequestedEvent(step=step) if event.reason == self._reason:
                self._step = step
            case events.CommitEvent(step=step) if self._step is not None and step >= self._step:
                self.is_fulfilled = True
            case events.DoneEvent() | events.StopEvent() | events.SupersededEvent():
                self.is_fulfilled = True  # no more steps will come


class Coordinator:
    """The actor's body."""

    def __init__(self) -> None:
        self._stop = False
        self._events: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._failures: dict[int, OutlastError] = {}
        self._verdict: OutlastError | None = None
        self._drained: set[str] = set()
        self._reached: dict[str, events.Reached] = {}
        self._groups: dict[str, GroupProgress] = {}
        self._wish = SaveRequest()
        self._heard_at = time.monotonic()

    def stop(self) -> None:
        """Asks the workers to commit and end."""
        self._stop = True

    def exchange(self, bodies: list[dict[str, Any]]) -> bool:
        """Takes rank 0's events; tells it whether to stop."""
        self._events.extend({"t": time.time(), **body} for body in bodies)
        for body in bodies:
            event = events.parse_event(body)
            self._wish.apply(event)
            match event:
                case events.CommitEvent():  # progress: a verdict that came while the next group was at work is void
                    self._verdict = None
                case events.StepEvent(step=step, ended_at=float(ended_at)) if "sender" in body:
                    self._reached[body["sender"]] = events.Reached(step, ended_at)
        return self._stop

    def reached(self, attempt: str) -> events.Reached | None:
        """The last step that an attempt told of, and when it ended: a rank 0 that is killed takes the last seconds of
        its journal with it."""
        return self._reached.get(attempt)

    def want_save(self, reason: str) -> None:
        """Asks rank 0 for a commit, because the group is about to be ended on purpose."""
        self._wish = SaveRequest(reason)
        self._heard_at = time.monotonic()

    def wanted(self, *, is_training: bool) -> str | None:
        """Tells rank 0, once, why to save. Before the first step there is nothing to save."""
        self._heard_at = time.monotonic()
        return self._wish.take(is_training=is_training)

    def is_saved(self, silence_s: float) -> bool:
        """Whether nobody needs to wait any longer for the commit that was asked for: it is made, or rank 0 has been
        silent for so long."""
        return self._wish.is_fulfilled or time.monotonic() - self._heard_at > silence_s

    def drain(self) -> list[dict[str, Any]]:
        """Gives the driver the events that it has not seen."""
        bodies, self._events = list(self._events), deque(maxlen=10_000)
        return bodies

    def drain_noticed(self, attempt: str) -> None:
        """Takes note that a node of this attempt was announced to go."""
        self._drained.add(attempt)

    def was_drained(self, attempt: str) -> bool:
        """Whether a node of this attempt was announced to go."""
        return attempt in self._drained

    def beat(self, group: str, beat: Heartbeat) -> tuple[Hang | None, list[events.SlowRank]]:
        """Takes note of where a rank is. Tells it whether its group hangs, and rank 0 which ranks are slow."""
        known = self._groups.setdefault(group, GroupProgress())
        return known.apply(beat, time.monotonic()), known.slow() if beat.rank == 0 else []

    def last_report(self, group: str, rank: int) -> bool:
        """Takes note that a rank of a group that hangs has written its stacks. True once all have."""
        return self._groups.setdefault(group, GroupProgress()).write(rank, time.monotonic())

    def beats(self, group: str) -> dict[int, tuple[Heartbeat, float]]:
        """Where the ranks of a group were, and how many seconds ago."""
        return self._groups.setdefault(group, GroupProgress()).ages(time.monotonic())

    def take_hang(self) -> Hang | None:
        """How the newest group hung, if it did; once."""
        for group in list(self._groups.values())[-1:]:
            hang, group.reported = (None if group.reported else group.look(time.monotonic())), True
            return hang
        return None

    def fail(self, rank: int, error: OutlastError) -> int:
        """Takes note that a rank cannot go on, and that trying again would not help. Returns how many there are."""
        self._failures[rank] = error
        return len(self._failures)

    def give_up(self, error: OutlastError) -> None:
        """Takes note that the run is given up; no rank has failed by that, so `fail` does not count it."""
        self._verdict = error

    def failure(self) -> OutlastError | None:
        """The lowest rank's permanent error, or why the run is given up, if there is either."""
        return self._failures[min(self._failures)] if self._failures else self._verdict


def start_coordinator(launch: str) -> Any:
    """Starts the hub of a launch on the driver's node; it goes with the driver.

    The affinity is hard: with a soft one Ray puts it on another node where the driver's offers no CPUs (a head on
    Kubernetes), and a hub that is lost with that node forgets which losses were announced.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Coordinator)
    return actor.options(name=f"hub-{launch}", namespace=NAMESPACE).remote()


def find_coordinator(launch: str) -> Any:
    """The hub of a launch, or None when it has gone."""
    try:
        return ray.get_actor(f"hub-{launch}", namespace=NAMESPACE)
    except (ValueError, RayError):
        return None


def result_or_default(call: Any, otherwise: Any = None) -> Any:
    """The answer to a call to the hub, or `otherwise` when the hub has gone."""
    try:
        return ray.get(call, timeout=_TIMEOUT_S)
    except (RayError, GetTimeoutError):
        return otherwise
