"""A driver's connection to the root actor of a launch: it forwards events to the console, and stop requests to it.

A new driver must be attached in seconds, so nothing here may import torch; only the result of the launch, which comes
last, does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from outlast.checkpointing.errors import OutlastError, PreflightError, StorageError
from outlast.checkpointing.run_store.liveness import end_for, open_launch_files
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.driver.signals import INTERRUPTIONS, exit_when_interrupted, stop_flag

if TYPE_CHECKING:
    from outlast.cluster.driver.launch import Finished

NAMESPACE = "outlast-launches"
CALL_TIMEOUT_S = 10.0
_POLL_S = 0.25
#: Set in a Ray job: how long after a stop request the driver is killed.
_JOB_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
#: The part of that time after which the root is killed, because nobody would do it later.
_STOP_SHARE = 0.9

Listener = Callable[[dict[str, Any]], None]


class RootLost(OutlastError):
    """The root actor of a launch died, and its workers with it."""


def root_name(run: str, launch: str) -> str:
    """Return the name of a launch's root actor in `NAMESPACE`."""
    return f"{run}/{launch}"


@dataclass(slots=True)
class Attachment:
    """The connection to one root actor.

    Attributes:
        actor: The root actor.
        launch: Its launch.
        store: The run.
    """

    actor: Any
    launch: str
    store: RunStore

    def follow(self, listener: Listener, *, stop: bool = False) -> Finished:
        """Forward events, and the first SIGINT or SIGTERM as a stop request, until the launch has ended.

        The second signal ends the workers at once. `stop` requests a stop from the beginning.

        Raises:
            OutlastError: The error with which the launch ended, or the root is lost.
            KeyboardInterrupt: The launch was interrupted before training began, or twice.
        """
        cursor: int | None = None
        kill_at: float | None = None
        try:
            with stop_flag() as stopping:
                if stop:
                    stopping.set()
                while True:
                    bodies, cursor, end = self._poll(cursor)
                    for body in bodies:
                        listener(body)
                    if end is not None:
                        self._call("leave")
                        return _result(end)
                    if stopping.is_set():
                        if kill_at is None:
                            kill_at = time.monotonic() + _STOP_SHARE * float(os.environ.get(_JOB_STOP_VARIABLE, "inf"))
                        self._call("stop")
                        if time.monotonic() > kill_at:
                            raise KeyboardInterrupt
                    time.sleep(_POLL_S)
        except INTERRUPTIONS:
            self.quit()
            raise

    def _poll(self, cursor: int | None) -> tuple[list[dict[str, Any]], int | None, Any]:
        try:
            answer: tuple[list[dict[str, Any]], int, Any] = ray.get(
                self.actor.poll.remote(cursor), timeout=CALL_TIMEOUT_S
            )
            return answer
        except (GetTimeoutError, ActorUnavailableError):  # it is busy, or its node is slow to answer
            return [], cursor, None
        except RayActorError as error:
            if ended := self._recorded_end():  # this driver was away for longer than the result waits for it
                return [], cursor, ended
            message = "the actor that ran the workers died, and they with it"
            end_for(self.store, self.launch, RootLost.exit_code, message)
            hint = "run the same command again to resume from the newest intact checkpoint"
            raise RootLost(message, hint=hint) from error

    def _recorded_end(self) -> Finished | None:
        from outlast.cluster.driver.launch import recorded_end

        with contextlib.suppress(StorageError):
            return recorded_end(self.store.fresh(), self.launch)
        return None

    def _call(self, method: str) -> None:
        with contextlib.suppress(RayError):
            ray.get(getattr(self.actor, method).remote(), timeout=CALL_TIMEOUT_S)

    def kill(self) -> None:
        """End the root and its workers at once."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.actor)

    def quit(self) -> tuple[int, str]:
        """End the workers at once and record it. Returns the exit code, and what is saved. Callable from any thread."""
        self.kill()
        exit_code, saved = exit_when_interrupted(self.store)
        end_for(self.store, self.launch, exit_code, "")
        return exit_code, saved


def _result(end: Any) -> Finished:
    if isinstance(end, BaseException):
        raise end
    finished: Finished = end
    return finished


@contextlib.contextmanager
def attached(store: RunStore, address: str | None) -> Iterator[tuple[Attachment, Mapping[str, Any]] | None]:
    """Yield the connection to the run's root actor on this cluster, and the launch's liveness file; None without one.

    Only if a launch of the run is active with a root actor somewhere, the cluster is joined.
    """
    bodies: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(StorageError):  # a new launch reports it
        bodies = {launch: body for launch, body in open_launch_files(store).items() if body.get("root")}
    if not bodies:
        yield None
        return
    with ray_session(address):
        found = ((find_root(body["root"]), body) for _, body in sorted(bodies.items(), reverse=True))
        yield next(((attachment, body) for attachment, body in found if attachment is not None), None)


def find_root(name: str) -> Attachment | None:
    """Return the connection to a root actor of this cluster that answers and has begun; None without one."""
    run, _, launch = name.rpartition("/")
    with contextlib.suppress(ValueError, RayError):
        actor = ray.get_actor(name, namespace=NAMESPACE)
        if url := ray.get(actor.storage.remote(), timeout=CALL_TIMEOUT_S):
            return Attachment(actor, launch, RunStore(open_storage(url), run))
    return None


def stop_run(run: str, address: str) -> Finished | None:
    """Have the root actors of a run on this cluster commit and end, and wait for it. Return None if there is none.

    Raises PreflightError if they are of runs in several storages.
    """
    with ray_session(address):
        names = [item["name"] for item in ray.util.list_named_actors(True) if item["namespace"] == NAMESPACE]
        found = [root for name in names if name.rpartition("/")[0] == run and (root := find_root(name))]
        if len(urls := sorted({root.store.storage.url for root in found})) > 1:
            hint = "attach to the one that is meant: outlast train RUN.yaml --address …; and press Ctrl-C"
            raise PreflightError(f"several runs are named {run}: in {', '.join(urls)}", hint=hint)
        ends = [root.follow(lambda body: None, stop=True) for root in found]
    return ends[-1] if ends else None
