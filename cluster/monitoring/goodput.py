"""Goodput: assigns every second of wall time, from a run's first launch to its end, to exactly one category.

The rules, which use nothing but the journals:

- An attempt owns the time from its claim to the next attempt's claim. What a superseded attempt does later is ignored.
  A driver that takes over stops the previous one only when its own attempt claims, so each second counts once.
- The time up to the first step of the first attempt is startup. In a later attempt, the time up to the first step is
  restore (without a checkpoint: restart). Then it is training, except for evaluations and for the gaps that saves left
  between steps. Steps that an earlier attempt had completed are redo; they counted the first time.
- If the next attempt continued it in memory, the time from its last known step to that one's first step is regrouping.
  A part of a step that was dropped is within it; the step itself counts, where it is done.
- Else the time from the last known step to the moment when the end was noticed is detection. A killed rank 0 loses up
  to five seconds of its journal; the coordinator remembers its last step. If the coordinator was lost too, these
  seconds are detection, and the steps count when they are repeated.
- If the driver was gone too, the time until the next launch is waiting. So is the time in which the cluster had no room
  for the worker group.
- If the driver had ended in order (stopped on request, or done), the time until the next launch is idle, and goodput
  leaves it out: the run was not meant to train then.
- Hosts' clocks differ. The cursor only moves forward, and what is before it is cut off, so no category is ever negative
  and the sum is the wall time.

The first launch counts from its beginning, before data preparation. A run that is stopped or lost counts until its last
heartbeat or event, so that its goodput does not fall while it is meant to stand still.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from math import inf

from outlast.checkpointing.run_store.attempt_history import ORDERLY_EXITS, REGROUPED, AttemptEnd
from outlast.checkpointing.run_store.events import ResumeEvent
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_records import AttemptTimeline


class TimeCategory(Enum):
    """What a second was spent on: the name in files, and a description for users."""

    TRAIN = "train", "steps that count"
    EVALUATE = "evaluate", "evaluations"
    SAVE = "save_stall", "training waited for a save, or for the finished model to be written"
    DETECT = "detect", "from the last completed step until the failure was detected"
    STARTUP = "startup", "the first start, up to the first step: data, Ray, processes, imports, groups, model"
    REGROUP = "regroup", "from the last completed step to the next one, where training went on in memory after a loss"
    RESTART = "restart", "later starts of launches and worker groups, up to the claim"
    RESTORE = "restore", "from the claim to the first step: loading model, data and checkpoint"
    REDO = "redo", "steps repeated because the checkpoint was older"
    WAIT = "wait", "no active launch after an unexpected end, no room in the cluster, or the driver was ending"
    IDLE = "idle", "no active launch after a requested stop or the end; goodput leaves it out"

    label: str
    description: str

    def __new__(cls, name: str, description: str) -> TimeCategory:
        member = object.__new__(cls)
        member._value_, member.label, member.description = name, name.replace("_", " "), description
        return member


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A span of time in one category, in seconds since the epoch."""

    begin: float
    end: float
    category: TimeCategory


@dataclass(frozen=True, slots=True)
class GoodputReport:
    """A run's wall time as consecutive spans without gaps."""

    spans: tuple[TimeSpan, ...] = ()

    @property
    def wall_s(self) -> float:
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

    @property
    def seconds(self) -> Mapping[TimeCategory, float]:
        """Seconds by category; their sum is the wall time."""
        totals = dict.fromkeys(TimeCategory, 0.0)
        for span in self.spans:
            totals[span.category] += span.end - span.begin
        return totals

    @property
    def goodput(self) -> float | None:
        """The share of wall time, idle time left out, spent on steps that count; None if there is no time yet."""
        seconds = self.seconds
        active_s = self.wall_s - seconds[TimeCategory.IDLE]
        return seconds[TimeCategory.TRAIN] / active_s if active_s > 0 else None


@dataclass(frozen=True, slots=True)
class _LaunchInterval:
    """An interval in which a launch was active (restart), waited for resources (wait), or had ended in order (idle)."""

    begin: float
    end: float
    launch: str
    category: TimeCategory


