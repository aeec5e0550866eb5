"""Supervision of runs on a Ray cluster: submits a run again when its job, or the whole cluster, has died.

A supervisor must keep no state of its own: all of it is in the run's storage, so that it can be killed and restarted at
any time. It attaches to a live job, and gives up by the rule in `restart_policy.py`. Two supervisors of one run are
harmless: the newest launch wins. `decide`, which is pure, decides what to do next.
"""

import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import OutlastError, PreflightError, StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.attempt_history import read_attempt_history, settings_digest
from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.events import GroupFailureEvent
from outlast.checkpointing.run_store.journal import Journal, last_event_at
from outlast.checkpointing.run_store.liveness import find_active_launch
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.query import find_model
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.signals import StopFlag, handle_signals
from outlast.cluster.fault_tolerance.failure_callback import gave_up
from outlast.cluster.fault_tolerance.restart_policy import GiveUp, count_failures, decide_give_up
from outlast.cluster.jobs import ray_jobs as jobs
from outlast.cluster.jobs.job_server import JobServer, JobServerUnavailable
from outlast.cluster.jobs.ray_jobs import SubmittedJob
from outlast.cluster.monitoring.timeline import TimelineReader
from outlast.cluster.monitoring.timeline_records import LaunchTimeline
from outlast.cluster.output import print_line, print_log

POLL_S = 2.0
SILENCE_TIMEOUT_S = 180.0
PAUSE_S = 2.0
MAX_PAUSE_S = 300.0
#: Exit code of a launch that was stopped, or whose run another launch took over.
_RESUMABLE_EXIT_CODE = 75
_STALLED = "stalled"
_LOG_TAIL = 5
_SIGNAL_POLL_S = 0.2
_END_S = 2.0


class NextAction(Enum):
    """Action after the end of a job."""

    SUBMIT = "submit"
    END = "end"


def decide(
    ended: SubmittedJob, given_up: GiveUp | None, *, by_us: bool, has_worked: bool, has_active_launch: bool
) -> NextAction:
    """Decide what follows the end of a job.

    Args:
        ended: The job.
        given_up: The restart policy's reason to give up, or None.
        by_us: The supervisor itself stopped it.
        has_worked: Some attempt of the run has started once, so its settings are usable.
        has_active_launch: Another launch of the run is active, perhaps on another cluster. It keeps the run: two
            supervisors would otherwise take the run from each other in turn.
    """
    if by_us:
        return NextAction.END if given_up else NextAction.SUBMIT
    if has_active_launch:
        return NextAction.END
    if ended.status == JobStatus.STOPPED.value or ended.exit_code in (0, 2, 5):
        return NextAction.END  # stopped, done, or only other settings or files can fix it
    if ended.exit_code == 3:
        return NextAction.SUBMIT if has_worked else NextAction.END  # a cluster that lost its nodes may get new ones
    return NextAction.END if given_up else NextAction.SUBMIT


def pause_s(number: int, chance: float) -> float:
    """Return the seconds before the next submission: exponential backoff by the number of failed ones, from 1, with
    jitter by `chance`, uniform in [0, 1)."""
    return min(MAX_PAUSE_S, PAUSE_S * 2.0 ** min(number - 1, 30)) * (0.5 + chance / 2)


@dataclass(slots=True)
class StallDetector:
    """Detects that a job in state RUNNING makes no progress: its heartbeat or its events stop changing."""

    stall_s: float  #: seconds without any event of the workers after which it is stalled
    now: Callable[[], float] = time.monotonic  #: a clock of this machine only, so that no other clock need be right
    _last_changes: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def finding(self, beat: Any, event: Any) -> str | None:
        """Return why the job is stalled, or None.

        Args:
            beat: Changes while the driver is alive.
            event: Changes with each event of the workers; None until one has claimed the run for this launch, as while
                data is prepared.
        """
        silent_s, idle_s = self._since("beat", (beat, event)), self._since("event", event)
        if silent_s >= SILENCE_TIMEOUT_S:
            return f"its driver and its workers have been silent for {silent_s:.0f} s"
        if event is not None and idle_s >= self.stall_s:
            return f"no step for {idle_s:.0f} s (failure.stall_s: {self.stall_s:g})"
        return None

    def _since(self, key: str, value: Any) -> float:
        """Return the seconds since the last change of the value of `key`."""
        before, at = self._last_changes.get(key, (None, 0.0))
        if key not in self._last_changes or before != value:
            self._last_changes[key] = (value, at := self.now())
        return self.now() - at


