"""Keeps runs going on a Ray cluster: submits again when a job, or the whole cluster, has died.

All that a supervisor must remember stands in the run's own store, so it can be killed and started again at any time: it
attaches to a job that is live, and obeys the rule of `history.py` for giving up. Two supervisors of one run are no
danger, for the newest launch wins. What to do next is decided by `decide`, which is pure.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from outlast.checkpointing.errors import OutlastError, PreflightError, StorageError, first_line
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.attempt_history import read_attempt_history, settings_digest
from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.journal import Journal, last_event_at
from outlast.checkpointing.run_store.liveness import find_active_launch
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.query import find_model
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.fault_tolerance.failure_recorder import gave_up
from outlast.cluster.fault_tolerance.restart_policy import GiveUp, count_failures, decide_give_up
from outlast.cluster.jobs import ray_jobs as jobs
from outlast.cluster.jobs.ray_jobs import SubmittedJob
from outlast.cluster.monitoring.timeline_reader import TimelineReader
from outlast.cluster.monitoring.timeline_records import LaunchTimeline

POLL_S = 2.0
SILENT_JOB_S = 180.0
PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0
#: What a launch ends with that was stopped, or from which another one has taken the run.
_RESUMABLE = 75
_STALLED = "stalled"
_LOG_TAIL = 5


class NextAction(Enum):
    """What follows the end of a job."""

    SUBMIT = "submit"
    END = "end"


def decide(
    ended: SubmittedJob, given_up: GiveUp | None, *, by_us: bool, has_worked: bool, has_rival: bool
) -> NextAction:
    """What follows the end of a job.

    Args:
        ended: The job.
        given_up: What the rule says.
        by_us: The supervisor itself has stopped it.
        has_worked: Some attempt of the run got to work once, so its settings can be used there.
        has_rival: Another launch of the run is at work, perhaps on another cluster. It is left alone: two supervisors
            would otherwise take the run from each other in turn.
    """
    if by_us:
        return NextAction.END if given_up else NextAction.SUBMIT
    if has_rival:
        return NextAction.END
    if ended.status == JobStatus.STOPPED.value or ended.exit_code in (0, 2, 5):
        return NextAction.END  # somebody stopped it, it is done, or nothing but other settings or files can mend it
    if ended.exit_code == 3:
        return NextAction.SUBMIT if has_worked else NextAction.END  # a cluster that has lost its nodes gets new ones
    return NextAction.END if given_up else NextAction.SUBMIT


def pause_s(number: int, chance: float) -> float:
    """Seconds to wait before the next try: twice as long after each one in vain, and not all at the same time.

    Args:
        number: Tries in vain so far, from 1.
        chance: Uniform in [0, 1).
    """
    return min(LONGEST_PAUSE_S, PAUSE_S * 2.0 ** min(number - 1, 30)) * (0.5 + chance / 2)


@dataclass(slots=True)
class StallDetector:
    """Whether a job that is called RUNNING makes progress: its marks change, or they do not.

    Attributes:
        stall_s: After so many seconds without any event of the workers it is stalled.
        now: A clock; that of this machine alone, so that no other one need be right.
    """

    stall_s: float
    now: Callable[[], float] = time.monotonic
    _marks: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def finding(self, beat: Any, event: Any) -> str | None:
        """What is wrong with the job, or None.

        Args:
            beat: Changes while the driver is alive.
            event: Changes with each event of the workers; None while none has claimed the run for this launch, as when
                data is prepared.
        """
        silent_s, still_s = self._since("beat", (beat, event)), self._since("event", event)
        if silent_s >= SILENT_JOB_S:
            return f"neither its driver nor its workers have shown a sign of life for {silent_s:.0f} s"
        if event is not None and still_s >= self.stall_s:
            return f"no step for {still_s:.0f} s (failure.stall_s: {self.stall_s:g})"
        return None

    def _since(self, key: str, mark: Any) -> float:
        before, at = self._marks.get(key, (None, 0.0))
        if key not in self._marks or before != mark:
            self._marks[key] = (mark, at := self.now())
        return self.now() - at


@dataclass(slots=True)
class Supervisor:
    """Keeps one run going until it is done, stopped, or given up.

    Attributes:
        config: The settings.
        declared: The settings as written.
        address: The job server; it need not answer yet.
        code: A directory of the user's Python files.
        ship: Send this outlast along.
        ending: Set it to leave; the job goes on.
    """

    config: RunConfig
    declared: Mapping[str, Any]
    address: str | None
    code: Path | None = None
    ship: bool = True
    ending: threading.Event = field(default_factory=threading.Event)
    _given_up_on: set[str] = field(default_factory=set)
    _follower: TimelineReader | None = None
    _beats: dict[str, Any] = field(default_factory=dict)
    _beating: str = ""
    _num_unbegun: int = 0

    @property
    def store(self) -> RunStore:
        return self.config.store

    def run(self) -> int:
        """Returns the run's exit code, or 130 when told to leave.

        Raises:
            RunFailed: The run is given up.
        """
        num_silent = 0
        while not self.ending.is_set():
            try:
                ended = self._one_job()
                num_silent = 0
            except (PreflightError, StorageError, RuntimeError, OSError) as error:
                num_silent += 1
                said = error.message if isinstance(error, OutlastError) else first_line(error)
                self._wait(pause_s(num_silent, random.random()), said)
                continue
            if ended is not None:
                return ended
        return 130

    def _one_job(self) -> int | None:
        """Attaches to the run's job, or submits one, and stays with it. Returns the exit code if that was the end."""
        if self._is_done():
            self.say("done")
            return 0
        launches = self._launches()
        client = jobs.connect(self.address)
        live = [
            job for job in jobs.jobs_of(client, self.config.name) if job.is_live and job.id not in self._given_up_on
        ]
        if not live:
            given_up = self._verdict()
            if given_up is not None:
                raise gave_up(self.config.name, given_up)
        job, is_new = jobs.submit(
            client, self.config, self.declared, code=self.code, ship=self.ship, ignoring=self._given_up_on
        )
        self.say(f"{'submitted' if is_new else 'attached to'} {job.id}")
        ended, by_us = self._stay_with(client, job)
        if ended is None:
            return 130
        if self._is_done():
            self.say("done")
            return 0
        given_up = self._verdict()
        has_worked = bool(list_attempts(self.store))
        rival = find_active_launch(self.store) if ended.exit_code == _RESUMABLE and not by_us else None
        end = decide(ended, given_up, by_us=by_us, has_worked=has_worked, has_rival=rival is not None)
        self.say(f"{ended.id} ended: {ended.status.lower()}, exit code {ended.exit_code}{_last_line(ended)}")
        if end is NextAction.SUBMIT:
            number = self._num_in_vain(launches if is_new else [], ended)
            why = f"no worker began: {_last_word(client, ended)}" if self._num_unbegun else ""
            self._wait(pause_s(number, random.random()), why)
            return None
        if rival is not None:
            self.say(f"launch {rival} has the run now; leaving it alone")
            return ended.exit_code
        if given_up is not None:
            raise gave_up(self.config.name, given_up)
        if ended.exit_code not in (0, 75):
            sys.stderr.write("".join(client.get_job_logs(ended.id).splitlines(keepends=True)[-_LOG_TAIL:]))
        return ended.exit_code

    def _stay_with(self, client: JobSubmissionClient, job: SubmittedJob) -> tuple[SubmittedJob | None, bool]:
        """Waits until the job ends, or stops it when it makes no progress. None when told to leave."""
        pulse = StallDetector(self.config.failure.stall_s)
        finding, deadline = None, 0.0
        while not self.ending.wait(POLL_S):
            job = jobs.find(client, job.id)
            if not job.is_live:
                return job, finding is not None
            if finding is not None:
                if time.monotonic() > deadline:  # nobody there to stop it: the next launch takes the run from it
                    self._given_up_on.add(job.id)
                    return job, True
            elif job.status == JobStatus.RUNNING.value and (finding := pulse.finding(*self._marks())):
                self.say(f"{job.id} is called {job.status.lower()}, but {finding}: stopping it")
                self._note_stall(finding)
                client.stop_job(job.id)
                deadline = time.monotonic() + jobs.stop_wait_s(self.config) + SILENT_JOB_S
        return None, False

    def _marks(self) -> tuple[Any, Any]:
        """What changes while the launch at work is alive, and what changes while its workers are at work."""
        launch, attempt = self._at_work()
        if launch is None:
            return None, None
        store = self.store
        event = (str(attempt), last_event_at(store.storage, store.attempt_dir(attempt))) if attempt else None
        return (launch.id, launch.alive.get("beat")), event

    def _at_work(self) -> tuple[LaunchTimeline | None, AttemptId | None]:
        """The launch at work, and its attempt if it has the run. Of several it is the one whose beat went on last."""
        if self._follower is None:
            self._follower = TimelineReader(self.store, journals=False)
        story = self._follower.look()
        launches = {launch.id: launch for launch in story.at_work}
        beats = {name: launch.alive.get("beat") for name, launch in launches.items()}
        going = [name for name, beat in beats.items() if self._beats.get(name, beat) != beat]
        if going or self._beating not in launches:
            self._beating = next(reversed(going or list(launches)), "")
        self._beats = beats
        newest = max(story.attempts, default=None)
        has_run = newest is not None and story.attempts[newest].launch == self._beating
        return launches.get(self._beating), newest if has_run else None

    def _note_stall(self, finding: str) -> None:
        """Says in the launch's journal that it failed, before it is stopped: the rule counts it whatever happens next.

        As rank 1, for the launch's own failures are rank 0's.
        """
        launch, attempt = self._at_work()
        if launch is None:
            return  # the job has not come so far as to begin a launch of its own
        journal = Journal(self.store.storage, self.store.launch_dir(launch.id), 1, flush_s=0)
        journal.event("failure", attempt=str(attempt or "unclaimed"), cause=_STALLED, rank=0, message=finding)

    def _verdict(self) -> GiveUp | None:
        tries = read_attempt_history(self.store)
        return decide_give_up(tries, self.config.failure.limits, settings_digest(self.declared))

    def _launches(self) -> list[str]:
        return list_launches(self.store)

    def _num_in_vain(self, before: Sequence[str], ended: SubmittedJob) -> int:
        """How many tries have been in vain since the last progress, at least 1.

        The run knows nothing of a job that ended before it began a launch, and a launch that found the cluster too
        small is no try, so those are counted here.

        Args:
            before: The run's launches before the job; none for one that was at work already.
            ended: The job.
        """
        is_unbegun = self._launches() == list(before) or ended.exit_code == PreflightError.exit_code
        self._num_unbegun = self._num_unbegun + 1 if is_unbegun else 0
        tries = count_failures(read_attempt_history(self.store), settings_digest(self.declared))
        return max(1, len(tries) + self._num_unbegun)

    def _is_done(self) -> bool:
        model = find_model(self.store)
        return model is not None and not model.faults

    def _wait(self, seconds: float, why: str) -> None:
        self.say(f"{why + '; ' if why else ''}trying again in {seconds:.0f} s")
        self.ending.wait(seconds)

    def say(self, text: str) -> None:
        """A line for people."""
        print(f"{time.strftime('%H:%M:%S')} {self.config.name}: {text}", file=sys.stderr, flush=True)


def supervise(supervisors: Sequence[Supervisor]) -> int:
    """Keeps several runs going, each in a thread of its own. Returns the first exit code that is not 0.

    Raises:
        OutlastError: The first run's that is given up, once all have ended.
    """
    with ThreadPoolExecutor(len(supervisors)) as pool:
        ends = [pool.submit(item.run) for item in supervisors]
        try:
            for end in ends:
                end.exception()
        except KeyboardInterrupt:
            for item in supervisors:
                item.ending.set()
            raise
    return next((code for code in [end.result() for end in ends] if code), 0)


def _last_line(job: SubmittedJob) -> str:
    lines = [line for line in job.message.splitlines() if line.strip()]
    return f" ({lines[-1].strip()[:200]})" if lines and job.driver_exit_code is None else ""


def _last_word(client: JobSubmissionClient, ended: SubmittedJob) -> str:
    """The last line of a job's log, which alone says why no worker began; else what Ray says of the job."""
    try:
        said = client.get_job_logs(ended.id).strip() or ended.message.strip() or "its log is empty"
    except (RuntimeError, OSError) as error:
        said = f"its log cannot be read: {first_line(error)}"
    return said.splitlines()[-1].strip()[:200]
