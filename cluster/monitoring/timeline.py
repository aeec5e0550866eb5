"""A run's timeline: launches, attempts, steps, saves, failures. Status, live panel, goodput and report all read it.

It is built event by event, from storage (`TimelineReader`, which works after the cluster is gone) or from the
coordinator of a running launch (`console_progress.py`). A missing event leaves a gap and no more: a killed rank 0 loses
up to five seconds of its journal, and older releases recorded less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import zip_longest
from math import inf
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.attempt_history import AttemptEnd, end_of_attempt, launches_in_order
from outlast.checkpointing.run_store.claims import continued_in_memory, list_attempts, list_launches, read_claim
from outlast.checkpointing.run_store.events import (
    AttemptErrorEvent,
    DoneEvent,
    EvalEvent,
    GroupFailureEvent,
    Reached,
    RegroupedEvent,
    StepEvent,
    parse_event,
)
from outlast.checkpointing.run_store.journal import JournalTail
from outlast.checkpointing.run_store.liveness import is_dead, read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.cluster.monitoring.timeline_records import AttemptTimeline, LaunchTimeline

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import StepColumns

#: Launches and attempts that may still write: the newest, and the one that it supersedes.
_NUM_OPEN = 2


class State(Enum):
    """What a run is doing, as far as its storage shows."""

    DONE = "done"
    STARTING = "starting"  #: its driver is alive; no worker has claimed the run yet
    RUNNING = "running"
    STOPPED = "stopped"  #: it was interrupted and can be resumed
    FAILED = "failed"
    LOST = "lost"  #: its driver's heartbeat stopped without a recorded end
    UNATTENDED = "unattended"  #: checkpoints of a custom loop, which has no driver

    @property
    def is_live(self) -> bool:
        return self in (State.STARTING, State.RUNNING)


@dataclass(slots=True)
class Timeline:
    """Everything that is known of a run. Launches and attempts are keyed by id."""

    run: str
    launches: dict[str, LaunchTimeline] = field(default_factory=dict)
    attempts: dict[AttemptId, AttemptTimeline] = field(default_factory=dict)

    def launch(self, name: str) -> LaunchTimeline:
        """Return a launch; add it if it is new."""
        return self.launches.setdefault(name, LaunchTimeline(name))

    def attempt(self, attempt: AttemptId) -> AttemptTimeline:
        """Return an attempt; add it if it is new."""
        return self.attempts.setdefault(attempt, AttemptTimeline(attempt))

    def apply_attempt_events(self, attempt: AttemptTimeline, event: Mapping[str, Any] | StepColumns) -> None:
        """Add an event, or many steps, of an attempt's journal.

        An attempt that continues in memory begins its journal with the steps and evaluations that a lost rank 0 left
        out. They belong to the attempt that made them.
        """
        start = attempt.start if isinstance(attempt.start, RegroupedEvent) else None
        if not isinstance(event, Mapping):
            if start is not None and (is_earlier := event["step"] <= start.step).any():
                earlier = event.where(is_earlier)
                self._maker_of(attempt, float(earlier["ended_at"][0])).steps.extend(earlier)
                event = event.where(~is_earlier)
            attempt.apply_steps(event)
        elif start is not None and attempt.plan is None and event["event"] in (StepEvent.kind, EvalEvent.kind):
            match parse_event(event):
                case StepEvent() as step:
                    self._maker_of(attempt, step.ended_at or step.t).steps.add(event)
                case EvalEvent() as evaluation:
                    self._maker_of(attempt, evaluation.t).add_evaluation(evaluation)
        else:
            attempt.apply(event)

    def _maker_of(self, attempt: AttemptTimeline, at: float) -> AttemptTimeline:
        """Return the newest of the attempts that this one continues that had claimed the run by a moment."""
        maker = attempt
        while maker.claimed_at > at or maker is attempt:
            name = AttemptId.parse(maker.regrouped_from or "")
            if name is None or name >= maker.id or name not in self.attempts:
                break
            maker = self.attempts[name]
        return maker

    def apply_launch_event(self, launch: str, body: Mapping[str, Any]) -> None:
        event = parse_event(body)
        self.launch(launch).apply(event)
        if isinstance(event, GroupFailureEvent) and event.reached and (attempt := AttemptId.parse(event.attempt)):
            self.attempt(attempt).reached = event.reached

    def apply_progress(self, progress: Any) -> None:
        """Add what a driver wrote of an attempt with its heartbeat; ignore wrong types."""
        body = progress if isinstance(progress, dict) else {}
        attempt = AttemptId.parse(str(body.get("attempt")))
        if attempt is None or (known := self.attempts.get(attempt)) is None:
            return
        step, ended_at, num_steps = (body.get(key) for key in ("step", "ended_at", "num_steps"))
        if type(num_steps) is int:
            known.num_steps = num_steps
        if type(step) is int and isinstance(ended_at, float) and step > (known.reached.step if known.reached else 0):
            known.reached = Reached(step, ended_at)

    @property
    def claimed_attempts(self) -> list[AttemptTimeline]:
        """The attempts in order, without those that have neither a complete claim nor an event."""
        return [attempt for _, attempt in sorted(self.attempts.items()) if attempt.claimed_at]

    @property
    def attempt_pairs(self) -> list[tuple[AttemptTimeline, AttemptTimeline | None]]:
        """Each attempt with its successor."""
        attempts = self.claimed_attempts
        return list(zip_longest(attempts, attempts[1:]))

    @property
    def launches_in_order(self) -> list[LaunchTimeline]:
        """The launches in the order of their claims, because their names come from different clocks."""
        claimed: dict[str, list[AttemptId]] = {}
        for attempt in self.attempts.values():
            claimed.setdefault(attempt.launch, []).append(attempt.id)
        return [self.launches[key] for key in launches_in_order(self.launches, claimed)]

    @property
    def failures(self) -> list[tuple[LaunchTimeline, GroupFailureEvent]]:
        """Every unplanned end of a worker group and every lost worker, launch by launch, oldest first.

        Where the loss of a worker ended its group after all, the end of the group alone.
        """
        launches = self.launches_in_order
        found = [(launch, item) for launch in launches for item in sorted(launch.failures, key=lambda e: e.t)]
        ended = {item.attempt for _, item in found if not item.in_place}
        return [(launch, item) for launch, item in found if not (item.in_place and item.attempt in ended)]

    @property
    def open_launches(self) -> list[LaunchTimeline]:
        """Launches that have not ended, newest last: the owner of the run, and those that have yet to claim it.

        Some may have been killed, which only the age of their heartbeat shows.
        """
        lost = self.superseded
        return [item for item in self.launches_in_order if item.alive and not item.has_ended and item.id not in lost]

    @property
    def superseded(self) -> set[str]:
        """Launches from which another one has taken the run over."""
        claims = [name for key in sorted(self.attempts) if (name := self.attempts[key].launch)]
        return {name for name in claims if name != claims[-1]}

    def newest_launch(self, now: float) -> LaunchTimeline | None:
        """Return the newest live launch, else the newest that has a liveness file."""
        known = [launch for launch in self.launches_in_order if launch.alive]
        live = (launch for launch in reversed(self.open_launches) if launch.is_live(now))
        return next(live, known[-1] if known else None)

    def last_seen_at(self, now: float) -> float:
        """Return the time of the newest heartbeat or event; 0 if there is none."""
        launch = self.newest_launch(now)
        times = [attempt.last_seen_at for attempt in self.attempts.values()]
        return max([*times, float(launch.alive["t"]) if launch else 0.0])

    @property
    def is_unclaimed(self) -> bool:
        """A driver has begun, and no worker has claimed the run yet."""
        return not self.attempts and any(launch.alive for launch in self.launches.values())

    @property
    def current(self) -> AttemptTimeline | None:
        """The newest attempt with an event, else the newest."""
        attempts = self.claimed_attempts
        return next((item for item in reversed(attempts) if item.last_seen_at), attempts[-1] if attempts else None)

    def state(self, now: float) -> State:
        current, launch = self.current, self.newest_launch(now)
        if current is not None and isinstance(current.final, DoneEvent):
            return State.DONE
        if launch is None:
            return State.UNATTENDED
        if launch.has_ended:
            states = {0: State.DONE, 75: State.STOPPED, 130: State.STOPPED}
            return states.get(launch.alive.get("exit_code", 1), State.FAILED)
        if not launch.is_live(now):
            return State.LOST
        return State.RUNNING if self.attempts else State.STARTING

    @property
    def failure_by_attempt(self) -> dict[str, GroupFailureEvent]:
        """The first failure of each attempt, by the attempt's name."""
        return {item.attempt: item for _, item in reversed(self.failures)}

    @property
    def ends(self) -> dict[AttemptId, AttemptEnd]:
        """How each attempt ended, if it has; computed for all at once, because a run may have thousands."""
        failures, attempts = self.failure_by_attempt, self.claimed_attempts
        resizes = {e.attempt: e for launch in self.launches.values() for e in reversed(launch.resizes)}
        last_of = {item.launch: item.id for item in attempts}
        regrouped = {item.regrouped_from for item in attempts}
        continued = continued_in_memory({item.id: item.claim for item in attempts})
        ends = {}
        for item in attempts:
            alive = self.launches[item.launch].alive if item.launch in self.launches else {}
            ends[item.id] = end_of_attempt(
                alive,
                final=item.final,
                failed=next((note for note in reversed(item.notes) if isinstance(note, AttemptErrorEvent)), None),
                failure=failures.get(str(item.id)),
                resize=resizes.get(str(item.id)),
                has_successor=last_of[item.launch] != item.id,
                is_open=item is attempts[-1] and not alive.get("ended"),
                is_regrouped=item.id in continued or str(item.id) in regrouped,
            )
        return ends

    @property
    def redone_ranges(self) -> list[tuple[int, int]]:
        """For each resume that lost steps: its step, and the last step completed before it."""
        ranges, position = [], 0
        for attempt, successor in self.attempt_pairs:
            if attempt.start is not None:
                if position > attempt.start_step:
                    ranges.append((attempt.start_step, position))
                position = attempt.last_step_by(successor.claimed_at if successor else inf)
        return ranges

    @property
    def num_lost_steps(self) -> int:
        return sum(end - begin for begin, end in self.redone_ranges)