@dataclass(slots=True)
class Supervisor:
    """Keeps one run running until it is done, stopped, or given up."""

    config: RunConfig
    declared: Mapping[str, Any]  #: the settings as written
    address: str | None  #: the job server; it need not answer yet
    code: Path | None = None  #: a directory of the user's Python files
    ship: bool = True  #: send this outlast along
    ending: threading.Event = field(default_factory=threading.Event)  #: ends the supervisor; the job continues
    _ignored_jobs: set[str] = field(default_factory=set)
    _timeline_reader: TimelineReader | None = None
    _beats: dict[str, Any] = field(default_factory=dict)
    _active_id: str = ""
    _num_without_launch: int = 0

    @property
    def store(self) -> RunStore:
        return self.config.store

    def run(self) -> int:
        """Supervise the run. Return its exit code, or 130 if `ending` was set.

        Raises:
            RunFailed: The run is given up.
            OutlastError: No cluster and no retry can help: the job server refuses what is sent, or who sends it.
        """
        num_unreachable, last_reason = 0, ""
        while not self.ending.is_set():
            try:
                ended = self._one_job()
                num_unreachable, last_reason = 0, ""
            except (JobServerUnavailable, StorageError, RuntimeError, OSError) as error:
                num_unreachable += 1
                reason = error.message if isinstance(error, OutlastError) else first_line(error)
                if isinstance(error, OutlastError) and error.hint and reason != last_reason:
                    self.say(f"→ {error.hint}")
                last_reason = reason
                self._wait(num_unreachable, reason)
                continue
            if ended is not None:
                return ended
        return 130

    def _one_job(self) -> int | None:
        """Attach to the run's job, or submit one, and follow it. Return the exit code if the run has ended."""
        if self._is_done():
            self.say("done")
            return 0
        launches = list_launches(self.store)
        client = jobs.connect(self.address)
        submitted = jobs.jobs_of(client, self.config.name)
        is_live = any(job.is_live and job.id not in self._ignored_jobs for job in submitted)
        if not is_live and (given_up := self._reason_to_give_up()) is not None:
            raise gave_up(self.config.name, given_up)
        job, is_new = jobs.submit(
            client, self.config, self.declared, code=self.code, ship=self.ship, ignoring=self._ignored_jobs
        )
        self.say(f"{'submitted' if is_new else 'attached to'} {job.id}")
        ended, by_us = self._follow(client, job)
        if ended is None:
            return 130
        if self._is_done():
            self.say("done")
            return 0
        given_up = self._reason_to_give_up()
        has_worked = bool(list_attempts(self.store))
        may_be_taken = ended.exit_code == _RESUMABLE_EXIT_CODE and not by_us
        active_launch = find_active_launch(self.store) if may_be_taken else None
        has_active = active_launch is not None
        action = decide(ended, given_up, by_us=by_us, has_worked=has_worked, has_active_launch=has_active)
        self.say(f"{ended.id} ended: {ended.status.lower()}, exit code {ended.exit_code}{_last_message_line(ended)}")
        if action is NextAction.SUBMIT:
            num_failed = self._num_failed(launches if is_new else [], ended)
            reason = f"no worker started: {_last_log_line(client, ended)}" if self._num_without_launch else ""
            self._wait(num_failed, reason)
            return None
        if active_launch is not None:
            self.say(f"launch {active_launch} is active and keeps the run")
            return ended.exit_code
        if given_up is not None:
            raise gave_up(self.config.name, given_up)
        if ended.exit_code not in (0, 75):
            print_log("".join(client.get_job_logs(ended.id).splitlines(keepends=True)[-_LOG_TAIL:]), to_stderr=True)
        return ended.exit_code

    def _follow(self, client: JobServer, job: SubmittedJob) -> tuple[SubmittedJob | None, bool]:
        """Wait until the job ends, and stop it if it makes no progress. Return None if `ending` was set."""
        detector = StallDetector(self.config.failure.stall_s)
        finding, deadline = None, 0.0
        while not self.ending.wait(POLL_S):
            job = jobs.find_job(client, job.id)
            if not job.is_live:
                return job, finding is not None
            if finding is not None:
                if time.monotonic() > deadline:  # the stop has no effect: the next launch takes the run over
                    self._ignored_jobs.add(job.id)
                    return job, True
            elif job.status == JobStatus.RUNNING.value and (finding := detector.finding(*self._progress())):
                self.say(f"{job.id} is {job.status.lower()}, but {finding}: stopping it")
                self._note_stall(finding)  # raises while the storage refuses writes: then silence proves nothing
                client.stop_job(job.id)
                deadline = time.monotonic() + jobs.stop_wait_s(self.config) + SILENCE_TIMEOUT_S
        return None, False

    def _progress(self) -> tuple[Any, Any]:
        """Return two values: one changes with the active launch's heartbeat, one with its workers' events."""
        launch, attempt = self._active()
        if launch is None:
            return None, None
        store = self.store
        event = (str(attempt), last_event_at(store.storage, store.attempt_dir(attempt))) if attempt else None
        return (launch.id, launch.alive.get("beat")), event

    def _active(self) -> tuple[LaunchTimeline | None, AttemptId | None]:
        """Return the active launch (the one with the latest heartbeat), and its attempt if it owns the run."""
        if self._timeline_reader is None:
            self._timeline_reader = TimelineReader(self.store, journals=False)
        timeline = self._timeline_reader.update()
        launches = {launch.id: launch for launch in timeline.open_launches}
        beats = {name: launch.alive.get("beat") for name, launch in launches.items()}
        beating = [name for name, beat in beats.items() if self._beats.get(name, beat) != beat]
        if beating or self._active_id not in launches:
            self._active_id = next(reversed(beating or list(launches)), "")
        self._beats = beats
        newest = max(timeline.attempts, default=None)
        owns_run = newest is not None and timeline.attempts[newest].launch == self._active_id
        return launches.get(self._active_id), newest if owns_run else None

    def _note_stall(self, finding: str) -> None:
        """Record the failure in the launch's journal before the stop, so that the restart policy counts it in any case.

        Written as rank 1, because rank 0's journal is the launch's own.
        """
        launch, attempt = self._active()
        if launch is None:
            return  # the job has no launch yet
        journal = Journal(self.store.storage, self.store.launch_dir(launch.id), 1, flush_s=0)
        journal.write(GroupFailureEvent(attempt=str(attempt or "unclaimed"), cause=_STALLED, rank=0, message=finding))

    def _reason_to_give_up(self) -> GiveUp | None:
        records = read_attempt_history(self.store)
        return decide_give_up(records, self.config.failure.limits, settings_digest(self.declared))

    def _num_failed(self, before: Sequence[str], ended: SubmittedJob) -> int:
        """Return the number of failed submissions since the last progress, at least 1.

        The storage has no record of a job that ended before its launch, and a launch that found the cluster too small
        is no attempt, so those are counted here. `before` are the run's launches before the job; none for a job that
        was already running.
        """
        had_no_launch = list_launches(self.store) == list(before) or ended.exit_code == PreflightError.exit_code
        self._num_without_launch = self._num_without_launch + 1 if had_no_launch else 0
        failures = count_failures(read_attempt_history(self.store), settings_digest(self.declared))
        return max(1, len(failures) + self._num_without_launch)

    def _is_done(self) -> bool:
        model = find_model(self.store)
        return model is not None and not model.faults

    def _wait(self, num_failed: int, reason: str) -> None:
        seconds = pause_s(num_failed, random.random())
        self.say(f"{reason + '; ' if reason else ''}trying again in {seconds:.0f} s")
        self.ending.wait(seconds)

    def say(self, text: str) -> None:
        """Print a line with time and run to stderr."""
        print_line(f"{time.strftime('%H:%M:%S')} {self.config.name}: {text}", to_stderr=True)


