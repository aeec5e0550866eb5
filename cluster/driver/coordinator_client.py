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
from outlast.checkpointing.run_store.events import CommitEvent, SlowRank, StepEvent, parse_event
from outlast.cluster.fault_tolerance.coordinator import CALL_TIMEOUT_S, find_coordinator, result_or_default
from outlast.cluster.fault_tolerance.hang_detection import Hang, Heartbeat
from outlast.cluster.fault_tolerance.preemption_saves import PreemptionWatch
from outlast.cluster.ray_internals import draining_nodes
from outlast.trainers.loop.rank_activity import RankActivity, StepPhase

_PERIOD_S = 0.5
_AGREEMENT_S = 5.0


class CoordinatorClient:
    """A worker's connection to the coordinator: the `Control` of its step loop. On rank 0 a thread keeps it alive.

    Attributes:
        attempt: Name of the attempt, once it is claimed.
        listener: Called with each event on rank 0, in that thread.
    """

    def __init__(self, launch: str, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self.step_progress = RankActivity()
        self._stop = False
        self._saves: deque[str] = deque()
        self._watch: PreemptionWatch | None = None
        self.attempt: str | None = None
        self.listener: Callable[[dict[str, Any]], None] = lambda event: None
        self._is_training = False
        self._events: deque[dict[str, Any]] = deque(maxlen=1_000)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        self._coordinator = find_coordinator(launch)

    def __enter__(self) -> CoordinatorClient:
        if self._rank == 0 and self._coordinator is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(CALL_TIMEOUT_S)

    def stop_requested(self) -> bool:
        return self._stop

    def save_requested(self) -> str | None:
        return self._saves.popleft() if self._saves else None

    def watch(self, nodes: Sequence[str]) -> None:
        """Request a save whenever one of these nodes is about to be lost (rank 0)."""
        self._watch = PreemptionWatch(set(nodes))

    def claimed(self, attempt: str) -> None:
        self.attempt = attempt

    def at(self, phase: StepPhase, step: int) -> None:
        self.step_progress.at(phase, step)

    def worked(self, seconds: float) -> None:
        self.step_progress.worked(seconds)

    def beat(self, group: str, beat: Heartbeat) -> tuple[Hang | None, list[SlowRank]] | None:
        """Implement `WatchdogTransport`, with the next two methods."""
        answer: tuple[Hang | None, list[SlowRank]] | None = self._ask("beat", group, beat)
        return answer

    def last_report(self, group: str, rank: int) -> bool | None:
        answer: bool | None = self._ask("last_report", group, rank)
        return answer

    def beats(self, group: str) -> dict[int, tuple[Heartbeat, float]] | None:
        answer: dict[int, tuple[Heartbeat, float]] | None = self._ask("beats", group)
        return answer

    def _ask(self, method: str, *arguments: Any) -> Any:
        return (
            None
            if self._coordinator is None
            else result_or_default(getattr(self._coordinator, method).remote(*arguments))
        )

    def progress(self, event: dict[str, Any]) -> None:
        self._events.append({"t": time.time(), "sender": self.attempt, **event})
        match parse_event(event):
            case StepEvent():
                self._is_training = True
            case CommitEvent(seconds=float(seconds)) if self._watch is not None:
                self._watch.save_s = seconds

    def earlier_failure(self) -> OutlastError | None:
        """Return the permanent error of an earlier attempt of this launch, after which Ray restarted the group."""
        failure: OutlastError | None = (
            result_or_default(self._coordinator.failure.remote()) if self._coordinator is not None else None
        )
        return failure

    def all_fail(self, error: OutlastError) -> bool:
        """Report a permanent error. True once every rank has reported one, so that all may return."""
        deadline = time.monotonic() + _AGREEMENT_S
        while self._coordinator is not None and time.monotonic() < deadline:
            if result_or_default(self._coordinator.fail.remote(self._rank, error), 0) == self._size:
                return True
            time.sleep(0.1)
        return False

    def _exchange(self) -> None:
        while True:
            closing = self._closing.wait(_PERIOD_S)
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._stop = bool(result_or_default(self._coordinator.exchange.remote(events), self._stop)) or self._stop
            with contextlib.suppress(RayError, RuntimeError, OSError):  # checked again in half a second
                self._check_drains()
            if reason := result_or_default(self._coordinator.take_save_request.remote(is_training=self._is_training)):
                self._saves.append(reason)  # queued: the requester waits for the save with this reason
            for event in events:  # last, because a listener may be slow
                self.listener(event)
            if closing:
                return

    def _check_drains(self) -> None:
        if self._watch is None:
            return
        reason = self._watch.check(draining_nodes())
        if reason is not None:
            self._saves.append(reason)
            result_or_default(self._coordinator.drain_noticed.remote(self.attempt or "unclaimed"))
