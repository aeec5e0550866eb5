"""A run's state at one moment: a summary for the live panel and the report, and plain values for `status --json`.

It is read from the run's storage, so it needs no cluster.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.run_store.attempt_history import REGROUPED
from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.events import GroupFailureEvent, ResizeEvent, SlowRank, UnsavedEvent
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.tools.query import list_checkpoints, load_catalog
from outlast.cluster.formatting import finite
from outlast.cluster.monitoring.goodput import GoodputReport, account_time
from outlast.cluster.monitoring.regroupings import Regrouping, regroupings
from outlast.cluster.monitoring.timeline import State, Timeline, TimelineReader
from outlast.cluster.monitoring.timeline_records import AttemptTimeline, SaveRecord, StepSeries

#: Speed and time left are computed from so many of the newest steps.
SPEED_WINDOW = 64
#: More points than a sparkline can show.
NUM_LOSSES = 512


@dataclass(frozen=True, slots=True)
class NewestCheckpoint:
    """The newest checkpoint."""

    step: int  #: its step
    committed_at: float | None  #: None if only the step is known
    num_bytes: int  #: its size; 0 if unknown
    verified_at: float | None  #: when an attempt that resumed from it last read every byte and found it intact


@dataclass(frozen=True, slots=True)
class Interruption:
    """An end of a worker group before the run was done."""

    at: float  #: when it was noticed, else the time of the group's newest event
    attempt: str  #: the attempt that ended
    cause: str  #: a few words
    rank: int | None  #: the rank that failed, if known
    message: str  #: the error
    resumed_from: int | None  #: the step from which the next attempt started; None until it has


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """One run at one moment. Times are in seconds since the epoch; None means unknown."""

    run: str
    now: float
    state: State
    activity: str  #: the state in words, including what only the driver reports
    last_seen_at: float  #: the time of the newest heartbeat or event; 0 if there is none
    attempt: int | None  #: the number of the current attempt
    num_attempts: int
    world_size: int | None
    step: int  #: completed steps
    num_steps: int | None  #: planned steps
    loss: float | None  #: the newest finite loss
    losses: tuple[float, ...]  #: the newest finite losses by step, each from the newest attempt that made the step
    lr: float | None
    scores: Mapping[str, float]  #: scores of the newest evaluation
    tokens_per_s: float | None
    samples_per_s: float | None
    #: Wall time per step over the newest steps, pauses included; the rates are based on it.
    seconds_per_step: float | None
    left_s: float | None  #: seconds until the last step at that speed
    newest: NewestCheckpoint | None
    save: SaveRecord | None  #: the newest background save whose duration is known, else the newest save
    unsaved: UnsavedEvent | None  #: the newest save if it failed, and training goes on
    interruptions: tuple[Interruption, ...]  #: oldest first
    regroupings: tuple[Regrouping, ...]  #: losses after which training went on in memory, oldest first
    num_lost_steps: int  #: completed steps that were lost
    slow: tuple[SlowRank, ...]
    goodput: GoodputReport

    @property
    def regroup_s(self) -> float:
        """Seconds of all regroupings, each with the first step after it."""
        return sum(item.seconds or 0.0 for item in self.regroupings)

    def as_values(self) -> dict[str, Any]:
        """Return the values that `status --json` and the report share."""
        names = ("run", "step", "num_steps", "world_size", "loss", "lr", "tokens_per_s", "samples_per_s")
        values = {name: getattr(self, name) for name in (*names, "seconds_per_step", "left_s")}
        return {**values, "state": self.state.value, "scores": dict(self.scores), "goodput": self.goodput.goodput}


def take_snapshot(timeline: Timeline, now: float, activity: str = "") -> RunSnapshot:
    """Summarize a run at the moment `now` (seconds since the epoch); `activity` replaces the state's words."""
    current, attempts, state = timeline.current, timeline.claimed_attempts, timeline.state(now)
    is_restarting = state is State.RUNNING and current is not None and _is_restarting(timeline, current, now)
    pause = "regrouping" if current and timeline.ends[current.id].cause == REGROUPED else "restarting"
    steps = current.steps if current else StepSeries()
    seconds = _seconds_per_step(steps)
    plan = current.plan if current else None
    num_steps, batch = (plan.num_steps, plan.batch) if plan else (current.num_steps if current else None, None)
    step = current.last_step if current else 0
    tokens = sum(steps.tokens[-SPEED_WINDOW:]) / min(SPEED_WINDOW, len(steps)) if steps else None
    evaluations = (record for item in reversed(attempts) for record in reversed(item.evaluations))
    losses = (value for item in reversed(attempts) for value in reversed(item.steps.loss))
    saves = [
        save for item in reversed(attempts) for save in reversed(item.saves.values()) if save.blocked_s is not None
    ]
    return RunSnapshot(
        run=timeline.run,
        now=now,
        state=state,
        activity=activity or (pause if is_restarting else state.value),
        last_seen_at=timeline.last_seen_at(now),
        attempt=current.id.number if current else None,
        num_attempts=len(timeline.attempts),
        world_size=current.world_size if current else None,
        step=step,
        num_steps=num_steps,
        loss=next((value for value in losses if not isnan(value)), None),
        losses=_newest_losses(timeline),
        lr=steps.lr[-1] if steps and not isnan(steps.lr[-1]) else None,
        scores=next((record.scores for record in evaluations), {}),
        tokens_per_s=tokens / seconds if tokens and seconds else None,
        samples_per_s=batch / seconds if batch and seconds else None,
        seconds_per_step=seconds,
        left_s=(num_steps - step) * seconds if num_steps and seconds and state.is_live and not is_restarting else None,
        newest=newest_checkpoint(timeline),
        save=next((save for save in saves if save.is_background), saves[0] if saves else None),
        unsaved=current.unsaved if current and state.is_live else None,
        interruptions=tuple(interruptions(timeline)),
        regroupings=tuple(regroupings(timeline)),
        num_lost_steps=timeline.num_lost_steps,
        slow=tuple(current.slow if current and state.is_live else ()),
        goodput=account_time(timeline, now),
    )