def supervise(supervisors: Sequence[Supervisor]) -> int:
    """Supervise several runs, each in its own thread. Return the first exit code that is not 0.

    Raises:
        OutlastError: That of the first run given up, once all have ended.
    """
    stopping = StopFlag()
    with handle_signals(lambda *_: stopping.set()):  # a handler that raises could be interrupted by the next signal
        futures = [_start(item) for item in supervisors]
        while wait(futures, timeout=_SIGNAL_POLL_S).not_done and not stopping.is_set():
            pass
        if stopping.is_set():
            for item in supervisors:
                item.ending.set()
            wait(futures, timeout=_END_S)  # not for one in a long call: it keeps no state
    if stopping.is_set():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the process ends
        raise KeyboardInterrupt
    return next((code for code in [future.result() for future in futures] if code), 0)


def _start(supervisor: Supervisor) -> Future[int]:
    """Run a supervisor in a thread that does not keep the process alive."""
    future: Future[int] = Future()

    def run() -> None:
        try:
            future.set_result(supervisor.run())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _last_message_line(job: SubmittedJob) -> str:
    lines = [line for line in job.message.splitlines() if line.strip()]
    return f" ({lines[-1].strip()[:200]})" if lines and job.driver_exit_code is None else ""


def _last_log_line(client: JobServer, ended: SubmittedJob) -> str:
    """Return the last line of a job's log, which shows why no worker started; else Ray's message."""
    try:
        text = client.get_job_logs(ended.id).strip() or ended.message.strip() or "its log is empty"
    except (PreflightError, RuntimeError, OSError) as error:
        text = f"its log cannot be read: {first_line(error)}"
    return text.splitlines()[-1].strip()[:200]
