"""Why a worker group died, and whether the run may try again.

Ray says what it saw of each rank; a rank that died takes others with it, whose own errors only say that a connection
broke. `classify` finds the cause among them. Ray's own count is not used: it books about half of all preemptions as
failures, and never forgets. Here a preemption is counted apart, whatever Ray calls it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store.attempt_history import is_secondary_error
from outlast.cluster.fault_tolerance.out_of_memory import (
    DEVICE_ADVICE,
    HOST_ADVICE,
    is_device_shortage,
    is_host_shortage,
    was_killed_by_kernel,
)
from outlast.cluster.ray_internals import actors
from outlast.trainers.user_code import describe_error, user_frames


class RunFailed(OutlastError):
    """The workers failed more often than the run may, or in a way that a restart does not mend."""


class RankError(Exception):
    """What a rank ended with that outlast did not raise: plain text, so that the user's classes need not travel.

    Args:
        said: The error in one line, and after which step.
        excerpt: The last lines of its traceback that are the user's code.
        whole: The whole traceback.
    """

    def __init__(self, said: str, excerpt: str, whole: str) -> None:
        super().__init__(said, excerpt, whole)
        self.said, self.excerpt, self.whole = said, excerpt, whole

    def __str__(self) -> str:
        return self.said

    @classmethod
    def of(cls, error: BaseException) -> RankError:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        frames = traceback.format_list(user_frames(error)[-_NUM_FRAMES:])
        return cls(describe_error(error) + notes, "".join(frames).rstrip(), "".join(traceback.format_exception(error)))


#: How the folder of a Ray begins that goes with its driver.
OWN_RAY = "outlast-ray-"
#: How many frames of the user's code are shown.
_NUM_FRAMES = 3


#: How Ray says that it ended an actor itself.
_INTENDED = ("ray.kill", "out of scope", "intended", "ref count")


class Cause(Enum):
    """What took a worker group down, the most telling first."""

    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    OUT_OF_DEVICE_MEMORY = "out of device memory"
    OUT_OF_HOST_MEMORY = "out of host memory"
    HANG = "hang"
    WORKER_DIED = "worker died"
    ERROR = "error"

    @property
    def is_failure(self) -> bool:
        """True if it counts against `failure.max_failures`."""
        return self is not Cause.PREEMPTED

    @property
    def advice(self) -> str:
        """What to change, where the cause itself says so."""
        return {Cause.OUT_OF_DEVICE_MEMORY: DEVICE_ADVICE, Cause.OUT_OF_HOST_MEMORY: HOST_ADVICE}.get(self, "")

    @property
    def weight(self) -> int:
        """Of two causes at once, the heavier one is the cause of the other."""
        return -list(Cause).index(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """One end of a worker group: the cause, the first rank that shows it, what was said of it, and by how many."""

    cause: Cause
    rank: int
    message: str
    num_ranks: int = 1
    excerpt: str = ""

    @property
    def description(self) -> str:
        """In one line: what was said, and what to change."""
        return f"{self.message}; to mend it, {self.cause.advice}" if self.cause.advice else self.message

    def where(self, workers: Sequence[Mapping[str, Any]], log: str = "") -> str:
        """Which ranks said so, and where more is said.

        Args:
            workers: What the attempt's claim says of its ranks.
            log: Where the whole traceback lies; else the first rank's own log is named, where that stays.
        """
        ranks = f"rank {self.rank}" + (f" and {self.num_ranks - 1} more alike" if self.num_ranks > 1 else "")
        mine: Mapping[str, Any] = next((worker for worker in workers if worker["rank"] == self.rank), {})
        own = f"{mine['host']}:{mine['log']}" if mine.get("log") and OWN_RAY not in mine["log"] else ""
        return f"{ranks}, log {log or own}" if log or own else ranks


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
        elif not is_secondary_error(said):
            excerpt = error.excerpt if isinstance(error, RankError) else ""
            found.append(Failure(_cause_of_error(said), rank, said.splitlines()[-1], excerpt=excerpt))
    first = max(found, key=lambda failure: (failure.cause.weight, -failure.rank), default=None)
    if first is None:
        return None
    alike = {failure.rank for failure in found if failure.cause is first.cause}
    return replace(first, num_ranks=len(alike))


def _cause_of_error(said: str) -> Cause:
    if is_device_shortage(said):
        return Cause.OUT_OF_DEVICE_MEMORY
    return Cause.OUT_OF_HOST_MEMORY if is_host_shortage(said) else Cause.ERROR


def _heavier(one: Failure | None, other: Failure | None) -> Failure | None:
    return max((failure for failure in (one, other) if failure), key=lambda found: found.cause.weight, default=None)


def _unwrapped(error: BaseException) -> BaseException:
    """What Ray Train wrapped, in an error of a task, of a health check or of the training function."""
    for name in ("cause", "health_check_failure", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrapped(inner)
    return error


def _cause_of_death(message: str, drained: bool) -> Cause:
    if drained:
        return Cause.PREEMPTED
    if "node has died" in message or "node died" in message:
        return Cause.NODE_LOST
    return Cause.OUT_OF_HOST_MEMORY if is_host_shortage(message) else Cause.WORKER_DIED


def find_deaths(workers: Sequence[Mapping[str, Any]]) -> list[Death]:
    """Which of an attempt's workers died by themselves, by Ray's node and actor tables.

    The nodes come first: Ray Train often ends the workers of a lost node (`ray.kill`) before Ray knows that it is lost.

    Args:
        workers: What the attempt's claim says of its ranks: rank, node, pid.
    """
    lost = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    table = {(row["Address"]["NodeID"], row["Pid"]): row for row in actors().values()}
    deaths = []
    for worker in workers:
        if worker["node"] in lost:
            deaths.append(Death(worker["rank"], f"its node has died ({worker.get('host', worker['node'])})"))
            continue
        row = table.get((worker["node"], worker["pid"]), {})
        cause = str(row.get("DeathCause", ""))
        if row.get("State") == "DEAD" and not any(word in cause for word in _INTENDED):
            said = re.search(r'error_message: "(.*?)(?:\.|\\n|")', cause)
            message = said[1] if said else "the worker died"
            if is_host_shortage(cause):
                message = "Ray ended the worker because the node was running low on memory"
            elif was_killed_by_kernel(worker):
                message = "the kernel killed the worker because the node was running low on memory"
            deaths.append(Death(worker["rank"], message))
    return deaths
