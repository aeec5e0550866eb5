"""Why a worker group died, and whether the run may try again.

Ray says what it saw of each rank; a rank that died takes others with it, whose own errors only say that a connection
broke. `classify` finds the cause among them. Ray's own count is not used: it books about half of all preemptions as
failures, and never forgets. Here a preemption is counted apart, whatever Ray calls it.
"""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import ray
import ray._private.state
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from outlast.checkpointing.errors import OutlastError, StorageError
from outlast.checkpointing.format.layout import AttemptId, launch_dir
from outlast.checkpointing.run_store.attempt_history import GivenUp, Limits, counted, is_echo, judge, read_tries
from outlast.checkpointing.run_store.catalog import list_attempts, read_claim
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.storage.base import open_storage, wait_for
from outlast.cluster.fault_tolerance.coordinator import ask, find_hub
from outlast.cluster.fault_tolerance.hang_detection import Hang
from outlast.cluster.fault_tolerance.out_of_memory import (
    DEVICE_ADVICE,
    HOST_ADVICE,
    is_device_shortage,
    is_host_shortage,
    was_killed_by_kernel,
)
from outlast.trainers.blame import own_frames, told


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
        frames = traceback.format_list(own_frames(error)[-_NUM_FRAMES:])
        return cls(told(error) + notes, "".join(frames).rstrip(), "".join(traceback.format_exception(error)))


#: How the folder of a Ray begins that goes with its driver.
OWN_RAY = "outlast-ray-"
#: How many bytes of a log are kept from there.
_NUM_LOGGED = 20_000
#: How many frames of the user's code are shown.
_NUM_FRAMES = 3
#: Of the module, because what reports failures travels to the controller, and a lock does not.
_MAKING_JOURNAL = threading.Lock()


def gave_up(run: str, given_up: GivenUp) -> RunFailed:
    """The one message at the end of a run that the rule ends, whoever applies it (see `history.py`)."""
    return RunFailed(
        f"run {run} is given up: {given_up.diagnosis}",
        hint="mend the cause and run the same command again; if the settings have not changed by that, say so, which "
        "lets it go on: -s failure.note='what was mended'",
    )


#: How Ray says that it ended an actor itself.
_INTENDED = ("ray.kill", "out of scope", "intended", "ref count")
SEARCH_S = 20.0


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
    def told(self) -> str:
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
        elif not is_echo(said):
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
            message = said[1] if said else "the worker died"
            if is_host_shortage(cause):
                message = "Ray ended the worker because the node was running low on memory"
            elif was_killed_by_kernel(worker):
                message = "the kernel killed the worker because the node was running low on memory"
            deaths.append(Death(worker["rank"], message))
    return deaths


def own_log(workers: Sequence[Mapping[str, Any]], rank: int) -> str:
    """The end of a rank's log, with its name, if it lies in a folder that goes with the driver; else nothing."""
    path = next((str(worker.get("log", "")) for worker in workers if worker["rank"] == rank), "")
    if OWN_RAY not in path:
        return ""
    with suppress(OSError), open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - _NUM_LOGGED))
        if text := log.read().decode(errors="replace").strip():
            return f"rank {rank}, the end of its log\n{text}\n"
    return ""