class _GoodputBuilder:
    """Appends spans at a cursor that never moves backwards."""

    def __init__(self, intervals: Iterable[_LaunchInterval], begin: float, end: float) -> None:
        self.cursor, self._end = begin, end
        self.spans: list[TimeSpan] = []
        #: The category of a launch that starts workers: startup until the first attempt has claimed the run.
        self.starting = TimeCategory.STARTUP
        #: Launches that start no more groups, though they may take a while to end.
        self.finished = set[str]()
        self._ahead = deque(sorted(intervals, key=lambda item: item.begin))
        self._overlapping: list[_LaunchInterval] = []

    def fill(self, until: float, category: TimeCategory) -> None:
        """Assign the time from the cursor up to `until`."""
        until = min(until, self._end)
        if until <= self.cursor:
            return
        if self.spans and self.spans[-1].category is category:
            self.spans[-1] = TimeSpan(self.spans[-1].begin, until, category)
        else:
            self.spans.append(TimeSpan(self.cursor, until, category))
        self.cursor = until

    def fill_unowned(self, until: float) -> None:
        """Assign time that no attempt owns: restart while a launch is active and has room, else wait or idle."""
        while self._ahead and self._ahead[0].begin < until:
            self._overlapping.append(self._ahead.popleft())
        self._overlapping = [item for item in self._overlapping if item.end > self.cursor]
        active = TimeCategory.RESTART
        found = [item for item in self._overlapping if item.category is not active or item.launch not in self.finished]
        cuts = sorted({at for item in found for at in (item.begin, item.end) if self.cursor < at < until})
        for at in [*cuts, until]:
            here = {item.category for item in found if item.begin <= self.cursor < item.end}
            if TimeCategory.WAIT in here or not here:
                self.fill(at, TimeCategory.WAIT)
            else:
                self.fill(at, self.starting if active in here else TimeCategory.IDLE)


def account_time(timeline: Timeline, now: float) -> GoodputReport:
    """Assign a run's time up to its end, or up to `now` (seconds since the epoch) if it is running.

    The report of a custom loop is empty, because such a loop records neither launches nor steps.
    """
    attempts, newest = timeline.claimed_attempts, timeline.newest_launch(now)
    begins = [at for launch in timeline.launches.values() if (at := launch.began_at) is not None]
    begin = min([*begins, *(attempt.claimed_at for attempt in attempts)], default=None)
    if begin is None or (newest is None and not any(attempt.steps for attempt in attempts)):
        return GoodputReport()
    if newest is not None and newest.has_ended:
        run_end = float(newest.alive["t"])
    else:
        run_end = now if newest is not None and newest.is_live(now) else timeline.last_seen_at(now)
    intervals = [*_active_intervals(timeline, now), *_no_room_intervals(timeline), *_idle_intervals(timeline)]
    builder = _GoodputBuilder(intervals, begin, run_end)
    last_step, ends, is_live = 0, timeline.ends, timeline.state(now).is_live
    for attempt, successor in timeline.attempt_pairs:
        builder.fill_unowned(attempt.claimed_at)
        limit, end = successor.claimed_at if successor else inf, ends[attempt.id]
        _fill_owned(builder, attempt, end, limit, last_step, now if is_live else None)
        builder.starting = TimeCategory.RESTART
        last_step = max(last_step, attempt.last_step_by(limit))
        (builder.finished.discard if end.has_successor else builder.finished.add)(attempt.launch)
    builder.fill_unowned(inf)
    return GoodputReport(tuple(builder.spans))


def _active_intervals(timeline: Timeline, now: float) -> Iterator[_LaunchInterval]:
    for launch in timeline.launches.values():
        if launch.began_at is not None and launch.alive:
            end = inf if launch.is_live(now) else float(launch.alive["t"])
            yield _LaunchInterval(launch.began_at, end, launch.id, TimeCategory.RESTART)


