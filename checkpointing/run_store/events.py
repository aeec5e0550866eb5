"""Journal events: one class each, one parser, one serialiser.

An event is a JSON object with the key `event`, its kind. Journals and live messages carry these objects; writers make
them of a class and readers match on classes. On disk nothing but these keys appears, so a field is never renamed.

Parsing never raises. A field that is missing (older releases) or has the wrong type takes its default, or None where
null is allowed. Where neither exists, or the kind is unknown (newer releases), the event is an `UnknownEvent`. A field
whose default is None is left out when it is None.

Bulk readers take the fields of `step` events from the JSON object, because a run may have millions of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, dataclass_transform

from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.run_store.typed_json import from_json, to_json

Time = Annotated[float, "seconds since the epoch"]
Seconds = Annotated[float, "seconds"]
Step = Annotated[int, "number of the step, counted from 1"]
Attempt = Annotated[str, "name of the attempt"]
Message = Annotated[str, "text for people"]

#: Every kind of event.
KINDS: dict[str, type[Event]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened, and when: `t` is set by the journal, or by the process that passes on a live message."""

    kind: ClassVar[str] = ""

    t: Time = 0.0

    def __init_subclass__(cls, kind: str = "") -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        if kind:
            cls.kind, KINDS[kind] = kind, cls

    def to_json(self) -> dict[str, Any]:
        """The JSON object; without `t` as long as that is not set."""
        body = to_json(self)
        return ({"t": t} if (t := body.pop("t")) else {}) | {"event": self.kind} | body

    @classmethod
    def fields_of(cls, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of the fields in a JSON object."""
        return body


class UnknownEvent(Event):
    """An event of an unknown kind, or without what its kind requires."""

    name: str
    body: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(self.body)


# -- an attempt, in order of their first occurrence --------------------------------------------------------------------


@dataclass(frozen=True)
class Rejection:
    """A checkpoint that was not used."""

    checkpoint: Annotated[str, "its attempt and directory"]
    reasons: Annotated[tuple[str, ...], "what is wrong with it"] = ()


@dataclass(frozen=True)
class MemorySource:
    """Snapshots in memory."""

    attempt: Annotated[str, "name of the attempt that took them"]
    moved: Annotated[tuple[int, ...], "ranks whose part another node had"] = ()
    num_bytes: Annotated[int, "bytes of all ranks"] = 0
    seconds: Seconds = 0.0


class StartEvent(Event, kind="start"):
    """The attempt starts from step 0, because the run has no commit."""

    step: ClassVar[int] = 0


class ResumeEvent(Event, kind="resume"):
    """The attempt has restored a checkpoint, or snapshots in memory, every byte verified."""

    step: Step
    source: Annotated[CheckpointRef | None, "the checkpoint: its attempt and directory; null for snapshots in memory"]
    committed_at: Annotated[float | None, "when it was committed, in seconds since the epoch"]
    rejected: Annotated[tuple[Rejection, ...], "newer checkpoints that are damaged"] = ()
    passed_over: Annotated[tuple[CheckpointRef, ...], "newer checkpoints from which two starts failed"] = ()
    memory: Annotated[MemorySource | None, "the snapshots in memory that were restored"] = None


class SnapshotsUnusedEvent(Event, kind="snapshots-unused"):
    """Snapshots in memory could not be restored, so that an older one, or a checkpoint, is."""

    reasons: Annotated[tuple[str, ...], "why, by step"] = ()


class SnapshotsOffEvent(Event, kind="snapshots-off"):
    """No snapshots are taken in memory by this attempt, or no more of them."""

    reason: Message = ""


class SnapshotIntervalEvent(Event, kind="snapshot-interval"):
    """The interval of snapshots in memory was computed from their cost."""

    steps: Annotated[int, "steps from one to the next"]
    blocked_s: Annotated[float, "seconds that training waited for the newest one between two steps"] = 0.0
    fenced_s: Annotated[float, "seconds that it waited within a step"] = 0.0
    processor_s: Annotated[float, "seconds of a processor meanwhile"] = 0.0
    num_bytes: Annotated[int, "bytes of rank 0's snapshot"] = 0


class RegroupedEvent(Event, kind="regrouped"):
    """The attempt continues what the one before it held in memory, after a process of that one was lost."""

    step: Step
    attempt: Annotated[str | None, "name of the attempt before"] = None
    lost: Annotated[tuple[str, ...], "the processes that were lost"] = ()
    ranks: Annotated[tuple[int, ...], "their ranks in the attempt before"] = ()
    source: Annotated[int, "the rank whose state the others took"] = 0
    world_size: Annotated[int | None, "number of workers"] = None
    noticed_at: Annotated[float | None, "when the loss was noticed, in seconds since the epoch"] = None
    marks: Annotated[Mapping[str, float], "phases and when each was done, in seconds since the epoch"]


class NoCheckpointEvent(Event, kind="no-checkpoint"):
    """The run has commits, and no checkpoint is whole."""

    rejected: Annotated[tuple[Rejection, ...], "all checkpoints"] = ()


class ChangedEvent(Event, kind="changed"):
    """Something that may change between attempts differs from what the resume point was made with."""

    what: Annotated[str, "`world_size`, `parallel`, `versions`, `device` or `processor` (of rank 0)"]
    before: Annotated[Any, "value at the resume point"]
    now: Annotated[Any, "value of this attempt"]
    same_bits: Annotated[bool, "whether results stay bitwise equal"] = False


class PlanEvent(Event, kind="plan"):
    """The step loop is about to start."""

    num_steps: Annotated[int | None, "steps of the whole run"]
    batch: Annotated[int | None, "samples of a step, over all ranks"]
    world_size: Annotated[int | None, "number of workers"]
    step: Step = 0


class UnderWayEvent(Event, kind="under-way"):
    """The first step of the attempt is done."""

    step: Step = 0
    marks: Annotated[Mapping[str, float], "startup phases and when each was reached, in seconds since the epoch"]


class StepEvent(Event, kind="step"):
    """A step is done. Written while the next one runs, when its loss has been summed over the ranks."""

    step: Step
    loss: Annotated[float | None, "mean over the step's targets; null where it is not finite"]
    lr: Annotated[float | None, "learning rate"]
    grad_norm: Annotated[float | None, "norm of the gradient before clipping; null for a step that was left out"]
    count: Annotated[int, "targets, over all ranks"] = 0
    tokens: Annotated[int | None, "tokens that the model read, over all ranks"] = None
    seconds: Seconds = 0.0
    ended_at: Annotated[float | None, "when it ended by rank 0's clock, in seconds since the epoch"] = None

    @property
    def num_tokens(self) -> int:
        """Tokens, or targets where tokens are not counted."""
        return self.count if self.tokens is None else self.tokens


class StepSkippedEvent(Event, kind="step-skipped"):
    """A step changed no weights, because gradients overflowed under the loss scale."""

    step: Step
    reason: Message = ""
    scale: Annotated[float | None, "the loss scale after it"]


class NonFiniteEvent(Event, kind="non-finite"):
    """The loss or the gradient of a step is not finite."""

    step: Step
    action: Annotated[str, "`stop`, `skip` or `roll-back`"] = ""
    message: Message = ""


class LeftOutEvent(Event, kind="left-out"):
    """A step is left out by this and all later attempts, because its loss or gradient is not finite."""

    step: Step
    message: Message = ""


class EvalEvent(Event, kind="eval"):
    """An evaluation is done. Its scores are keys beside the others: `eval_loss`, `eval_accuracy`, …"""

    step: Step
    scores: Annotated[Mapping[str, float], "`eval_loss` and the scores of the task, one key each"]
    seconds: Seconds = 0.0

    def to_json(self) -> dict[str, Any]:
        body = super().to_json()
        scores: dict[str, Any] = body.pop("scores")
        return body | scores

    @classmethod
    def fields_of(cls, body: Mapping[str, Any]) -> Mapping[str, Any]:
        numbers = {name: value for name, value in body.items() if type(value) in (int, float)}
        return {**body, "scores": {name: value for name, value in numbers.items() if name.startswith("eval_")}}


class EarlyStopEvent(Event, kind="early-stop"):
    """Training ends before its last step, because evaluations no longer improve."""

    step: Step
    reason: Message = ""
    best: Annotated[float | None, "best value of the metric"]
    best_step: Step = 0


class SaveRequestedEvent(Event, kind="save-requested"):
    """A save after this step was requested from outside the step loop, as before a resize or a preemption."""

    step: Step
    reason: Message = ""


class SaveSkippedEvent(Event, kind="save-skipped"):
    """A save was due, and the one before it had not ended."""

    step: Step
    in_flight: Annotated[int | None, "step of the save that had not ended"]


class CommitEvent(Event, kind="commit"):
    """A checkpoint is acknowledged: its manifest is durable, and no later attempt had claimed the run by then."""

    step: Step
    digest: Annotated[str, "XXH3-128 of the manifest"] = ""
    num_bytes: Annotated[int, "bytes of all files"] = 0
    seconds: Annotated[float | None, "seconds from the start of the save; absent in the stream `commits`"] = None


class SaveEvent(Event, kind="save"):
    """What a committed save cost."""

    step: Step
    blocked_s: Annotated[float, "seconds that training waited"]
    fenced_s: Annotated[float, "seconds of these that lie within the next step"] = 0.0
    commit_s: Annotated[float, "seconds from the start of the save to its commit"]


class SaveFailedEvent(Event, kind="save-failed"):
    """A save failed."""

    step: Step
    error: Message = ""


class UnsavedEvent(Event, kind="unsaved"):
    """Training goes on after this step although a save failed (`failure.on_save_error: go-on`)."""

    step: Step
    error: Message = ""
    newest: Annotated[int | None, "step of the newest checkpoint"] = None
    unsaved_s: Annotated[float, "seconds since the attempt's newest commit, or since it began"] = 0.0
    limit_s: Annotated[float | None, "seconds after which a failed save ends the attempt; null: no limit"] = None


class IntervalEvent(Event, kind="interval"):
    """`checkpoint.every: auto` has computed another interval."""

    seconds: Annotated[float, "the interval in seconds"]
    blocked_s: Annotated[float, "seconds that training waits for a save"]
    commit_s: Annotated[float, "seconds from the start of a save to its commit"]
    restart_s: Annotated[float, "seconds that a restart takes"]
    between_failures_s: Annotated[float, "mean seconds between two interruptions"]


class DeletingEvent(Event, kind="deleting"):
    """Checkpoints are about to be deleted, unless one is pinned. Stream `commits`."""

    checkpoints: Annotated[tuple[str, ...], "`step@attempt`"] = ()


class SparedEvent(Event, kind="spared"):
    """Checkpoints of a `deleting` event that are kept. Stream `commits`."""

    checkpoints: Annotated[tuple[str, ...], "`step@attempt`"] = ()


class DeleteEvent(Event, kind="delete"):
    """A checkpoint is about to be deleted, manifest first."""

    step: Step
    attempt: Attempt


class DeleteFailedEvent(Event, kind="delete-failed"):
    """A deletion failed; it is tried again after the next commit."""

    doomed: Annotated[tuple[str, ...], "checkpoints still to be deleted: attempt and directory"] = ()
    error: Message = ""


class UploadsAbortedEvent(Event, kind="uploads-aborted"):
    """Multipart uploads of earlier attempts were aborted."""

    count: Annotated[int, "how many"] = 0


class UploadsNotAbortedEvent(Event, kind="uploads-not-aborted"):
    """Multipart uploads of earlier attempts could not be aborted."""

    error: Message = ""


class TrackerEvent(Event, kind="tracker"):
    """A tracker failed, or lacks values."""

    name: Annotated[str, "the tracker"] = ""
    message: Message = ""


@dataclass(frozen=True)
class SlowRank:
    """A rank that is slower than the others."""

    rank: Annotated[int, "the rank"]
    host: Annotated[str, "its host"] = ""
    times: Annotated[float, "its time for a micro-batch, divided by the median of the others"] = 1.0


class SlowEvent(Event, kind="slow"):
    """The set of slow ranks has changed."""

    ranks: Annotated[tuple[SlowRank, ...], "all that are slow now"] = ()


class HangEvent(Event, kind="hang"):
    """A rank ends, because the group makes no progress. Each rank writes one."""

    rank: Annotated[int | None, "the rank that writes"]
    missing: Annotated[tuple[int, ...], "ranks that the others wait for"] = ()
    step: Step = 0
    phase: Annotated[str, "what the rank is at"] = ""
    threads: Annotated[Mapping[str, tuple[str, ...]] | None, "stack of each thread, outermost call first"]


class ModelRejectedEvent(Event, kind="rejected"):
    """A checkpoint is damaged and is not published as the model."""

    checkpoint: Annotated[str, "its attempt and directory"] = ""
    reasons: Annotated[tuple[str, ...], "what is wrong with it"] = ()


class AttemptErrorEvent(Event, kind="failed"):
    """Rank 0 ends with an error."""

    step: Annotated[int | None, "number of the step that failed"]
    error: Message = ""
    final: Annotated[bool, "whether the same settings would fail again"] = False


class SupersededEvent(Event, kind="superseded"):
    """The attempt ends, because a later one has claimed the run. The commit of this step is not acknowledged."""

    step: Step = 0
    by: Annotated[str, "name of the later attempt"] = ""


class StopEvent(Event, kind="stop"):
    """The attempt ends on request, with this step committed."""

    step: Step = 0


class DoneEvent(Event, kind="done"):
    """The run is done, and its model is published."""

    step: Step = 0
    model: Annotated[str, "the checkpoint that was published: its attempt and directory"] = ""


FinalEvent = DoneEvent | StopEvent | SupersededEvent


# -- a launch ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """The last step that was reported live; the journal of a killed rank 0 may lack it."""

    step: Step
    ended_at: Time


class GroupFailureEvent(Event, kind="failure"):
    """A worker was lost, or its group ended, by a failure or a preemption. The last four fields are live only."""

    attempt: Annotated[str, "name of the attempt, or `unclaimed`"] = "unclaimed"
    noticed_at: Annotated[float | None, "when it was noticed, in seconds since the epoch"] = None
    cause: Annotated[str, "`preempted`, `node lost`, `worker died`, `hang`, `error`, `stalled`, …"]
    rank: Annotated[int | None, "the first rank that shows the cause"]
    message: Message = ""
    where: Annotated[str | None, "which ranks, and the path of the log"] = None
    raised: Annotated[str | None, "what code raised, and after which step"] = None
    reached: Annotated[Reached | None, "the last step that was reported live"] = None
    in_place: Annotated[bool | None, "whether the other workers went on in memory"] = None
    number: Annotated[int | None, "failures (or preemptions) since the last progress"] = None
    limit: Annotated[int | None, "how many of them are allowed; -1 for any number"] = None
    ends: Annotated[bool | None, "whether the run is given up"] = None
    excerpt: Annotated[str | None, "the last lines of the traceback that are the user's code"] = None


class ResizeEvent(Event, kind="resize"):
    """A worker group was started with another number of workers than the one before it."""

    before: Annotated[int, "workers before"] = 0
    now: Annotated[int, "workers now"] = 0
    planned: Annotated[bool, "whether the group before was ended for it"] = False
    attempt: Annotated[str | None, "name of the attempt before"]


class NoRoomEvent(Event, kind="no-room"):
    """The cluster has no room for the worker group."""

    since: Annotated[float | None, "seconds since the epoch; absent in the live message"] = None


# -- live messages of the driver, which are not in any journal ---------------------------------------------------------


class PhaseEvent(Event, kind="phase"):
    """The driver begins a phase of the launch. Not journaled."""

    name: Annotated[str, "`data`, `dry_step`, `ray` or `attached`"]
    launch: Annotated[str | None, "name of the launch"] = None
    num_steps: Annotated[int | None, "steps of the whole run"] = None
    num_samples: Annotated[int | None, "samples of an epoch"] = None


class NoteEvent(Event, kind="note"):
    """A message for people. Not journaled."""

    text: Message = ""


class ActiveLaunchEvent(Event, kind="rival"):
    """Another launch of the run is active, so this one ends. Not journaled."""

    launch: Annotated[str, "name of the other launch"] = ""


class DamagedModelEvent(Event, kind="damaged-model"):
    """The finished model is damaged and is made again. Not journaled."""

    model: Annotated[str, "its directory"] = ""
    faults: Annotated[tuple[str, ...], "what is wrong with it"] = ()


class StoppingEvent(Event, kind="stopping"):
    """The driver received a stop request. Not journaled."""


def parse_event(body: Mapping[str, Any]) -> Event:
    """The event that a JSON object stands for. Never raises; see the head of this module."""
    kind, t = body.get("event"), body.get("t")
    known = KINDS.get(kind) if isinstance(kind, str) else None
    if known is not None:
        with suppress(TypeError, ValueError):
            return from_json(known, known.fields_of(body))
    return UnknownEvent(t=t if isinstance(t, float) else 0.0, name=str(kind), body=body)
