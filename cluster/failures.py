"""Why a worker group died, and whether the run may try again.

Ray says what it saw of each rank; a rank that died takes others with it, whose own errors only say that a connection
broke. `classify` finds the cause among them. Ray's own count is not used: it books about half of all preemptions as
failures, and never forgets. Here a preemption is counted apart, whatever Ray calls it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import ray
import ray._private.state
import ray.train
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from outlast.checkpointing.errors import OutlastError, StorageError
from outlast.checkpointing.journal import Journal
from outlast.checkpointing.layout import AttemptId, launch_dir
from outlast.checkpointing.lineage import list_attempts, read_claim
from outlast.checkpointing.storage import open_storage
from outlast.cluster.hub import ask, find_hub


class RunFailed(OutlastError):
    """The workers failed more often than the run may, or in a way that a restart does not mend."""


#: What a rank says when another one has gone.
_ECHOES = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "gloo", "NCCL", "Socket Timeout")
#: How Ray says that it ended an actor itself.
_INTENDED = ("ray.kill", "out of scope", "intended", "ref count")
SEARCH_S = 20.0


class Cause(Enum):
    """What took a worker group down, the most telling first."""

    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    WORKER_DIED = "worker died"
    ERROR = "error"

    @property
    def is_failure(self) -> bool:
        """True if it counts against `failure.max_failures`."""
        return self is not Cause.PREEMPTED

    @property
    def weight(self) -> int:
        """Of two causes at once, the heavier one is the cause of the other."""
        return -list(Cause).index(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """One end of a worker group: the cause, the first rank that shows it, and what was said of it."""

    cause: Cause
    rank: int
    message: str


@dataclass(frozen=True, slots=True)
class Death:
    """What Ray's actor table says of a worker that is gone."""

    rank: int
    message: str


def classify(errors: Mapping[int, BaseException], deaths: Sequence[Death], *, drained: bool) -> Failure | None:
    """The cause of a group's end, or None while only its echoes are known: connections that broke.

    Args:
        errors: Rank to what Ray said of it when it noticed.
        deaths: Workers that died by themselves.
        drained: Whether the loss of one of the group's nodes had been announced.
    """
    found = [Failure(_cause_of_death(death.message, drained), death.rank, death.message) for death in deaths]
    for rank, error in errors.items():
        error = _unwrapped(error)
        said = str(error).strip() or type(error).__name__
        if isinstance(error, ActorUnavailableError):
            continue  # it cannot be reached just now: Ray's tables will say whether it or its node is gone
        if isinstance(error, RayActorError):
            drained = drained or bool(getattr(error, "preempted", False))
            found.append(Failure(_cause_of_death(said, drained), rank, said.splitlines()[0]))
        elif not any(word in said for word in _ECHOES):
            found.append(Failure(Cause.ERROR, rank, said.splitlines()[-1]))
    return max(found, key=lambda failure: (failure.cause.weight, -failure.rank), default=None)


