"""The root actor of a launch: it runs Ray Train's controller and the workers, which so outlive the driver.

Ray ends an actor with the process that owns it. This actor is detached, so its owner is the cluster; Ray Train's
controller, the coordinator and the workers live below it and end with it. It must never stay without a reason: it ends
with its launch, on a stop request, or when no driver has called for `failure.lease`.

A driver that attaches imports this module, so what the workers need is imported by the actor alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.attempt_history import settings_digest
from outlast.checkpointing.run_store.liveness import LivenessFile
from outlast.cluster.driver.detached.attachment import root_name
from outlast.cluster.driver.signals import INTERRUPTIONS, StopFlag

if TYPE_CHECKING:
    from outlast.cluster.config.run_config import RunConfig
    from outlast.cluster.driver.launch import Finished
    from outlast.trainers.attempt import Assignment

#: How long a result waits for a driver to take it.
_TAKEN_S = 20.0
_POLL_S = 0.5
_NUM_EVENTS = 10_000


@dataclass(frozen=True)
class RootWork:
    """What a root actor runs."""

    config: RunConfig
    assignment: Assignment
    cpus: float
    began: float  #: start of the launch, seconds since the epoch
    environment: Mapping[str, str]  #: variables of the driver for Ray Train


class LaunchRoot:
    """The actor. A driver starts it with `start`; any driver then polls for events and, at last, the result."""

    def __init__(self, idle_s: float) -> None:
        """Wait `idle_s` for the work."""
        self._stopping, self._ended, self._taken = StopFlag(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=_NUM_EVENTS)
        self._num_events = self._num_seen = 0
        self._context: list[dict[str, Any]] = []
        self._end: Finished | BaseException | None = None
        self._called_at = time.monotonic()
        self._lease_s: float | None = idle_s
        self._storage = ""
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=import_module, args=("outlast.cluster.driver.launch",), daemon=True).start()

    def start(self, work: RootWork) -> None:
        """Begin to run the workers."""
        os.environ.update(work.environment)
        store, launch = work.config.store, work.assignment.launch
        path, digest = f"{store.launch_dir(launch)}/alive.json", settings_digest(work.assignment.declared)
        liveness = LivenessFile(store.storage, path, digest, work.began, root=root_name(store.run, launch))
        self._lease_s, self._called_at = work.config.failure.lease_s, time.monotonic()
        self._storage = store.storage.url
        threading.Thread(target=self._run, args=(work, liveness), daemon=True).start()

    def storage(self) -> str:
        """Return the URL of the run's storage; empty before the launch has begun, and once its result is taken."""
        return "" if self._taken.is_set() else self._storage

    def poll(self, cursor: int | None) -> tuple[list[dict[str, Any]], int, Finished | BaseException | None]:
        """Return the events after `cursor`, the next cursor, and the result once there is one.

        Without a cursor: the events that no driver has received, after those without which they cannot be shown.
        """
        with self._lock:
            self._called_at = time.monotonic()
            end = self._end  # before the events: the result comes with the last of them
            since = self._num_seen if cursor is None else cursor
            self._num_seen = max(self._num_seen, since)
            oldest = self._num_events - len(self._events)
            bodies = list(self._events)[max(0, since - oldest) :]
            if cursor is None:
                bodies = [body for body in self._context if body not in bodies] + bodies
            return bodies, self._num_events, end

    def stop(self) -> None:
        """Have the workers commit and end."""
        self._stopping.set()

    def leave(self) -> None:
        """Note that a driver has the result."""
        self._taken.set()

    def _add_event(self, body: dict[str, Any]) -> None:
        body = {"t": time.time(), **body}
        with self._lock:
            self._events.append(body)
            self._num_events += 1
            match events.parse_event(body):
                case events.PlanEvent():
                    self._context = [body]
                case events.UnderWayEvent():
                    self._context.append(body)

    def _run(self, work: RootWork, liveness: LivenessFile) -> None:
        def listen(body: dict[str, Any]) -> None:
            liveness.apply(body)
            self._add_event(body)

        @contextlib.contextmanager
        def stops() -> Iterator[StopFlag]:
            yield self._stopping

        from outlast.cluster.driver.launch import record_end, train_to_end
        from outlast.cluster.fault_tolerance.failure_cause import RunFailed

        store, launch = work.config.store, work.assignment.launch
        try:
            self._end = record_end(
                store,
                launch,
                liveness,
                lambda: train_to_end(work.config, work.assignment, work.cpus, listen, stops),
            )
        except (OutlastError, *INTERRUPTIONS) as error:
            self._end = error
        except Exception as error:  # noqa: BLE001 - raised again in the driver, which may lack the class
            self._end = RunFailed(redact(f"unexpected {type(error).__name__}: {error}"))
        finally:
            self._ended.set()

    def _watch(self) -> None:
        """Request a stop at the end of the lease; end the actor after its launch."""
        while not self._ended.wait(_POLL_S):
            if self._lease_s is None or time.monotonic() - self._called_at < self._lease_s:
                continue
            if not self._storage:
                break
            if not self._stopping.is_set():
                self._add_event(events.NoteEvent(text="no driver within failure.lease: stopping").to_json())
                self._stopping.set()
        while not self._taken.wait(_POLL_S) and time.monotonic() - self._called_at < _TAKEN_S:
            pass
        time.sleep(_POLL_S)  # the answer to `leave` is on its way
        ray.kill(ray.get_runtime_context().current_actor)