class TimelineReader:
    """Follows one run in its storage; each update adds what is new to `timeline`.

    An update is cheap: only the newest launches and attempts can still write, and only the growing segment of their
    journals is read.

    Args:
        store: The run.
        exclude_launch: A launch to leave out, because the caller receives its events directly.
        journals: Read journals too, not only claims and liveness files.
    """

    def __init__(self, store: RunStore, *, exclude_launch: str = "", journals: bool = True) -> None:
        self._store, self._exclude_launch, self._journals = store, exclude_launch, journals
        self._tail = JournalTail(store)
        self._closed: set[AttemptId | str] = set()  # read once more after newer ones appeared
        self._is_first = True
        self.timeline = Timeline(store.run)

    def update(self) -> Timeline:
        """Read what is new. Raises StorageError if the run cannot be listed; the next update continues there."""
        if not self._is_first:
            self._store.refresh()
        self._is_first = False
        self._update_attempts()  # first, because claims give the order of launches
        self._update_launches()
        return self.timeline

    def _update_attempts(self) -> None:
        attempts = list_attempts(self._store)
        for number, attempt in enumerate(attempts):
            if attempt in self._closed:
                continue
            known = self.timeline.attempts.get(attempt)
            claim = (known.claim if known else {}) or read_claim(self._store, attempt)
            if self._exclude_launch and claim.get("launch") == self._exclude_launch:
                continue
            record = self.timeline.attempt(attempt)
            record.claim = claim
            for event in self._new_events(self._store.attempt_dir(attempt)):
                self.timeline.apply_attempt_events(record, event)
            if claim and number < len(attempts) - _NUM_OPEN:
                self._closed.add(attempt)

    def _update_launches(self) -> None:
        for name in list_launches(self._store):
            if name != self._exclude_launch:
                self.timeline.launch(name)
        launches, superseded = self.timeline.launches_in_order, self.timeline.superseded
        for number, launch in enumerate(launches):
            if launch.id in self._closed:
                continue
            for _ in range(2):  # a driver that ended between the read and the check has written its end by now
                launch.alive = read_liveness(self._store, launch.id) or launch.alive
                launch.is_gone = not launch.has_ended and is_dead(launch.alive)
                if not launch.is_gone:
                    break
            self.timeline.apply_progress(launch.alive.get("progress"))
            for event in self._new_events(self._store.launch_dir(launch.id)):
                if isinstance(event, dict):  # a driver writes no step columns
                    self.timeline.apply_launch_event(launch.id, event)
            # A launch that owns the run, or may be about to claim it, stays open even if its name is older.
            if number < len(launches) - _NUM_OPEN and (launch.has_ended or launch.id in superseded):
                self._closed.add(launch.id)

    def _new_events(self, directory: str) -> Iterator[dict[str, Any] | StepColumns]:
        """Yield new events; if a read fails, that is recorded, and the next update resumes there."""
        if self._journals:
            with self._store.going_on(directory):
                yield from self._tail.new(directory)