def _unwrapped(error: BaseException) -> BaseException:
    """What Ray Train wrapped, in an error of a task or of a health check."""
    for name in ("cause", "health_check_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrapped(inner)
    return error


def _cause_of_death(message: str, drained: bool) -> Cause:
    if drained:
        return Cause.PREEMPTED
    return Cause.NODE_LOST if "node has died" in message or "node died" in message else Cause.WORKER_DIED


def find_deaths(workers: Sequence[Mapping[str, Any]]) -> list[Death]:
    """Which of an attempt's workers died by themselves, by Ray's node and actor tables.

    The nodes come first: Ray Train often ends the workers of a lost node (`ray.kill`) before Ray knows that it is lost.

    Args:
        workers: What the attempt's claim says of its ranks: rank, node, pid.
    """
    lost = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    table = {(row["Address"]["NodeID"], row["Pid"]): row for row in ray._private.state.actors().values()}
    deaths = []
    for worker in workers:
        if worker["node"] in lost:
            deaths.append(Death(worker["rank"], f"its node has died ({worker.get('host', worker['node'])})"))
            continue
        row = table.get((worker["node"], worker["pid"]), {})
        cause = str(row.get("DeathCause", ""))
        if row.get("State") == "DEAD" and not any(word in cause for word in _INTENDED):
            said = re.search(r'error_message: "(.*?)(?:\.|\\n|")', cause)
            deaths.append(Death(worker["rank"], said[1] if said else "the worker died"))
    return deaths


class Recorder(ray.train.UserCallback):
    """Writes every end of a worker group into the launch's journal, and ends the run when there were too many.

    Lives in Ray Train's controller.

    Args:
        storage_url: Where the run lies.
        run: Name of the run.
        launch: The launch.
        max_failures: Failures that the run survives; -1 for any number.
        max_preemptions: The same for preemptions.
    """

    def __init__(self, storage_url: str, run: str, launch: str, max_failures: int, max_preemptions: int) -> None:
        self._place = (storage_url, run, launch)
        self._limits = {True: max_failures, False: max_preemptions}
        self._counts = {True: 0, False: 0}
        self._journal: Journal | None = None
        self._last_attempt: AttemptId | None = None
        self._last_said: frozenset[tuple[int, str]] = frozenset()

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Called by Ray, perhaps several times for one end. Returns at once: no restart waits for its cause."""
        url, run, launch = self._place
        storage = open_storage(url)
        self._journal = self._journal or Journal(storage, launch_dir(run, launch), 0, flush_s=0)
        attempt: AttemptId | None = None
        workers: list[dict[str, Any]] = []
        with suppress(StorageError):
            for newest in list_attempts(storage, run)[-1:]:
                claim = read_claim(storage, run, newest)
                if claim.get("launch") == launch:
                    attempt, workers = newest, claim.get("workers", [])
        said = frozenset((rank, str(error)) for rank, error in worker_exceptions.items())
        if attempt == self._last_attempt and said & self._last_said:
            return  # the same end, told again; a group that fails before its claim has words of its own
        self._last_attempt, self._last_said = attempt, said
        arguments = (self._journal, dict(worker_exceptions), workers, str(attempt or "unclaimed"), time.time())
        threading.Thread(target=self._find_cause, args=arguments).start()

    def _find_cause(
        self,
        journal: Journal,
        errors: dict[int, BaseException],
        workers: list[dict[str, Any]],
        attempt: str,
        noticed_at: float,
    ) -> None:
        hub = find_hub(self._place[2])
        deadline = time.monotonic() + (SEARCH_S if workers else 0)
        while True:
            drained = bool(hub is not None and ask(hub.was_drained.remote(attempt), False))
            deaths: list[Death] = []
            with suppress(RayError, RuntimeError, OSError):  # Ray's tables do not answer: what the ranks said must do
                deaths = find_deaths(workers)
            failure = classify(errors, deaths, drained=drained)
            if failure is not None or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        rank = min(errors)
        failure = failure or Failure(Cause.ERROR, rank, (str(errors[rank]).strip().splitlines() or ["no word"])[-1])
        self._count(failure, hub)
        event = {"cause": failure.cause.value, "rank": failure.rank, "message": failure.message}
        if hub is not None:
            counted = failure.cause.is_failure
            numbers = {"number": self._counts[counted], "limit": self._limits[counted]}
            ask(hub.exchange.remote([{"event": "failure", **event, **numbers}]))
        with suppress(StorageError):  # the count stands; the story has a gap
            journal.event("failure", attempt=attempt, noticed_at=round(noticed_at, 3), **event)

    def _count(self, failure: Failure, hub: Any) -> None:
        counted = failure.cause.is_failure
        self._counts[counted] += 1
        limit = self._limits[counted]
        if self._counts[counted] > limit >= 0 and hub is not None:
            what = "failures" if counted else "preemptions"
            last = f"{failure.cause.value}, rank {failure.rank}: {failure.message}"
            error = RunFailed(
                f"more than {limit} {what}; the last one: {last}",
                hint=f"mend the cause, or raise failure.max_{what}; the same command then goes on where it was",
            )
            ask(hub.fail.remote(failure.rank, error))
