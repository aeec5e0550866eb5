"""A worker's connection to the coordinator: events and heartbeats up, stop and save requests down.

The step loop's calls must never wait for the network: they read and fill queues that rank 0's thread exchanges with the
actor. Without a coordinator every call returns a default, and training continues.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store.events import CommitEvent, PlanEvent, StepEvent, parse_event
from outlast.cluster.fault_tolerance.coordinator import CALL_TIMEOUT_S, find_coordinator
from outlast.cluster.fault_tolerance.preemption_saves import PreemptionWatch
from outlast.cluster.ray_internals import draining_nodes
from outlast.trainers.loop.rank_activity import RankActivity, StepPhase

_PERIOD_S = 0.5
_AGREEMENT_S = 5.0


class CoordinatorClient:
    """A worker's connection to the coordinator: the `Control` of its step loop. On rank 0 a thread keeps it alive.

    Args:
        launch: The launch.
        rank: This worker's rank; `begin` changes it.
        size: Number of ranks.

    Attributes:
        attempt: Name of the attempt, once it is claimed.
        listener: Called with each event on rank 0, in that thread.
    """

    def __init__(self, launch: str, rank: int = 0, size: int = 1) -> None:
        self._rank, self._size = rank, size
        self.step_progress = RankActivity()
        self._stop = False
        self._saves: deque[str] = deque()
        self._watch: PreemptionWatch | None = None
        self.attempt: str | None = None
        self.listener: Callable[[dict[str, Any]], None] = lambda event: None
        self._is_training = False
        self._plan: dict[str, Any] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=1_000)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        self.coordinator = find_coordinator(launch)

    def __enter__(self) -> CoordinatorClient:
        return self

    def begin(self, rank: int, size: int) -> None:
        """Be rank `rank` of `size` from now on."""
        self._rank, self._size = rank, size
        if rank == 0 and self.coordinator.actor is not None and self._thread.ident is None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CALL_TIMEOUT_S)

    def stop_requested(self) -> bool:
        return self._stop

    def asks_to_stop(self) -> bool:
        """Ask the coordinator whether to stop, on any rank."""
        self._stop = bool(self.coordinator.exchange([])) or self._stop
        return self._stop

    def save_requested(self) -> str | None:
        return self._saves.popleft() if self._saves else None

    def watch(self, nodes: Sequence[str]) -> None:
        """Request a save whenever one of these nodes is about to be lost (rank 0)."""
        self._watch = PreemptionWatch(set(nodes))

    def claimed(self, attempt: str) -> None:
        self.attempt = attempt
        if self._plan is not None:  # a generation that goes on in memory plans before it claims
            self._events.append({"t": time.time(), "sender": attempt, **self._plan})

    def at(self, phase: StepPhase, step: int) -> None:
        self.step_progress.at(phase, step)

    def worked(self, seconds: float) -> None:
        self.step_progress.worked(seconds)

    def progress(self, event: dict[str, Any]) -> None:
        self._events.append({"t": time.time(), "sender": self.attempt, **event})
        match parse_event(event):
            case StepEvent():
                self._is_training = True
            case PlanEvent():
                self._plan = event
            case CommitEvent(seconds=float(seconds)) if self._watch is not None:
                self._watch.save_s = seconds

    def earlier_failure(self) -> OutlastError | None:
        """Return the permanent error of an earlier attempt of this launch, after which Ray restarted the group."""
        failure: OutlastError | None = self.coordinator.failure()
        return failure

    def all_fail(self, error: OutlastError) -> bool:
        """Report a permanent error. True once every rank has reported one, so that all may return."""
        deadline = time.monotonic() + _AGREEMENT_S
        while self.coordinator.actor is not None and time.monotonic() < deadline:
            if self.coordinator.fail(self._rank, error) == self._size:
                return True
            time.sleep(0.1)
        return False

    def _exchange(self) -> None:
        while True:
            closing = self._closing.wait(_PERIOD_S)
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._stop = bool(self.coordinator.exchange(events)) or self._stop
            with contextlib.suppress(RayError, RuntimeError, OSError):  # checked again in half a second
                if self._watch is not None and (reason := self._watch.check(draining_nodes())):
                    self._saves.append(reason)
                    self.coordinator.drain_noticed(self.attempt or "unclaimed")
            if reason := self.coordinator.take_save_request(is_training=self._is_training):
                self._saves.append(reason)  # queued: the requester waits for the save with this reason
            for event in events:  # last, because a listener may be slow
                self.listener(event)
            if closing:
                return