def _is_restarting(timeline: Timeline, current: AttemptTimeline, now: float) -> bool:
    """Whether the newest group is gone, and the same launch or a newer one is starting the next."""
    launch = timeline.newest_launch(now)
    return timeline.ends[current.id].has_successor or (launch is not None and current.launch != launch.id)


def _seconds_per_step(steps: StepSeries) -> float | None:
    count = min(SPEED_WINDOW, len(steps) - 1)
    if count < 1:
        return None
    return max(0.0, steps.ended_at[-1] - steps.ended_at[-1 - count]) / count or None


def _newest_losses(timeline: Timeline) -> tuple[float, ...]:
    losses: dict[int, float] = {}
    for attempt in timeline.claimed_attempts[-8:]:
        losses |= dict(zip(attempt.steps.step[-NUM_LOSSES:], attempt.steps.loss[-NUM_LOSSES:], strict=True))
    return tuple(losses[step] for step in sorted(losses)[-NUM_LOSSES:] if not isnan(losses[step]))


def verified_checkpoints(timeline: Timeline) -> dict[CheckpointRef, float]:
    """Return the checkpoints from which attempts resumed, after reading every byte, and when."""
    attempts = timeline.claimed_attempts
    return {item.resume_point: item.start.t for item in attempts if item.resume_point is not None and item.start}


def newest_checkpoint(timeline: Timeline) -> NewestCheckpoint | None:
    """Return the newest commit of the newest attempt that has one, or the resume point of a newer attempt."""
    for attempt in reversed(timeline.claimed_attempts):
        committed = [save.step for save in attempt.saves.values() if save.committed_at is not None]
        ref = CheckpointRef(max(committed), attempt.id) if committed else attempt.resume_point
        if ref is not None:
            owner = timeline.attempts.get(ref.attempt)
            save = (owner.saves.get(ref.step) if owner else None) or SaveRecord(ref.step)
            verified_at = verified_checkpoints(timeline).get(ref)
            return NewestCheckpoint(ref.step, save.committed_at, save.num_bytes, verified_at)
    return None


