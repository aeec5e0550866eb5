"""Records of a timeline: launches, attempts, saves, evaluations, steps."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from calendar import timegm
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from time import strptime
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store import events

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import StepColumns

#: A driver that has not been heard of for so long is lost.
LOST_AFTER_S = 30.0

#: What a person may want to know of an attempt.
NoteworthyEvent = (
    events.NonFiniteEvent
    | events.EarlyStopEvent
    | events.ChangedEvent
    | events.SaveFailedEvent
    | events.AttemptErrorEvent
    | events.HangEvent
    | events.ModelRejectedEvent
)


class StepSeries:
    """The steps of one attempt in the order made, by column, for there may be millions.

    Attributes:
        number: Which step, rising.
        loss: NaN where it was not finite.
        lr: The learning rate.
        grad_norm: NaN where nobody knows.
        tokens: What the model read, on all ranks; 0 where nobody knows.
        seconds: What it took.
        ended_at: When it ended, in seconds since the epoch, by rank 0's clock.
    """

    def __init__(self) -> None:
        self.number, self.tokens = array("q"), array("q")
        self.loss, self.lr, self.grad_norm = array("d"), array("d"), array("d")
        self.seconds, self.ended_at = array("d"), array("d")
        self.columns: tuple[array[Any], ...] = (
            self.number,
            self.tokens,
            self.loss,
            self.grad_norm,
            self.lr,
            self.seconds,
            self.ended_at,
        )

    def __len__(self) -> int:
        return len(self.number)

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the JSON object of a `step` event; one without a usable number, or with a wrong type, is left out."""
        get, size = event.get, len(self)
        try:
            if size and event["step"] <= self.number[-1]:
                return
            self.number.append(event["step"])
            self.tokens.append(get("tokens", 0))
            loss, norm, lr = get("loss"), get("grad_norm"), get("lr")
            self.loss.append(nan if loss is None else loss)
            self.grad_norm.append(nan if norm is None else norm)
            self.lr.append(nan if lr is None else lr)
            self.seconds.append(get("seconds", 0.0))
            self.ended_at.append(get("ended_at", get("t", 0.0)))
        except (LookupError, TypeError, OverflowError):
            for column in self.columns:
                del column[size:]

    def extend(self, steps: StepColumns) -> None:
        """Adds many at once, as `add` does one by one."""
        new = steps.rising(self.number[-1] if self.number else None)
        for column, name in (
            (self.number, "step"),
            (self.tokens, "tokens"),
            (self.loss, "loss"),
            (self.grad_norm, "grad_norm"),
            (self.lr, "lr"),
            (self.seconds, "seconds"),
            (self.ended_at, "ended_at"),
        ):
            column.frombytes(new[name].tobytes())

    def began_at(self, index: int) -> float:
        return self.ended_at[index] - self.seconds[index]

    def find(self, number: int) -> int | None:
        """The index of a step."""
        index = bisect_left(self.number, number)
        return index if index < len(self) and self.number[index] == number else None


