"""Records of a timeline: launches, attempts, saves, evaluations, steps."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from calendar import timegm
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from time import strptime
from typing import Any

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef

#: A driver that has not been heard of for so long is lost.
LOST_AFTER_S = 30.0


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

    def __len__(self) -> int:
        return len(self.number)

    def add(self, event: Mapping[str, Any]) -> None:
        if self.number and event["step"] <= self.number[-1]:
            return
        get = event.get
        self.number.append(event["step"])
        self.tokens.append(get("tokens", 0))
        loss, norm = get("loss"), get("grad_norm")
        self.loss.append(nan if loss is None else loss)
        self.grad_norm.append(nan if norm is None else norm)
        self.lr.append(get("lr", nan))
        self.seconds.append(get("seconds", 0.0))
        self.ended_at.append(get("ended_at", get("t", 0.0)))

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
        start: Its `start` or `resume` event.
        plan: Its `plan` event.
        marks: When it reached what on its way to the first step.
        steps: Its steps.
        evaluations: In order.
        saves: By step.
        end: Its `done`, `stop` or `superseded` event.
        slow: The slow ranks, as last told.
        notes: What else it told that a person may want to know.
        reached: The last step that the hub heard of, and when it ended, where the journal may not hold it.
        heard_at: When it was last heard of.
    """

    id: AttemptId
    claim: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    steps: StepSeries = field(default_factory=StepSeries)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    saves: dict[int, SaveRecord] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    slow: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    reached: tuple[int, float] | None = None
    heard_at: float = 0.0

    @property
    def launch(self) -> str:
        return str(self.claim.get("launch", ""))

    @property
    def claimed_at(self) -> float:
        """When it began to own the run."""
        return float(self.claim.get("claimed_at") or self.marks.get("claim") or (self.start or {}).get("t", 0.0))

    @property
    def world_size(self) -> int | None:
        size = self.plan.get("world_size") or self.claim.get("world_size")
        return None if size is None else int(size)

    @property
    def base(self) -> CheckpointRef | None:
        """The checkpoint that it resumed from."""
        attempt, _, name = str((self.start or {}).get("source", "")).partition("/checkpoint-")
        return CheckpointRef.parse(f"{name}@{attempt}")

    @property
    def base_step(self) -> int:
        return int((self.start or {}).get("step", 0))

    @property
    def last_step(self) -> int:
        """The last step that it is known to have made, or that it began from. A loop of one's own tells its saves."""
        made = self.steps.number[-1] if self.steps else max(self.saves, default=self.base_step)
        return max(made, self.reached[0] if self.reached else 0)

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
        if self.reached and (told is None or self.reached[0] > self.steps.number[-1]):
            return self.reached[1]
        return told

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes one of its events. Those of a kind that is not known here change nothing."""
        at = float(event.get("t", 0.0))
        if at > self.heard_at:
            self.heard_at = at
        match event["event"]:
            case "step":
                self.steps.add(event)
            case "start" | "resume":
                self.start = dict(event)
            case "plan":
                self.plan = dict(event)
            case "under-way":
                self.marks = dict(event["marks"])
            case "eval":
                scores = {name: value for name, value in event.items() if name.startswith("eval_")}
                ended = float(event["t"])
                self.evaluations.append(
                    EvaluationRecord(event["step"], ended - event.get("seconds", 0.0), ended, scores)
                )
            case "commit":
                save = self.saves.setdefault(event["step"], SaveRecord(event["step"]))
                save.committed_at, save.num_bytes = event["t"], event.get("num_bytes", 0)
                save.digest, save.commit_s = event.get("digest", ""), event.get("seconds")
            case "save":
                save = self.saves.setdefault(event["step"], SaveRecord(event["step"]))
                save.blocked_s, save.commit_s = event["blocked_s"], event["commit_s"]
                save.fenced_s = event.get("fenced_s", 0.0)
            case "done" | "stop" | "superseded":
                self.end = dict(event)
            case "slow":
                self.slow = event["ranks"]
            case "non-finite" | "early-stop" | "changed" | "save-failed" | "failed" | "hang" | "rejected":
                self.notes.append(dict(event))


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
    failures: list[dict[str, Any]] = field(default_factory=list)
    resizes: list[dict[str, Any]] = field(default_factory=list)
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

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes one of its events."""
        told = {**event, "launch": self.id}
        match event["event"]:
            case "failure":
                self.failures.append(told)
            case "resize":
                self.resizes.append(told)
            case "no-room":
                self.no_room.append(float(event.get("since", event["t"])))


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended.

    Attributes:
        cause: In a word or three.
        message: What was said of it.
        rank: Which rank it was, where that is known.
        at: When that was noticed; None where nobody noticed.
        is_over: It is not at work any more.
        goes_on: Its launch starts, or has started, another group.
        is_planned: Nothing had failed.
    """

    cause: str
    message: str = ""
    rank: int | None = None
    at: float | None = None
    is_over: bool = True
    goes_on: bool = False
    is_planned: bool = True
