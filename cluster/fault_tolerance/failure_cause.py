"""The cause of a worker group's end.

Ray reports an error for each rank; a rank that died breaks the connections of others, whose own errors only name the
connection. `classify` finds the cause among them. Ray's own count must not be used: it counts about half of all
preemptions as failures, and never resets. Here a preemption is counted apart, whatever Ray calls it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.run_store.attempt_history import is_secondary_error
from outlast.cluster.ray_internals import actors
from outlast.trainers.host_info import death_evidence
from outlast.trainers.user_code import describe_error, user_frames


class RunFailed(OutlastError):
    """The workers failed more often than the run may, or in a way that a restart does not fix."""


class RankError(Exception):
    """A rank's error that outlast did not raise: plain text, so that the driver need not import the user's classes.

    Args:
        summary: The error in one line, and after which step.
        excerpt: The last lines of its traceback that are the user's code.
        traceback_text: The whole traceback.
    """

    def __init__(self, summary: str, excerpt: str, traceback_text: str) -> None:
        self.summary, self.excerpt, self.traceback_text = redact(summary), redact(excerpt), redact(traceback_text)
        super().__init__(self.summary, self.excerpt, self.traceback_text)

    def __str__(self) -> str:
        return self.summary

    @classmethod
    def of(cls, error: BaseException) -> RankError:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        frames = traceback.format_list(user_frames(error)[-_NUM_FRAMES:])
        return cls(describe_error(error) + notes, "".join(frames).rstrip(), "".join(traceback.format_exception(error)))


class AnnouncedLoss(Exception):
    """A worker that was moved away from a node which is about to be lost."""


class SilentWorker(Exception):
    """A worker's process that exists and does not answer: stopped, or cut off from the network."""


#: Name prefix of an embedded Ray's folder, which is removed with its driver.
OWN_RAY = "outlast-ray-"
#: Frames of the user's code that are shown.
_NUM_FRAMES = 3
#: Ray's words for a process that ended without reporting an error. Ray does not know the signal.
_SILENT = ("worker process has died", "died unexpectedly")
_LEFT_NO_MESSAGE = "left no error message: killed by a signal, crashed in native code, or out of memory"
_LEFT_NO_TRACE = (
    "was killed by SIGKILL (kill -9, a memory limit) or ended by os._exit: it left no error message and no crash report"
)
#: Ray's words for an actor that it ended itself.
_INTENDED = ("ray.kill", "out of scope", "intended", "ref count")

DEVICE_ADVICE = (
    "spread the model over the workers with scale.parallel: fsdp, or, in a run that has no checkpoint yet, halve "
    "train.micro_batch, set train.gradient_checkpointing: true or train.precision: bf16"
)
HOST_ADVICE = (
    "run fewer workers on a node (a larger scale.cpus_per_worker), set checkpoint.overlap: false, or take nodes with "
    "more memory"
)

# Ray and the kernel end a process for lack of memory without an exception in it: texts, tables and counters show it. A
# node that does not answer must not block a restart, and counts as unknown.
_DEVICE_WORDS = ("CUDA out of memory", "HIP out of memory", "XPU out of memory", "CUDA_ERROR_OUT_OF_MEMORY")
_HOST_WORDS = ("DefaultCPUAllocator", "MemoryError", "Cannot allocate memory")
_RAY_WORDS = ("oom_context", "Memory on the node", "running low on memory")
_TIMEOUT_S = 5.0