@dataclass(slots=True)
class SaveRecord:
    """One save of an attempt, as far as it was told.

    Attributes:
        step: The step that was saved.
        committed_at: When its commit was acknowledged.
        num_bytes: Its size.
        digest: Its manifest's.
        commit_s: Seconds from the save's beginning to its commit.
        blocked_s: Seconds of them that training waited.
        fenced_s: Seconds of these that lie within the next step.
    """

    step: int
    committed_at: float | None = None
    num_bytes: int = 0
    digest: str = ""
    commit_s: float | None = None
    blocked_s: float | None = None
    fenced_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation: after which step, from when to when, and what came out (`eval_loss`, scores)."""

    step: int
    began_at: float
    ended_at: float
    scores: Mapping[str, float]


@dataclass(slots=True)
class AttemptTimeline:
    """One launch of the worker group.

    Attributes:
        id: Its number and nonce.
        claim: What it declared; empty where only its events are known.
        start: How it started.
        plan: What it was to do.
        marks: When it reached what on its way to the first step.
        steps: Its steps.
        evaluations: In order.
        saves: By step.
        final: Its last event, if it ended in order.
        slow: The slow ranks, as last told.
        notes: What else it told that a person may want to know.
        reached: The last step that the hub heard of, and when it ended, where the journal may not hold it.
        heard_at: When it was last heard of.
    """

    id: AttemptId
    claim: dict[str, Any] = field(default_factory=dict)
    start: events.StartEvent | events.ResumeEvent | None = None
    plan: events.PlanEvent | None = None
    marks: Mapping[str, float] = field(default_factory=dict)
    steps: StepSeries = field(default_factory=StepSeries)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    saves: dict[int, SaveRecord] = field(default_factory=dict)
    final: events.FinalEvent | None = None
    slow: Sequence[events.SlowRank] = ()
    notes: list[NoteworthyEvent] = field(default_factory=list)
    reached: events.Reached | None = None
    heard_at: float = 0.0

    @property
    def launch(self) -> str:
        return str(self.claim.get("launch", ""))

    @property
    def claimed_at(self) -> float:
        """When it began to own the run."""
        started_at = self.start.t if self.start else 0.0
        return float(self.claim.get("claimed_at") or self.marks.get("claim") or started_at)

    @property
    def world_size(self) -> int | None:
        size = (self.plan and self.plan.world_size) or self.claim.get("world_size")
        return None if size is None else int(size)

    @property
    def base(self) -> CheckpointRef | None:
        """The checkpoint that it resumed from."""
        return self.start.source if isinstance(self.start, events.ResumeEvent) else None

    @property
    def base_step(self) -> int:
        return self.start.step if self.start else 0

    @property
    def last_step(self) -> int:
        """The last step that it is known to have made, or that it began from. A loop of one's own tells its saves."""
        made = self.steps.number[-1] if self.steps else max(self.saves, default=self.base_step)
        return max(made, self.reached.step if self.reached else 0)

    def last_step_by(self, at: float) -> int:
        """The last step that was done at some moment: what a zombie does later is nobody's."""
        if self.steps and self.steps.ended_at[-1] > at:
            number = bisect_right(self.steps.ended_at, at)
            return self.steps.number[number - 1] if number else self.base_step
        return self.last_step

    @property
    def last_step_at(self) -> float | None:
        """When that ended; None without any."""
        told = self.steps.ended_at[-1] if self.steps else None
        if self.reached and (told is None or self.reached.step > self.steps.number[-1]):
            return self.reached.ended_at
        return told

    def apply(self, body: Mapping[str, Any]) -> None:
        """Takes one of its events. Those of a kind that is not known here change nothing."""
        at = body.get("t")
        if isinstance(at, float | int) and at > self.heard_at:
            self.heard_at = at
        if body["event"] == events.StepEvent.kind:  # without parsing it, for there may be millions
            self.steps.add(body)
            return
        match events.parse_event(body):
            case events.StartEvent() | events.ResumeEvent() as event:
                self.start = event
            case events.PlanEvent() as event:
                self.plan = event
            case events.UnderWayEvent(marks=marks):
                self.marks = marks
            case events.EvalEvent() as event:
                self.evaluations.append(EvaluationRecord(event.step, event.t - event.seconds, event.t, event.scores))
            case events.CommitEvent() as event:
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
            case event if isinstance(event, NoteworthyEvent):
                self.notes.append(event)

    def apply_steps(self, steps: StepColumns) -> None:
        """Takes many of its steps at once."""
        self.heard_at = max(self.heard_at, float(steps["t"].max()))
        self.steps.extend(steps)


@dataclass(slots=True)
class LaunchTimeline:
    """One start of the driver.

    Attributes:
        id: Its name, which tells when it began.
        alive: Its sign of life; empty where there is none.
        failures: Ends of worker groups that were not meant, in order.
        resizes: Changes of the number of workers.
        no_room: Since when the cluster had no room for a group, each time.
        is_gone: Its driver ran on this machine, and is no process any more.
    """

    id: str
    alive: dict[str, Any] = field(default_factory=dict)
    failures: list[events.GroupFailureEvent] = field(default_factory=list)
    resizes: list[events.ResizeEvent] = field(default_factory=list)
    no_room: list[float] = field(default_factory=list)
    is_gone: bool = False

    @property
    def began_at(self) -> float | None:
        """When it began, as it says or as its name does; None where nobody knows."""
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
        """Whether its driver is at work: a beat counts for half a minute, but not that of a process that is gone."""
        beats = bool(self.alive) and not self.has_ended and now - self.alive["t"] < LOST_AFTER_S
        return beats and not self.is_gone

    def apply(self, event: events.Event) -> None:
        """Takes one of its events."""
        match event:
            case events.GroupFailureEvent():
                self.failures.append(event)
            case events.ResizeEvent():
                self.resizes.append(event)
            case events.NoRoomEvent():
                self.no_room.append(event.since or event.t)
