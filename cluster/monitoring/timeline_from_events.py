"""A run's timeline, built from its journals event by event: launches, attempts, steps, saves, failures.

Status, live panel, goodput and report all read it. It is pure: events come from storage (`timeline_reader.py`) or from
the coordinator of a running launch (`console_progress.py`). A missing event leaves a gap and no more: a killed rank 0
loses up to five seconds of its journal, and older releases recorded less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import zip_longest
from math import inf, isnan
from typing import Any

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.attempt_history import AttemptEnd, end_of_attempt, launches_in_order
from outlast.checkpointing.run_store.events import AttemptErrorEvent, DoneEvent, GroupFailureEvent, parse_event
from outlast.cluster.monitoring.timeline_records import AttemptTimeline, LaunchTimeline


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

    def apply_launch_event(self, launch: str, body: Mapping[str, Any]) -> None:
        event = parse_event(body)
        self.launch(launch).apply(event)
        if isinstance(event, GroupFailureEvent) and event.reached and (attempt := AttemptId.parse(event.attempt)):
            self.attempt(attempt).reached = event.reached

    @property
    def claimed_attempts(self) -> list[AttemptTimeline]:
        """The attempts in order, without those that have neither a complete claim nor an event."""
        return [self.attempts[key] for key in sorted(self.attempts) if self.attempts[key].claimed_at]

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
        """Every unplanned end of a worker group, launch by launch, oldest first."""
        launches = self.launches_in_order
        return [(launch, item) for launch in launches for item in sorted(launch.failures, key=lambda e: e.t)]

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
            return {0: State.DONE, 75: State.STOPPED, 130: State.STOPPED}.get(launch.alive["exit_code"], State.FAILED)
        if not launch.is_live(now):
            return State.LOST
        return State.RUNNING if self.attempts else State.STARTING

    @property
    def failure_by_attempt(self) -> dict[str, GroupFailureEvent]:
        """The first failure of each attempt, by the attempt's name."""
        failures = [item for launch in self.launches.values() for item in launch.failures]
        return {item.attempt: item for item in reversed(failures)}

    @property
    def ends(self) -> dict[AttemptId, AttemptEnd]:
        """How each attempt ended, if it has; computed for all at once, because a run may have thousands."""
        failures, attempts = self.failure_by_attempt, self.claimed_attempts
        resizes = {e.attempt: e for launch in self.launches.values() for e in reversed(launch.resizes)}
        last_of = {item.launch: item.id for item in attempts}
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

    @property
    def loss(self) -> float | None:
        """The newest finite loss."""
        losses = (value for item in reversed(self.claimed_attempts) for value in reversed(item.steps.loss))
        return next((value for value in losses if not isnan(value)), None)
