"""Regroupings of a run: the losses of processes after which training went on in memory.

They are no interruptions: no group was started again, and no step is done again. Phases are taken from the marks of
the events `regrouped` and `under-way`, and every second between the last step before a loss and the first one after it
is in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from outlast.checkpointing.run_store.events import GroupFailureEvent, RegroupedEvent
from outlast.cluster.formatting import counted, duration
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_records import AttemptTimeline

#: Marks of the event `regrouped`, in order, and the name of the phase that ends with each.
PHASES = {"noticed": "notice", "seat": "seat", "group": "group", "state": "state"}
#: The phase after the last mark, which ends with the first step or evaluation.
STEP_PHASE = "step"


@dataclass(frozen=True, slots=True)
class Regrouping:
    """One regrouping. Times are in seconds since the epoch; None means unknown, or not yet."""

    at: float  #: when the loss was noticed
    before: str  #: the attempt that ended
    attempt: str  #: the attempt that continued it
    ranks: tuple[int, ...]  #: ranks in `before` that were lost
    lost: tuple[str, ...]  #: names of the lost processes
    cause: str | None  #: why, in one to three words
    message: str | None  #: the cause in detail
    source: int | None  #: the rank whose state the others took
    step: int | None  #: the last step that was done before it
    world_size: int | None  #: workers after it
    num_redone: int  #: completed steps that were done again
    seconds: float | None  #: from the last step before the loss to the first one after it
    phases: Mapping[str, float]  #: these seconds by phase

    @property
    def who(self) -> str:
        """The lost ranks, else the lost processes; empty if none was lost."""
        if self.ranks:
            return f"rank{'' if len(self.ranks) == 1 else 's'} {', '.join(map(str, self.ranks))}"
        return ", ".join(self.lost)

    @property
    def description(self) -> str:
        """Who was lost, and why; or why the group was formed anew."""
        if not self.who:
            return f"continuing with {counted(self.world_size, 'worker')}" if self.world_size else "group formed anew"
        why = self.message or self.cause
        return f"{self.who} lost" + (f" ({' '.join(why.split())})" if why else "")

    @property
    def outcome(self) -> str:
        """How long it took, and what was done again."""
        after = "" if self.seconds is None else f" after {duration(self.seconds)}"
        redone = f"{counted(self.num_redone, 'step')} done again" if self.num_redone else "no step lost"
        return f"training went on in memory{after}, {redone}"


def regroupings(timeline: Timeline) -> Iterator[Regrouping]:
    """Yield every regrouping, oldest first."""
    failures, by_name = timeline.failure_by_attempt, {str(item.id): item for item in timeline.claimed_attempts}
    for attempt in timeline.claimed_attempts:
        before = by_name.get(attempt.regrouped_from or "")
        if before is not None:
            yield _regrouping(before, attempt, failures.get(str(before.id)))


def _regrouping(before: AttemptTimeline, attempt: AttemptTimeline, failure: GroupFailureEvent | None) -> Regrouping:
    event = attempt.start if isinstance(attempt.start, RegroupedEvent) else None
    known = event.marks if event else {}
    noticed_at = (event and event.noticed_at) or known.get("noticed") or (failure and failure.noticed_at)
    stopped_at = _last_progress_at(before, attempt.claimed_at)
    resumed_at = _first_progress_at(attempt)
    phases = _phases(stopped_at, known, resumed_at)
    return Regrouping(
        at=noticed_at or attempt.claimed_at,
        before=str(before.id),
        attempt=str(attempt.id),
        ranks=event.ranks if event else _lost_ranks(before.claim, attempt.claim),
        lost=event.lost if event else (),
        cause=failure.cause if failure else None,
        message=failure.message if failure else None,
        source=event.source if event else None,
        step=event.step if event else None,
        world_size=attempt.world_size,
        num_redone=max(0, before.last_step_by(attempt.claimed_at) - event.step) if event else 0,
        seconds=None if resumed_at is None else round(max(0.0, resumed_at - stopped_at), 4),
        phases=phases,
    )


def _last_progress_at(attempt: AttemptTimeline, limit: float) -> float:
    """Return when an attempt's last step or evaluation ended, else when it began."""
    evaluated = [item.t for item in attempt.evaluations if item.t <= limit]
    began_at = attempt.start.t if attempt.start else attempt.claimed_at
    return min(limit, max([attempt.last_step_at or began_at, *evaluated[-1:]]))


def _first_progress_at(attempt: AttemptTimeline) -> float | None:
    """Return when an attempt's first step or evaluation ended, or the whole of it; None if it is at neither."""
    first_steps = [attempt.steps.ended_at[0]] if attempt.steps else [attempt.startup_timings.get("first_step")]
    times = [*first_steps, *(item.t for item in attempt.evaluations[:1]), attempt.final.t if attempt.final else None]
    return min((at for at in times if at is not None), default=None)


def _phases(stopped_at: float, marks: Mapping[str, float], resumed_at: float | None) -> dict[str, float]:
    """Divide the time at the marks. The clocks of two hosts may differ, so no phase is negative."""
    known = [(name, marks[mark]) for mark, name in PHASES.items() if marks.get(mark)]
    ends = [("", stopped_at), *known, *([(STEP_PHASE, resumed_at)] if resumed_at is not None else [])]
    return {name: round(max(0.0, end - begin), 4) for (_, begin), (name, end) in pairwise(ends)}


def _lost_ranks(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ranks of a claim whose processes are not in the next one: the event may be lost with its rank 0."""
    alive = {(worker.get("host"), worker.get("pid")) for worker in after.get("workers", ())}
    if not alive:
        return ()
    workers = before.get("workers", ())
    ranks = [item.get("rank") for item in workers if (item.get("host"), item.get("pid")) not in alive]
    return tuple(sorted(rank for rank in ranks if type(rank) is int))