class Recorder(WorkerGroupCallback):
    """Writes every end of a worker group into the launch's journal, and ends the run when there were too many.

    Lives in Ray Train's controller.

    Args:
        storage_url: Where the run lies.
        run: Name of the run.
        launch: The launch.
        limits: How much the run survives.
        settings: Which settings it has, see `history.settings_mark`.
    """

    def __init__(self, storage_url: str, run: str, launch: str, limits: Limits, settings: str) -> None:
        self._place = (storage_url, run, launch)
        self._limits, self._settings = limits, settings
        self._journal: Journal | None = None
        self._is_waiting = False
        self._last_attempt: AttemptId | None = None
        self._past: AttemptId | None = None
        self._last_said: frozenset[tuple[int, str]] = frozenset()
        self._errors: dict[int, BaseException] = {}

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Tells once that the cluster has no room for the group, however often Ray tries."""
        began_at = time.time()
        try:
            yield
        except WorkerGroupStartupTimeoutError:
            if not self._is_waiting:
                self._is_waiting = True
                with suppress(StorageError):  # the wait then counts as part of the restart
                    self._note("no-room", since=round(began_at, 3))
                if (hub := find_hub(self._place[2])) is not None:
                    ask(hub.exchange.remote([{"event": "no-room"}]))
            raise
        self._is_waiting = False

    def _note(self, kind: str, **fields: Any) -> None:
        url, run, launch = self._place
        with _MAKING_JOURNAL:  # two of them would write over each other's files
            self._journal = self._journal or Journal(open_storage(url), launch_dir(run, launch), 0, flush_s=0)
        self._journal.event(kind, **fields)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """What is told from now on is another end, even in the same words, and no longer that of an earlier attempt."""
        self._past, self._last_said = self._last_attempt, frozenset()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called by Ray, perhaps several times for one end. Returns at once: no restart waits for its cause."""
        worker_exceptions: Mapping[int, BaseException] = worker_group_status.errors
        if not worker_exceptions:
            return
        url, run, launch = self._place
        storage = open_storage(url)
        attempt: AttemptId | None = None
        workers: list[dict[str, Any]] = []
        with suppress(StorageError):
            for newest in list_attempts(storage, run)[-1:]:
                claim = read_claim(storage, run, newest)
                if claim.get("launch") == launch and newest != self._past:
                    attempt, workers = newest, claim.get("workers", [])
        said = frozenset((rank, str(error)) for rank, error in worker_exceptions.items())
        if said & self._last_said:  # the same end, told again, perhaps with the cause that the search still waits for
            self._errors.update(worker_exceptions)
            return
        self._last_attempt = attempt or self._last_attempt
        self._last_said, self._errors = said, dict(worker_exceptions)
        arguments = (self._errors, workers, str(attempt or "unclaimed"), time.time())
        threading.Thread(target=self._find_cause, args=arguments).start()

    def _find_cause(
        self, errors: dict[int, BaseException], workers: list[dict[str, Any]], attempt: str, noticed_at: float
    ) -> None:
        hub = find_hub(self._place[2])
        hung: Hang | None = None if hub is None else ask(hub.take_hang.remote())
        hang = Failure(Cause.HANG, hung.ranks[0], hung.message) if hung else None
        deadline = time.monotonic() + (SEARCH_S if workers else 0)
        while True:
            drained = bool(hub is not None and ask(hub.was_drained.remote(attempt), False))
            deaths: list[Death] = []
            with suppress(RayError, RuntimeError, OSError):  # Ray's tables do not answer: what the ranks said must do
                deaths = find_deaths(workers)
            failure = _heavier(classify(errors.copy(), deaths, drained=drained), hang)
            if failure is not None or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        rank = min(errors)
        failure = failure or Failure(Cause.ERROR, rank, (str(errors[rank]).strip().splitlines() or ["no word"])[-1])
        log = self._write_log(attempt, errors, workers, failure.rank)
        event: dict[str, Any] = {"attempt": attempt, "noticed_at": round(noticed_at, 3)}
        event |= {"cause": failure.cause.value, "rank": failure.rank, "message": failure.told}
        event["where"] = failure.where(workers, log)
        if failure.cause is Cause.ERROR and "after step" in failure.message:
            event["raised"] = failure.message
        if hub is not None and (reached := ask(hub.reached.remote(attempt))):
            event["reached"] = {"step": reached[0], "ended_at": reached[1]}
        number, limit, ends = -1, -1, False
        with suppress(StorageError):  # the story has a gap, and the next failure is judged again
            wait_for(open_storage(self._place[0]), self._place[1])
            self._note("failure", **event)
            number, limit, ends = self._judge(failure, hub)
        if hub is not None:
            numbers = {"number": number, "limit": limit, "ends": ends}
            ask(hub.exchange.remote([{"event": "failure", **event, **numbers, "excerpt": failure.excerpt}]))

    def _write_log(
        self, attempt: str, errors: Mapping[int, BaseException], workers: Sequence[Mapping[str, Any]], first: int
    ) -> str:
        """Writes the ranks' tracebacks, or else what the first rank logged itself, into the launch's directory.

        Returns where; nothing where there are none.
        """
        url, run, launch = self._place
        found = {rank: _unwrapped(error) for rank, error in sorted(errors.items())}
        parts = [f"rank {rank}\n{error.whole}\n" for rank, error in found.items() if isinstance(error, RankError)]
        if not parts and (own := own_log(workers, first)):
            parts = [own]
        path = f"{launch_dir(run, launch)}/failure-{attempt}.log"
        with suppress(StorageError):
            if parts:
                open_storage(url).put(path, ["\n".join(parts).encode()])
                return f"{url}/{path}"
        return ""

    def _judge(self, failure: Failure, hub: Any) -> tuple[int, int, bool]:
        """Ends the run if it has had enough. Returns how many failures of this kind count, how many may, and that."""
        url, run, launch = self._place
        tries = read_tries(open_storage(url), run, live=launch)
        given_up = judge(tries, self._limits, self._settings)
        if given_up is not None and hub is not None:
            ask(hub.give_up.remote(gave_up(run, given_up)))
        is_failure = failure.cause.is_failure
        alike = [item for item in counted(tries, self._settings) if item.ending.is_failure == is_failure]
        limit = self._limits.max_failures if is_failure else self._limits.max_preemptions
        return len(alike), limit, given_up is not None
