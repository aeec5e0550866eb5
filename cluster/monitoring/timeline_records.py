"""Records of which a timeline consists: launches, attempts, saves, steps."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from calendar import timegm
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import nan
from time import strptime
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.claims import REGROUPED_FROM

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import StepColumns

#: A driver whose liveness file is older counts as lost.
LOST_AFTER_S = 30.0

#: Events of an attempt that the report lists.
NoteworthyEvent = (
    events.NonFiniteEvent
    | events.EarlyStopEvent
    | events.ChangedEvent
    | events.SaveFailedEvent
    | events.DeleteFailedEvent
    | events.UnsavedEvent
    | events.AttemptErrorEvent
    | events.HangEvent
    | events.ModelRejectedEvent
)


@dataclass(slots=True)
class StepSeries:
    """The steps of one attempt by column, because there may be millions. Step numbers rise."""

    step: array[int] = field(default_factory=lambda: array("q"))  #: the step's number
    tokens: array[int] = field(default_factory=lambda: array("q"))  #: tokens of all ranks; 0 if unknown
    loss: array[float] = field(default_factory=lambda: array("d"))  #: NaN if it was not finite
    grad_norm: array[float] = field(default_factory=lambda: array("d"))  #: NaN if unknown
    lr: array[float] = field(default_factory=lambda: array("d"))  #: the learning rate; NaN if unknown
    seconds: array[float] = field(default_factory=lambda: array("d"))  #: the step's duration
    ended_at: array[float] = field(default_factory=lambda: array("d"))  #: seconds since the epoch, by rank 0's clock

    def __len__(self) -> int:
        return len(self.step)

    @property
    def columns(self) -> dict[str, array[Any]]:
        return {column.name: getattr(self, column.name) for column in fields(self)}

    def add(self, event: Mapping[str, Any]) -> None:
        """Add the JSON object of a `step` event; ignore one with a repeated number or a wrong type."""
        get, size = event.get, len(self)
        try:
            if size and event["step"] <= self.step[-1]:
                return
            self.step.append(event["step"])
            self.tokens.append(get("tokens", 0))
            loss, norm, lr = get("loss"), get("grad_norm"), get("lr")
            self.loss.append(nan if loss is None else loss)
            self.grad_norm.append(nan if norm is None else norm)
            self.lr.append(nan if lr is None else lr)
            self.seconds.append(get("seconds", 0.0))
            self.ended_at.append(get("ended_at", get("t", 0.0)))
        except (LookupError, TypeError, OverflowError):
            for column in self.columns.values():
                del column[size:]

    def extend(self, steps: StepColumns) -> None:
        """Add many steps at once, with the result of `add` for each."""
        new = steps.rising(self.step[-1] if self.step else None)
        for name, column in self.columns.items():
            column.frombytes(new[name].tobytes())

    def began_at(self, index: int) -> float:
        return self.ended_at[index] - self.seconds[index]

    def index_of(self, step: int) -> int | None:
        index = bisect_left(self.step, step)
        return index if index < len(self) and self.step[index] == step else None


@dataclass(slots=True)
class SaveRecord:
    """One save of an attempt, as far as its events are known."""

    step: int  #: the step that was saved
    committed_at: float | None = None  #: when its commit was acknowledged
    num_bytes: int = 0  #: the checkpoint's size
    digest: str = ""  #: the manifest's digest
    commit_s: float | None = None  #: seconds from the start of the save to its commit
    blocked_s: float | None = None  #: those of them that training waited
    fenced_s: float = 0.0  #: those of the wait that are within the next step

    @property
    def is_background(self) -> bool:
        """Whether training went on during a part of it. The save that ends an attempt is never one."""
        return self.blocked_s is not None and self.commit_s is not None and self.blocked_s < self.commit_s


@dataclass(slots=True)
class AttemptTimeline:
    """One start of the worker group."""

    id: AttemptId  #: its number and nonce
    claim: dict[str, Any] = field(default_factory=dict)  #: its claim; empty if only its events are known
    start: events.StartEvent | events.ResumeEvent | events.RegroupedEvent | None = None
    plan: events.PlanEvent | None = None
    startup_timings: Mapping[str, float] = field(default_factory=dict)  #: when it reached which point of its startup
    steps: StepSeries = field(default_factory=StepSeries)
    evaluations: list[events.EvalEvent] = field(default_factory=list)
    saves: dict[int, SaveRecord] = field(default_factory=dict)  #: by step
    final: events.FinalEvent | None = None  #: its last event, if it ended in order
    slow: Sequence[events.SlowRank] = ()  #: the slow ranks of the newest report
    notes: list[NoteworthyEvent] = field(default_factory=list)  #: events that the report lists
    #: The last step that the coordinator received, because a killed rank 0 leaves it out of its journal.
    reached: events.Reached | None = None
    unsaved: events.UnsavedEvent | None = None  #: the newest save that failed, until another one succeeds
    num_steps: int | None = None  #: its planned steps by the driver, in case its own journal lacks the plan
    last_seen_at: float = 0.0  #: the time of its newest event

    @property
    def launch(self) -> str:
        return str(self.claim.get("launch", ""))

    @property
    def claimed_at(self) -> float:
        started_at = self.start.t if self.start else 0.0
        return float(self.claim.get("claimed_at") or self.startup_timings.get("claim") or started_at)

    @property
    def world_size(self) -> int | None:
        size = (self.plan and self.plan.world_size) or self.claim.get("world_size")
        return None if size is None else int(size)

    @property
    def resume_point(self) -> CheckpointRef | None:
        """The checkpoint from which it resumed."""
        return self.start.source if isinstance(self.start, events.ResumeEvent) else None

    @property
    def has_resumed(self) -> bool:
        """Whether it continued from a checkpoint, or from snapshots in memory."""
        return isinstance(self.start, events.ResumeEvent)

    @property
    def regrouped_from(self) -> str | None:
        """The attempt that it continued in memory: the newest one that had claimed the run."""
        if name := self.claim.get(REGROUPED_FROM):
            return str(name)
        return self.start.attempt if isinstance(self.start, events.RegroupedEvent) else None

    @property
    def start_step(self) -> int:
        return self.start.step if self.start else 0

    @property
    def last_step(self) -> int:
        """Its last known step, else the one from which it started. A custom loop reports only its saves."""
        last = self.steps.step[-1] if self.steps else max(self.saves, default=self.start_step)
        return max(last, self.reached.step if self.reached else 0)

    def last_step_by(self, at: float) -> int:
        """Return its last step completed by a moment: steps of a superseded attempt do not count."""
        if self.steps and self.steps.ended_at[-1] > at:
            count = bisect_right(self.steps.ended_at, at)
            return self.steps.step[count - 1] if count else self.start_step
        return self.last_step

    @property
    def last_step_at(self) -> float | None:
        """When its last step ended; None without any."""
        if self.reached and (not self.steps or self.reached.step > self.steps.step[-1]):
            return self.reached.ended_at
        return self.steps.ended_at[-1] if self.steps else None

    def apply(self, body: Mapping[str, Any]) -> None:
        """Add one of its events. Unknown kinds change only `last_seen_at`."""
        at = body.get("t")
        if isinstance(at, float | int) and at > self.last_seen_at:
            self.last_seen_at = at
        if body["event"] == events.StepEvent.kind:  # not parsed, because there may be millions
            self.steps.add(body)
            return
        match events.parse_event(body):
            case events.StartEvent() | events.ResumeEvent() | events.RegroupedEvent() as event:
                self.start = self.start or event  # the journal of an attempt may hold that of one without a claim
            case events.PlanEvent() as event:
                self.plan = event
            case events.UnderWayEvent(marks=timings):
                self.startup_timings = timings
            case events.EvalEvent() as event:
                self.add_evaluation(event)
            case events.CommitEvent() as event:
                self.unsaved = None
                save = self.saves.setdefault(event.step, SaveRecord(event.step))
                save.committed_at, save.num_bytes = event.t, event.num_bytes
                save.digest, save.commit_s = event.digest, event.seconds
            case events.SaveEvent() as event:
                save = self.saves.setdefault(event.step, SaveRecord(event.step))
                save.blocked_s, save.commit_s, save.fenced_s = event.blocked_s, event.commit_s, event.fenced_s
            case events.DoneEvent() | events.StopEvent() | events.SupersededEvent() as event:
                self.final = event
            case events.SlowEvent(ranks=ranks):
                self.slow = ranks
            case events.UnsavedEvent() as event:
                self.unsaved = event
                self.notes.append(event)
            case event if isinstance(event, NoteworthyEvent):
                self.notes.append(event)

    def add_evaluation(self, event: events.EvalEvent) -> None:
        """Add an evaluation, unless one of its step or a later one is known already."""
        if not self.evaluations or event.step > self.evaluations[-1].step:
            self.evaluations.append(event)

    def apply_steps(self, steps: StepColumns) -> None:
        self.last_seen_at = max(self.last_seen_at, float(steps["t"].max()))
        self.steps.extend(steps)


@dataclass(slots=True)
class LaunchTimeline:
    """One start of the driver."""

    id: str  #: its name, which starts with the time when it began
    alive: dict[str, Any] = field(default_factory=dict)  #: its liveness file; empty if there is none
    failures: list[events.GroupFailureEvent] = field(default_factory=list)  #: unplanned ends of worker groups, in order
    resizes: list[events.ResizeEvent] = field(default_factory=list)  #: changes of the number of workers
    no_room: list[float] = field(default_factory=list)  #: when each wait for cluster resources began
    is_gone: bool = False  #: its driver's process ran on this machine and has ended

    @property
    def began_at(self) -> float | None:
        """When it began, by its liveness file or its name; None if unknown."""
        if "began" in self.alive:
            return float(self.alive["began"])
        try:
            return float(timegm(strptime(self.id[:15], "%Y%m%d-%H%M%S")))
        except ValueError:
            return None

    @property
    def has_ended(self) -> bool:
        return bool(self.alive.get("ended"))

    def is_live(self, now: float) -> bool:
        """Whether its driver is running: its heartbeat is recent, and its process is not known to be gone."""
        has_heartbeat = bool(self.alive) and not self.has_ended and now - self.alive["t"] < LOST_AFTER_S
        return has_heartbeat and not self.is_gone

    def apply(self, event: events.Event) -> None:
        match event:
            case events.GroupFailureEvent():
                self.failures.append(event)
            case events.ResizeEvent():
                self.resizes.append(event)
            case events.NoRoomEvent():
                self.no_room.append(event.since or event.t)
