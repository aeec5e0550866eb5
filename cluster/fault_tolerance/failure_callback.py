"""Failures of worker groups, recorded in the launch's journal and checked against the restart limits.

It runs in Ray Train's controller and must never delay a restart: the cause is searched in a thread of its own.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.escaping import escaped_lines
from outlast.checkpointing.format.layout import AttemptId, launch_dir
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.run_store.attempt_history import read_attempt_history
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.events import Event, GroupFailureEvent, NoRoomEvent, NoteEvent
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.retry import wait_until_responsive
from outlast.cluster.fault_tolerance.coordinator import CoordinatorHandle, find_coordinator
from outlast.cluster.fault_tolerance.failure_cause import (
    OWN_RAY,
    Cause,
    Death,
    Failure,
    RankError,
    RunFailed,
    classify,
    find_deaths,
    unwrap_error,
)
from outlast.cluster.fault_tolerance.hang_detection import Hang
from outlast.cluster.fault_tolerance.restart_policy import GiveUp, RestartLimits, count_failures, decide_give_up
from outlast.cluster.ray_internals import WorkerGroupCallback, WorkerGroupStartupTimeoutError

#: Bytes kept from the end of a log.
_LOG_BYTES = 20_000
SEARCH_S = 20.0
#: Ray's tables may show a death this much later than its errors do, and only they lead to the process and its host.
_TABLES_S = 2.0
#: Global, because the recorder is pickled to the controller, and a lock cannot be.
_JOURNAL_LOCK = threading.Lock()


def gave_up(run: str, given_up: GiveUp) -> RunFailed:
    """Return the error of a run that the restart policy gave up, in the driver and in the controller."""
    return RunFailed(
        f"run {run} is given up: {given_up.diagnosis}",
        hint="fix the cause and run the same command again; if that changes no setting, add a note to let the run "
        "continue: -s failure.note='what was fixed'",
    )


def own_log(workers: Sequence[Mapping[str, Any]], rank: int) -> str:
    """Return the end of a rank's log if it is in a folder that is removed with the driver; else nothing."""
    path = next((str(worker.get("log", "")) for worker in workers if worker["rank"] == rank), "")
    if OWN_RAY not in path:
        return ""
    with suppress(OSError), open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - _LOG_BYTES))
        if text := log.read().decode(errors="replace").strip():
            return f"rank {rank}, the end of its log\n{text}\n"
    return ""