def _no_room_intervals(timeline: Timeline) -> Iterator[_LaunchInterval]:
    """Yield the waits for resources: each ends when the next group's actors start, at the latest when it claims."""
    attempts: dict[str, list[AttemptTimeline]] = {}
    for item in timeline.claimed_attempts:
        attempts.setdefault(item.launch, []).append(item)
    for launch in timeline.launches.values():
        own = attempts.get(launch.id, [])
        latest_claims = list(accumulate((item.claimed_at for item in own), max))
        for since in launch.no_room:
            index = bisect_right(latest_claims, since)
            end = own[index].startup_timings.get("actor", own[index].claimed_at) if index < len(own) else inf
            yield _LaunchInterval(since, max(since, end), launch.id, TimeCategory.WAIT)


def _idle_intervals(timeline: Timeline) -> Iterator[_LaunchInterval]:
    """Yield the time between each launch that ended in order and the next one, unless another one had begun before."""
    began = sorted(at for launch in timeline.launches.values() if (at := launch.began_at) is not None)
    for launch in timeline.launches.values():
        if launch.began_at is not None and launch.has_ended and launch.alive.get("exit_code") in ORDERLY_EXITS:
            ended, index = float(launch.alive["t"]), bisect_right(began, launch.began_at)
            following = began[index] if index < len(began) else inf
            if following > ended:
                yield _LaunchInterval(ended, following, launch.id, TimeCategory.IDLE)


def _fill_owned(
    builder: _GoodputBuilder, attempt: AttemptTimeline, end: AttemptEnd, limit: float, reached: int, now: float | None
) -> None:
    """Assign the time that an attempt owns, up to its successor's claim at `limit`.

    Earlier attempts completed the steps up to `reached`. `now` is None unless the run is running.
    """
    steps = attempt.steps
    starting = TimeCategory.RESTORE if isinstance(attempt.start, ResumeEvent) else builder.starting
    starting = TimeCategory.REGROUP if attempt.regrouped_from else starting
    redo_end = _redo_end(attempt, reached)

    def fill(until: float) -> None:
        until = min(until, limit)
        if steps:
            builder.fill(min(until, steps.began_at(0)), starting)
            builder.fill(min(until, redo_end), TimeCategory.REDO)
            builder.fill(until, TimeCategory.TRAIN)
        else:
            builder.fill(until, starting)

    pauses = [(item.t - item.seconds, item.t, TimeCategory.EVALUATE) for item in attempt.evaluations]
    for begin, until, category in sorted([*pauses, *_save_pauses(attempt)], key=lambda pause: pause[0]):
        fill(begin)
        builder.fill(min(until, limit), category)
    last_step_at = attempt.last_step_at
    fill(attempt.last_seen_at if last_step_at is None else last_step_at)
    if end.cause == REGROUPED:
        builder.fill(limit, TimeCategory.REGROUP)
    elif attempt.final is not None:
        builder.fill(min(attempt.final.t, limit), TimeCategory.SAVE if steps else starting)
    elif end.at is not None:
        builder.fill(min(end.at, limit), TimeCategory.DETECT)
    elif end.is_planned and end.has_successor and (save := attempt.saves.get(attempt.last_step)):
        builder.fill(min(save.committed_at or 0.0, limit), TimeCategory.SAVE)
    elif not end.is_over and now is not None:
        fill(now)


def _redo_end(attempt: AttemptTimeline, reached: int) -> float:
    """Return when an attempt had repeated all steps of earlier ones; 0 if it repeated none."""
    steps = attempt.steps
    if not steps or steps.step[0] > reached:
        return 0.0
    index = steps.index_of(reached)
    return inf if index is None else steps.ended_at[index]


def _save_pauses(attempt: AttemptTimeline) -> Iterator[tuple[float, float, TimeCategory]]:
    """Yield the gaps after saved steps, and the parts of the next steps that waited for a copy."""
    steps = attempt.steps
    evaluated = {item.step: item.t for item in attempt.evaluations}
    for save in attempt.saves.values():
        index = steps.index_of(save.step)
        if index is None or index + 1 == len(steps):
            continue  # after the last step, the end of the attempt decides
        begin = max(steps.ended_at[index], evaluated.get(save.step, 0.0))
        yield begin, max(begin, steps.began_at(index + 1)), TimeCategory.SAVE
        if save.fenced_s:
            yield steps.ended_at[index + 1] - save.fenced_s, steps.ended_at[index + 1], TimeCategory.SAVE
