"""The hub: one small actor between the driver and rank 0. Stop requests go down, live events come up.

Its loss is harmless. Nothing that decides what is trained or kept passes through it; without it a stop request waits
for the next signal and the screen stays still.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.errors import OutlastError
from outlast.cluster.preemption import Watch, draining_nodes
from outlast.cluster.standby import Standbys

NAMESPACE = "outlast"
_PERIOD_S = 0.5
_PATIENCE_S = 10.0
_AGREEMENT_S = 5.0


class Hub:
    """The actor's body."""

    def __init__(self) -> None:
        self._stop = False
        self._events: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._failures: dict[int, OutlastError] = {}
        self._drained: set[str] = set()

    def stop(self) -> None:
        """Asks the workers to commit and end."""
        self._stop = True

    def exchange(self, events: list[dict[str, Any]]) -> bool:
        """Takes rank 0's events; tells it whether to stop."""
        self._events.extend(events)
        return self._stop

    def drain(self) -> list[dict[str, Any]]:
        """Gives the driver the events that it has not seen."""
        events, self._events = list(self._events), deque(maxlen=10_000)
        return events

    def drain_noticed(self, attempt: str) -> None:
        """Takes note that a node of this attempt was announced to go."""
        self._drained.add(attempt)

    def was_drained(self, attempt: str) -> bool:
        """Whether a node of this attempt was announced to go."""
        return attempt in self._drained

    def fail(self, rank: int, error: OutlastError) -> int:
        """Takes note that a rank cannot go on, and that trying again would not help. Returns how many there are."""
        self._failures[rank] = error
        return len(self._failures)

    def failure(self) -> OutlastError | None:
        """The lowest rank's permanent error, if there is any."""
        return self._failures[min(self._failures)] if self._failures else None


def start_hub(launch: str) -> Any:
    """Starts the hub of a launch on the driver's node; it goes with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Hub)
    return actor.options(name=f"hub-{launch}", namespace=NAMESPACE).remote()


def find_hub(launch: str) -> Any:
    """The hub of a launch, or None when it has gone."""
    try:
        return ray.get_actor(f"hub-{launch}", namespace=NAMESPACE)
    except (ValueError, RayError):
        return None


def ask(call: Any, otherwise: Any = None) -> Any:
    """The answer to a call to the hub, or `otherwise` when the hub has gone."""
    try:
        return ray.get(call, timeout=_PATIENCE_S)
    except (RayError, GetTimeoutError):
        return otherwise


class Line:
    """A worker's line to the hub: the `Control` of its step loop. On rank 0 a thread keeps it alive."""

    def __init__(self, launch: str, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._stop = False
        self._save: str | None = None
        self._watch: Watch | None = None
        self._attempt = "none"
        self._standbys: Standbys | None = None
        self._is_under_way = False
        self._events: deque[dict[str, Any]] = deque(maxlen=1_000)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._hub = find_hub(launch)

    def __enter__(self) -> Line:
        if self._rank == 0 and self._hub is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE_S)

    def stop_requested(self) -> bool:
        return self._stop

    def save_requested(self) -> str | None:
        reason, self._save = self._save, None
        return reason

    def watch(self, nodes: Sequence[str]) -> None:
        """From now on asks for a save when one of these nodes is about to be lost, and keeps standbys there (rank 0).

        Args:
            nodes: The node of each rank.
        """
        self._watch = Watch(set(nodes))
        self._standbys = Standbys(nodes)

    def claimed(self, attempt: str) -> None:
        self._attempt = attempt

    def progress(self, event: dict[str, Any]) -> None:
        self._events.append({"t": time.time(), **event})
        self._is_under_way = self._is_under_way or event["event"] == "under-way"

    def earlier_failure(self) -> OutlastError | None:
        """The permanent error of an earlier attempt of this launch, for which Ray has restarted the group."""
        failure: OutlastError | None = ask(self._hub.failure.remote()) if self._hub is not None else None
        return failure

    def all_fail(self, error: OutlastError) -> bool:
        """Reports a permanent error. True once every rank has one: then all may return, and nobody is waited for."""
        deadline = time.monotonic() + _AGREEMENT_S
        while self._hub is not None and time.monotonic() < deadline:
            if ask(self._hub.fail.remote(self._rank, error), 0) == self._size:
                return True
            time.sleep(0.1)
        return False

    def _talk(self) -> None:
        while True:
            closing = self._closing.wait(_PERIOD_S)
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._stop = bool(ask(self._hub.exchange.remote(events), self._stop)) or self._stop
            with contextlib.suppress(RayError, RuntimeError, OSError):  # asked again in half a second
                self._look_for_drains()
                if self._is_under_way and self._standbys is not None:  # earlier, the first step would wait for them
                    self._standbys.look()
            if closing:
                return

    def _look_for_drains(self) -> None:
        if self._watch is None:
            return
        reason = self._watch.look(draining_nodes())
        if reason is not None:
            self._save = reason
            ask(self._hub.drain_noticed.remote(self._attempt))