class FailureRecorder(WorkerGroupCallback):
    """Records every end of a worker group, and ends the run when a limit is reached.

    `settings` is the digest of the run's settings, see `settings_digest`.
    """

    def __init__(self, storage_url: str, run: str, launch: str, limits: RestartLimits, settings: str) -> None:
        self._location = (storage_url, run, launch)
        self._limits, self._settings = limits, settings
        self._journal: Journal | None = None
        self._is_waiting = False
        self._last_attempt: AttemptId | None = None
        self._past: AttemptId | None = None
        self._last_errors: frozenset[tuple[int, str]] = frozenset()
        self._errors: dict[int, BaseException] = {}
        self._reasons_of_spares: set[str] = set()

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Record once that the cluster has no room for the group, however often Ray tries."""
        began_at = time.time()
        try:
            yield
        except WorkerGroupStartupTimeoutError:
            if not self._is_waiting:
                self._is_waiting = True
                with suppress(StorageError):  # the wait then counts as part of the restart
                    self._write(NoRoomEvent(since=round(began_at, 3)))
                find_coordinator(self._location[2]).exchange([NoRoomEvent().to_json()])
            raise
        self._is_waiting = False

    def _write(self, event: Event) -> None:
        url, run, launch = self._location
        store = RunStore(open_storage(url), run)
        with _JOURNAL_LOCK:  # two journals would overwrite each other's files
            self._journal = self._journal or Journal(store.storage, store.launch_dir(launch), 0, flush_s=0)
        self._journal.write(event)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Treat errors from now on as another end, even with equal messages, and not as an earlier attempt's."""
        self._past, self._last_errors = self._last_attempt, frozenset()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Start the search for the cause. Ray calls it several times for one end; it returns at once."""
        worker_exceptions: Mapping[int, BaseException] = worker_group_status.errors
        if not worker_exceptions:
            return
        url, run, launch = self._location
        store = RunStore(open_storage(url), run)
        attempt: AttemptId | None = None
        workers: list[dict[str, Any]] = []
        with suppress(StorageError):
            for newest in list_attempts(store)[-1:]:
                claim = read_claim(store, newest)
                if claim.get("launch") == launch and newest != self._past:
                    attempt, workers = newest, claim.get("workers", [])
        reported = frozenset((rank, str(error)) for rank, error in worker_exceptions.items())
        if reported & self._last_errors:  # the same end again, perhaps with the cause that the search waits for
            self._errors.update(worker_exceptions)
            return
        self._last_attempt = attempt or self._last_attempt
        self._last_errors, self._errors = reported, dict(worker_exceptions)
        arguments = (self._errors, workers, str(attempt or "unclaimed"), time.time())
        threading.Thread(target=self._find_cause, args=arguments).start()

    def worker_lost(self, process: Any, error: BaseException) -> None:
        """Start the search for the cause of the loss of one worker, while the others go on in memory.

        `process` is Ray Train's description of the worker: node, process, host.
        """
        threading.Thread(target=self._explain_loss, args=(process, error, time.time())).start()

    def _explain_loss(self, process: Any, error: BaseException, noticed_at: float) -> None:
        store = RunStore(open_storage(self._location[0]), self._location[1])
        with suppress(StorageError):
            for attempt in reversed(list_attempts(store)):
                claim = read_claim(store, attempt)
                if claim.get("launch") != self._location[2]:
                    break
                for worker in claim.get("workers", []):
                    if (worker["node"], worker["pid"]) == (process.node_id, process.pid):
                        self._find_cause({worker["rank"]: error}, [worker], str(attempt), noticed_at, in_place=True)
                        return
        reason = (str(unwrap_error(error)).strip().splitlines() or [type(error).__name__])[-1]
        if reason in self._reasons_of_spares:
            return
        self._reasons_of_spares.add(reason)
        text = f"a worker that trained no rank was lost: process {process.pid} on {process.hostname}: {redact(reason)}"
        find_coordinator(self._location[2]).exchange([NoteEvent(text=text).to_json()])

    def _find_cause(
        self,
        errors: dict[int, BaseException],
        workers: list[dict[str, Any]],
        attempt: str,
        noticed_at: float,
        *,
        in_place: bool = False,
    ) -> None:
        coordinator = find_coordinator(self._location[2])
        hung: Hang | None = coordinator.take_hang()
        hang = Failure(Cause.HANG, hung.ranks[0], hung.message) if hung else None
        began = time.monotonic()
        deadline = began + (SEARCH_S if workers else 0)
        # In place the loss is noticed before Ray knows of it, and nobody waits for the cause.
        tables_s = SEARCH_S if in_place else _TABLES_S
        while True:
            drained = bool(coordinator.was_drained(attempt))
            deaths: list[Death] = []
            with suppress(RayError, RuntimeError, OSError):  # Ray's tables do not answer: the ranks' errors must do
                deaths = find_deaths(workers)
            known = [item for item in (classify(errors.copy(), deaths, drained=drained), hang) if item]
            failure = max(known, key=lambda item: item.cause.weight, default=None)
            is_traced = failure is not None and (failure.cause is not Cause.WORKER_DIED or deaths or not workers)
            if is_traced or time.monotonic() > (deadline if failure is None else began + tables_s):
                break
            time.sleep(0.2)
        rank = min(errors)
        failure = failure or Failure(
            Cause.ERROR, rank, (str(errors[rank]).strip().splitlines() or ["no error message"])[-1]
        )
        log, others = self._write_log(attempt, errors, workers, failure.rank)
        event = GroupFailureEvent(
            attempt=attempt,
            noticed_at=round(noticed_at, 3),
            cause=failure.cause.value,
            rank=failure.rank,
            message=failure.description,
            where=failure.where(workers, log, others),
            raised=failure.message if failure.cause is Cause.ERROR and "after step" in failure.message else None,
            reached=coordinator.reached(attempt),
            in_place=in_place or None,
        )
        number, limit, ends = -1, -1, False
        with suppress(StorageError):  # the timeline has a gap, and the next failure is checked again
            wait_until_responsive(open_storage(self._location[0]), self._location[1])
            self._write(event)
            if not in_place:
                number, limit, ends = self._check_limits(failure, coordinator)
        live = replace(event, number=number, limit=limit, ends=ends, excerpt=failure.excerpt)
        coordinator.exchange([live.to_json()])

    def _write_log(
        self, attempt: str, errors: Mapping[int, BaseException], workers: Sequence[Mapping[str, Any]], first: int
    ) -> tuple[str, str]:
        """Write the ranks' tracebacks, and the end of the first rank's own log if it has none, beside the journal.

        Returns the path; as the second value if the file holds nothing of the first rank; empty if there is none.
        """
        url, run, launch = self._location
        unwrapped = {rank: unwrap_error(error) for rank, error in sorted(errors.items())}
        tracebacks = {rank: error.traceback_text for rank, error in unwrapped.items() if isinstance(error, RankError)}
        own = "" if first in tracebacks else own_log(workers, first)
        text = "\n".join([*([own] if own else []), *(f"rank {rank}\n{text}\n" for rank, text in tracebacks.items())])
        path = f"{launch_dir(run, launch)}/failure-{attempt}.log"
        with suppress(StorageError):
            if text:
                open_storage(url).put(path, [escaped_lines(redact(text)).encode()])
                return (f"{url}/{path}", "") if own or first in tracebacks else ("", f"{url}/{path}")
        return "", ""

    def _check_limits(self, failure: Failure, coordinator: CoordinatorHandle) -> tuple[int, int, bool]:
        """End the run if a limit is reached. Returns the number of such failures, the limit, whether the run ends."""
        url, run, launch = self._location
        attempts = read_attempt_history(RunStore(open_storage(url), run), live=launch)
        given_up = decide_give_up(attempts, self._limits, self._settings)
        if given_up is not None:
            coordinator.give_up(gave_up(run, given_up))
        is_failure = failure.cause.is_failure
        alike = [item for item in count_failures(attempts, self._settings) if item.end.outcome.is_failure == is_failure]
        limit = self._limits.max_failures if is_failure else self._limits.max_preemptions
        return len(alike), limit, given_up is not None
