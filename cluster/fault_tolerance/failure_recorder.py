"""Failures of worker groups, recorded in the journal."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import AttemptId, launch_dir
from outlast.checkpointing.run_store.attempt_history import read_attempt_history
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.events import Event, FailureEvent, NoRoomEvent
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.retry import wait_for
from outlast.cluster.fault_tolerance.coordinator import ask, find_coordinator
from outlast.cluster.fault_tolerance.failure_cause import (
    OWN_RAY,
    Cause,
    Death,
    Failure,
    RankError,
    RunFailed,
    _heavier,
    _unwrapped,
    classify,
    find_deaths,
)
from outlast.cluster.fault_tolerance.hang_detection import Hang
from outlast.cluster.fault_tolerance.restart_policy import GiveUp, RestartLimits, count_failures, decide_give_up
from outlast.cluster.ray_internals import WorkerGroupCallback, WorkerGroupStartupTimeoutError

#: How many bytes of a log are kept from there.
_NUM_LOGGED = 20_000


#: Of the module, because what reports failures travels to the controller, and a lock does not.
_MAKING_JOURNAL = threading.Lock()


def gave_up(run: str, given_up: GiveUp) -> RunFailed:
    """The one message at the end of a run that the rule ends, whoever applies it (see `history.py`)."""
    return RunFailed(
        f"run {run} is given up: {given_up.diagnosis}",
        hint="mend the cause and run the same command again; if the settings have not changed by that, say so, which "
        "lets it go on: -s failure.note='what was mended'",
    )


SEARCH_S = 20.0


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


class FailureRecorder(WorkerGroupCallback):
    """Writes every end of a worker group into the launch's journal, and ends the run when there were too many.

    Lives in Ray Train's controller.

    Args:
        storage_url: Where the run lies.
        run: Name of the run.
        launch: The launch.
        limits: How much the run survives.
        settings: Which settings it has, see `history.settings_mark`.
    """

    def __init__(self, storage_url: str, run: str, launch: str, limits: RestartLimits, settings: str) -> None:
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
                    self._write(NoRoomEvent(since=round(began_at, 3)))
                if (hub := find_coordinator(self._place[2])) is not None:
                    ask(hub.exchange.remote([NoRoomEvent().to_json()]))
            raise
        self._is_waiting = False

    def _write(self, event: Event) -> None:
        url, run, launch = self._place
        store = RunStore(open_storage(url), run)
        with _MAKING_JOURNAL:  # two of them would write over each other's files
            self._journal = self._journal or Journal(store.storage, store.launch_dir(launch), 0, flush_s=0)
        self._journal.write(event)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """What is told from now on is another end, even in the same words, and no longer that of an earlier attempt."""
        self._past, self._last_said = self._last_attempt, frozenset()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called by Ray, perhaps several times for one end. Returns at once: no restart waits for its cause."""
        worker_exceptions: Mapping[int, BaseException] = worker_group_status.errors
        if not worker_exceptions:
            return
        url, run, launch = self._place
        store = RunStore(open_storage(url), run)
        attempt: AttemptId | None = None
        workers: list[dict[str, Any]] = []
        with suppress(StorageError):
            for newest in list_attempts(store)[-1:]:
                claim = read_claim(store, newest)
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
        hub = find_coordinator(self._place[2])
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
        event = FailureEvent(
            attempt=attempt,
            noticed_at=round(noticed_at, 3),
            cause=failure.cause.value,
            rank=failure.rank,
            message=failure.description,
            where=failure.where(workers, log),
            raised=failure.message if failure.cause is Cause.ERROR and "after step" in failure.message else None,
            reached=None if hub is None else ask(hub.reached.remote(attempt)),
        )
        number, limit, ends = -1, -1, False
        with suppress(StorageError):  # the story has a gap, and the next failure is judged again
            wait_for(open_storage(self._place[0]), self._place[1])
            self._write(event)
            number, limit, ends = self._judge(failure, hub)
        if hub is not None:
            live = replace(event, number=number, limit=limit, ends=ends, excerpt=failure.excerpt)
            ask(hub.exchange.remote([live.to_json()]))

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
        tries = read_attempt_history(RunStore(open_storage(url), run), live=launch)
        given_up = decide_give_up(tries, self._limits, self._settings)
        if given_up is not None and hub is not None:
            ask(hub.give_up.remote(gave_up(run, given_up)))
        is_failure = failure.cause.is_failure
        alike = [item for item in count_failures(tries, self._settings) if item.end.outcome.is_failure == is_failure]
        limit = self._limits.max_failures if is_failure else self._limits.max_preemptions
        return len(alike), limit, given_up is not None
