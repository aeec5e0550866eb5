"""A run's whole story, folded from its journals event by event: launches, attempts, steps, saves, failures.

`status`, the live panel, the ledger and the report all read it. It is pure: whoever has events puts them in, from the
storage (`follow.py`) or from the hub while a run goes on (`progress.py`). An event that is missing leaves a gap and
nothing else: a rank 0 that is killed takes up to five seconds of its journal with it, and older releases told less.
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
    """What a run is doing, as far as its storage tells."""

    DONE = "done"
    STARTING = "starting"  #: its driver is alive; no worker has claimed the run yet
    RUNNING = "running"
    STOPPED = "stopped"  #: it was interrupted, and can be resumed
    FAILED = "failed"
    LOST = "lost"  #: its driver fell silent without a word
    UNATTENDED = "unattended"  #: checkpoints of a loop of one's own, which has no driver to tell

    @property
    def is_live(self) -> bool:
        return self in (State.STARTING, State.RUNNING)


@dataclass(slots=True)
class Timeline:
    """Everything that is known of a run.

    Attributes:
        run: Its name.
        launches: By id.
        attempts: By id.
    """

    run: str
    launches: dict[str, LaunchTimeline] = field(default_factory=dict)
    attempts: dict[AttemptId, AttemptTimeline] = field(default_factory=dict)

    def launch(self, name: str) -> LaunchTimeline:
        """A launch, begun if it is new."""
        return self.launches.setdefault(name, LaunchTimeline(name))

    def attempt(self, attempt: AttemptId) -> AttemptTimeline:
        """An attempt, begun if it is new."""
        return self.attempts.setdefault(attempt, AttemptTimeline(attempt))

    def apply_launch(self, name: str, body: Mapping[str, Any]) -> None:
        """Takes an event of a launch's journal."""
        event = parse_event(body)
        self.launch(name).apply(event)
        if isinstance(event, GroupFailureEvent) and event.reached and (attempt := AttemptId.parse(event.attempt)):
            self.attempt(attempt).reached = event.reached

    @property
    def in_order(self) -> list[AttemptTimeline]:
        """The attempts, lowest first, but those that neither claimed whole nor told anything."""
        return [self.attempts[key] for key in sorted(self.attempts) if self.attempts[key].claimed_at]

    @property
    def in_pairs(self) -> list[tuple[AttemptTimeline, AttemptTimeline | None]]:
        """Each attempt with the one that followed it."""
        attempts = self.in_order
        return list(zip_longest(attempts, attempts[1:]))

    @property
    def launches_in_order(self) -> list[LaunchTimeline]:
        """By their claims, whatever the clocks said that named them."""
        claimed: dict[str, list[AttemptId]] = {}
        for attempt in self.attempts.values():
            claimed.setdefault(attempt.launch, []).append(attempt.id)
        return [self.launches[key] for key in launches_in_order(self.launches, claimed)]

    @property
    def failures(self) -> list[tuple[LaunchTimeline, GroupFailureEvent]]:
        """Every end of a worker group that was not meant, launch by launch, oldest first."""
        launches = self.launches_in_order
        return [(launch, item) for launch in launches for item in sorted(launch.failures, key=lambda e: e.t)]

    @property
    def at_work(self) -> list[LaunchTimeline]:
        """Launches that have not ended, newest last: the one that has the run, and those that have yet to claim it.

        Some may have been killed: their beat tells.
        """
        lost = self.superseded
        return [item for item in self.launches_in_order if item.alive and not item.has_ended and item.id not in lost]

    @property
    def superseded(self) -> set[str]:
        """Launches from which another one has taken the run."""
        claims = [name for key in sorted(self.attempts) if (name := self.attempts[key].launch)]
        return {name for name in claims if name != claims[-1]}

    def newest_launch(self, now: float) -> LaunchTimeline | None:
        """The newest that is at work or, where none is, the newest that showed a sign of life."""
        shown = [launch for launch in self.launches_in_order if launch.alive]
        return next((launch for launch in reversed(self.at_work) if launch.is_live(now)), shown[-1] if shown else None)

    def heard_at(self, now: float) -> float:
        """When its newest launch or any attempt last showed a sign of life; 0 if none ever did."""
        launch = self.newest_launch(now)
        heard = [attempt.heard_at for attempt in self.attempts.values()]
        return max([*heard, float(launch.alive["t"]) if launch else 0.0])

    @property
    def is_new(self) -> bool:
        """A driver has begun, and no worker has claimed the run yet."""
        return not self.attempts and any(launch.alive for launch in self.launches.values())

    @property
    def current(self) -> AttemptTimeline | None:
        """The newest attempt that told anything, else the newest."""
        attempts = self.in_order
        return next((item for item in reversed(attempts) if item.heard_at), attempts[-1] if attempts else None)

    def state(self, now: float) -> State:
        """What the run is doing."""
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
    def failures_of(self) -> dict[str, GroupFailureEvent]:
        """By the name of the attempt that it ended, each failure; where two were told, the first."""
        told = [item for launch in self.launches.values() for item in launch.failures]
        return {item.attempt: item for item in reversed(told)}

    @property
    def ends(self) -> dict[AttemptId, AttemptEnd]:
        """How each attempt ended, or that it has not; all at once, for a run may have thousands."""
        failures, attempts = self.failures_of, self.in_order
        resizes = {e.attempt: e for launch in self.launches.values() for e in reversed(launch.resizes)}
        last_of = {item.launch: item.id for item in attempts}
        ends = {}
        for item in attempts:
            alive = self.launches[item.launch].alive if item.launch in self.launches else {}
            ends[item.id] = end_of_attempt(
                item.final,
                next((note for note in reversed(item.notes) if isinstance(note, AttemptErrorEvent)), None),
                failures.get(str(item.id)),
                resizes.get(str(item.id)),
                alive,
                has_successor=last_of[item.launch] != item.id,
                is_open=item is attempts[-1] and not alive.get("ended"),
            )
        return ends

    @property
    def num_lost(self) -> int:
        """Steps that were made and then lost: those between each resume point and where the run was before."""
        lost = position = 0
        for attempt, following in self.in_pairs:
            if attempt.start is not None:
                lost += max(0, position - attempt.base_step)
                position = attempt.last_step_by(following.claimed_at if following else inf)
        return lost

    @property
    def loss(self) -> float | None:
        """The newest finite loss."""
        for attempt in reversed(self.in_order):
            for value in reversed(attempt.steps.loss):
                if not isnan(value):
                    return value
        return None