def interruptions(timeline: Timeline) -> list[Interruption]:
    """Return every end of an attempt before the run was done, and every group that failed before its claim.

    Attempts that went on in memory are left out; see `regroupings`.
    """
    result, ends = [], timeline.ends
    for attempt, successor in timeline.attempt_pairs:
        end = ends[attempt.id]
        if not end.is_over or end.cause in ("done", REGROUPED):
            continue
        resumed_from = successor.start_step if successor and successor.start else None
        at = end.at or attempt.last_seen_at or attempt.claimed_at
        result.append(Interruption(at, str(attempt.id), end.cause, end.rank, end.message, resumed_from))
    claimed = {str(attempt.id) for attempt in timeline.claimed_attempts}
    for _, failure in timeline.failures:
        if failure.attempt not in claimed:
            at = failure.noticed_at or failure.t
            result.append(Interruption(at, failure.attempt, failure.cause, failure.rank, failure.message, None))
    return sorted(result, key=lambda item: item.at)


# -- plain values ------------------------------------------------------------------------------------------------------


def read_status(store: RunStore) -> dict[str, Any]:
    """Read one run's state; ConfigError if there is no such run."""
    timeline = TimelineReader(store).update()
    return as_values(store, timeline, take_snapshot(timeline, time.time()))


def as_values(store: RunStore, timeline: Timeline, summary: RunSnapshot) -> dict[str, Any]:
    """Return what `status --json` prints."""
    launch = timeline.newest_launch(summary.now)
    catalog = None if timeline.is_unclaimed else load_catalog(store)
    checkpoints = list_checkpoints(store, catalog) if catalog else []
    newest = {**checkpoints[0], "verified_at": summary.newest and summary.newest.verified_at} if checkpoints else None
    failures = timeline.failure_by_attempt
    body = {
        **summary.as_values(),
        "step": summary.step or (checkpoints[0]["step"] if checkpoints else 0),
        "attempts": summary.num_attempts,
        "failures": [{**event.to_json(), "launch": launch.id} for launch, event in timeline.failures],
        "slow": [] if timeline.current is None else [asdict(rank) for rank in timeline.current.slow],
        "sizes": [_size_change(event, failures) for item in timeline.launches_in_order for event in item.resizes],
        "launch": {"id": launch.id, **launch.alive} if launch else None,
        "newest_checkpoint": newest,
        "damaged": [str(item.ref) for item in catalog.rejected] if catalog else [],
        "unreadable": dict(store.unreadable),
        "storage": store.storage.url,
        "save": asdict(summary.save) if summary.save else None,
        "unsaved": summary.unsaved.to_json() if summary.unsaved else None,
        "interruptions": [asdict(item) for item in summary.interruptions],
        "regroupings": [asdict(item) for item in summary.regroupings],
        "num_regroupings": len(summary.regroupings),
        "regroup_s": round(summary.regroup_s, 3),
        "lost_steps": summary.num_lost_steps,
        "wall_s": round(summary.goodput.wall_s, 3),
        "ledger": {category.value: round(seconds, 3) for category, seconds in summary.goodput.seconds.items()},
    }
    return dict(finite(body))


def list_runs(storage: Storage) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read the state of every run in a storage, by name; also return the paths that cannot be read, and why."""
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for entry in storage.list(""):
        if entry.num_bytes is not None or entry.name.startswith("."):
            continue
        store = RunStore(storage, entry.name)
        try:
            if list_attempts(store) or list_launches(store):
                rows.append(read_status(store))
        except StorageError as error:
            unreadable[entry.name] = error.message
        unreadable |= store.unreadable
    return rows, unreadable


def _size_change(resize: ResizeEvent, failures: Mapping[str, GroupFailureEvent]) -> dict[str, Any]:
    """Return a change of the number of workers, with the cause of the previous attempt's end."""
    failure = failures.get(str(resize.attempt))
    cause = "resized" if resize.planned else failure.cause if failure else "unknown"
    return {"t": resize.t, "attempt": resize.attempt, "before": resize.before, "now": resize.now, "cause": cause}