class Cause(Enum):
    """The cause of a worker group's end, the most specific first."""

    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    OUT_OF_DEVICE_MEMORY = "out of device memory"
    OUT_OF_HOST_MEMORY = "out of host memory"
    HANG = "hang"
    WORKER_DIED = "worker died"
    ERROR = "error"

    @property
    def is_failure(self) -> bool:
        """Whether it counts against `failure.max_failures`."""
        return self is not Cause.PREEMPTED

    @property
    def advice(self) -> str:
        """What to change, where the cause determines it."""
        return {Cause.OUT_OF_DEVICE_MEMORY: DEVICE_ADVICE, Cause.OUT_OF_HOST_MEMORY: HOST_ADVICE}.get(self, "")

    @property
    def weight(self) -> int:
        """Rank among simultaneous causes: the heavier one caused the other."""
        return -list(Cause).index(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """One end of a worker group: the cause, the first rank that shows it, its message, and how many ranks share it."""

    cause: Cause
    rank: int
    message: str
    num_ranks: int = 1
    excerpt: str = ""

    @property
    def description(self) -> str:
        """One line: the message, and what to change."""
        return f"{self.message}; to fix it, {self.cause.advice}" if self.cause.advice else self.message

    def where(self, workers: Sequence[Mapping[str, Any]], log: str = "", others: str = "") -> str:
        """Return the ranks of an attempt's claim, and the path of the log.

        `log` is the path of the whole traceback; without one, the first rank's own log is named if it is kept. `others`
        is the path of a file that holds only other ranks' errors.
        """
        ranks = f"rank {self.rank}" + (f" and {self.num_ranks - 1} more" if self.num_ranks > 1 else "")
        mine: Mapping[str, Any] = next((worker for worker in workers if worker["rank"] == self.rank), {})
        own = f"{mine['host']}:{mine['log']}" if mine.get("log") and OWN_RAY not in mine["log"] else ""
        text = f"{ranks}, log {log or own}" if log or own else ranks
        return f"{text}, errors of the other ranks {others}" if others else text


@dataclass(frozen=True, slots=True)
class Death:
    """A dead worker in Ray's actor table."""

    rank: int
    message: str


def classify(errors: Mapping[int, BaseException], deaths: Sequence[Death], *, drained: bool) -> Failure | None:
    """Return the cause of a group's end, or None while only secondary errors (broken connections) are known.

    `errors` are Ray's, by rank; `deaths` are workers that died by themselves; `drained` is whether the loss of one of
    the group's nodes had been announced.
    """
    failures = [Failure(_cause_of_death(death.message, drained), death.rank, death.message) for death in deaths]
    for rank, error in errors.items():
        error = unwrap_error(error)
        message = str(error).strip() or type(error).__name__
        if isinstance(error, ActorUnavailableError):
            continue  # it cannot be reached just now: Ray's tables will show whether it or its node is gone
        if isinstance(error, RayActorError):
            drained = drained or bool(getattr(error, "preempted", False))
            failures.append(Failure(_cause_of_death(message, drained), rank, _plain_death(message)))
        elif isinstance(error, SilentWorker | AnnouncedLoss):
            cause = Cause.HANG if isinstance(error, SilentWorker) else Cause.PREEMPTED
            failures.append(Failure(cause, rank, message))
        elif not is_secondary_error(message):
            excerpt = error.excerpt if isinstance(error, RankError) else ""
            failures.append(Failure(_cause_of_error(message), rank, message.splitlines()[-1], excerpt=excerpt))
    first = max(failures, key=lambda failure: (failure.cause.weight, -failure.rank), default=None)
    if first is None:
        return None
    alike = {failure.rank for failure in failures if failure.cause is first.cause}
    return replace(first, num_ranks=len(alike))


def _cause_of_error(message: str) -> Cause:
    if any(word in message for word in _DEVICE_WORDS):
        return Cause.OUT_OF_DEVICE_MEMORY
    return Cause.OUT_OF_HOST_MEMORY if is_host_shortage(message) else Cause.ERROR


def unwrap_error(error: BaseException) -> BaseException:
    """Return the error that Ray Train wrapped as one of a task, a health check or the training function."""
    for name in ("cause", "health_check_failure", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return unwrap_error(inner)
    return error


def _cause_of_death(message: str, drained: bool) -> Cause:
    if drained:
        return Cause.PREEMPTED
    if "node has died" in message or "node died" in message:
        return Cause.NODE_LOST
    return Cause.OUT_OF_HOST_MEMORY if is_host_shortage(message) else Cause.WORKER_DIED


def find_deaths(workers: Sequence[Mapping[str, Any]]) -> list[Death]:
    """Return those of an attempt's workers that died by themselves, by Ray's node and actor tables.

    Nodes first: Ray Train often ends the workers of a lost node (`ray.kill`) before Ray marks the node as dead.
    `workers` are the ranks in the attempt's claim: rank, node, pid.
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
            match = re.search(r'error_message: "(.*?)(?:\.|\\n|")', cause)
            message = match[1] if match else "the worker died"
            if is_host_shortage(cause):
                message = f"Ray ended {_process(worker)} because the node was running low on memory"
            elif match is None or any(word in message for word in _SILENT):
                message = explain_death(worker, *_evidence(worker))
            deaths.append(Death(worker["rank"], message))
    return deaths


def _process(worker: Mapping[str, Any]) -> str:
    return f"worker process {worker['pid']} on {worker.get('host', worker['node'])}"


def _plain_death(message: str) -> str:
    """Return the first line of Ray's error for a dead actor, or what it means."""
    pid = re.search(r"^\s*pid: (\d+)$", message, re.MULTILINE)
    is_silent = any(word in message for word in _SILENT)
    return f"worker process{f' {pid[1]}' if pid else ''} {_LEFT_NO_MESSAGE}" if is_silent else message.splitlines()[0]


def explain_death(worker: Mapping[str, Any], oom_kills: int | None, crash: str | None) -> str:
    """Return why a worker's process ended without reporting an error, as far as its host shows.

    `worker` is the rank in the attempt's claim: `pid`, `host`, and `oom_kills` at its start. The others are those of
    `death_evidence`; None means unknown.
    """
    before = worker.get("oom_kills")
    is_known = oom_kills is not None and before is not None
    if is_known and int(oom_kills or 0) > int(before or 0):
        return f"the kernel killed {_process(worker)} because the node was running low on memory"
    if crash:
        return f"{_process(worker)} crashed in native code: {crash}"
    if crash is None:
        return f"{_process(worker)} {_LEFT_NO_MESSAGE}"
    memory = (
        "meanwhile the kernel killed nothing there for lack of memory"
        if is_known
        else "whether memory ran out is unknown"
    )
    return f"{_process(worker)} {_LEFT_NO_TRACE}; {memory}"


def is_host_shortage(message: str) -> bool:
    """Return whether an error message, or Ray's reason for ending a worker, means that host memory ran out."""
    return any(word in message for word in (*_HOST_WORDS, *_RAY_WORDS))


def _evidence(worker: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Return `death_evidence` of a dead worker, from its own node."""
    log = str(worker.get("log", ""))
    if worker["node"] == ray.get_runtime_context().get_node_id():
        return death_evidence(log)
    on_node = NodeAffinitySchedulingStrategy(worker["node"], soft=False)
    read = ray.remote(num_cpus=0, scheduling_strategy=on_node, max_retries=0)(death_evidence)
    with suppress(RayError, ValueError):  # the node does not answer: unknown
        found: tuple[int | None, str | None] = ray.get(read.remote(log), timeout=_TIMEOUT_S)
        return found
    return None, None
