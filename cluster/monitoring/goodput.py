"""Where a run's time went: every second of wall time from its first launch to its end in exactly one category.

The time line is cut by what the journals tell, and by nothing else:

- An attempt owns the time from its claim to the next attempt's. A zombie that goes on after that is not listened to;
  a driver that takes over does not stop the one before until its own attempt claims, so both count once.
- Within an attempt, up to the first step it restores (or, without a checkpoint, still starts). From then on it trains,
  but for evaluations and for the gaps that its saves left between steps. Steps that some earlier attempt had made
  already are done again; the first time they counted.
- What follows the last step that is known to be done, up to the moment when somebody noticed the end, is detection. A
  rank 0 that was killed takes up to five seconds of its journal along; the hub remembers its last step, and where the
  hub was lost too these seconds count as detection, and the steps count when they are made for the second time.
- Where nobody was there to notice (the driver is gone as well, or has ended on purpose), the time until the next launch
  is waiting. So is the time for which the cluster had no room for the group.
- Hosts' clocks differ. The cursor only moves forward: what would lie before it is cut off, so that no category is ever
  negative and the sum is the wall time, whatever the clocks say.

The first launch counts from its beginning, before it has prepared the data; one that is stopped or lost counts to its
last sign of life, so that a run's goodput does not sink while nobody wants it to run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from math import inf

from outlast.checkpointing.run_store.attempt_history import AttemptEnd
from outlast.checkpointing.run_store.events import ResumeEvent
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_records import AttemptTimeline


class TimeCategory(Enum):
    """What a second was spent on."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    SAVE = "save_stall"
    DETECT = "detect"
    RESTART = "restart"
    RESTORE = "restore"
    REDO = "redo"
    WAIT = "wait"

    @property
    def words(self) -> str:
        return self.value.replace("_", " ")

    @property
    def meaning(self) -> str:
        return {
            TimeCategory.TRAIN: "steps that count",
            TimeCategory.EVALUATE: "evaluations",
            TimeCategory.SAVE: "training waited for a save, or for the finished model to be written",
            TimeCategory.DETECT: "from the last step done to the moment when the end was noticed",
            TimeCategory.RESTART: "launch, data, Ray, processes, imports, groups; the first start too",
            TimeCategory.RESTORE: "from the claim to the first step: model, data, checkpoint",
            TimeCategory.REDO: "steps done again, because the checkpoint was older",
            TimeCategory.WAIT: "nobody was at work on it, or the cluster had no room",
        }[self]


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A stretch of time of one kind, in seconds since the epoch."""

    begin: float
    end: float
    kind: TimeCategory


@dataclass(frozen=True, slots=True)
class GoodputReport:
    """The whole account.

    Attributes:
        spans: One after the other, without gaps.
    """

    spans: tuple[TimeSpan, ...] = ()

    @property
    def wall_s(self) -> float:
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

    @property
    def seconds(self) -> Mapping[TimeCategory, float]:
        """What each kind took; all of them together are the wall time."""
        found = dict.fromkeys(TimeCategory, 0.0)
        for span in self.spans:
            found[span.kind] += span.end - span.begin
        return found

    @property
    def goodput(self) -> float | None:
        """The share of wall time spent on steps that count; None while there is no time."""
        return self.seconds[TimeCategory.TRAIN] / self.wall_s if self.wall_s else None


class _GoodputBuilder:
    """Writes spans one after the other, and never backwards."""

    def __init__(self, begin: float, end: float) -> None:
        self.cursor, self._end = begin, end
        self.spans: list[TimeSpan] = []

    def put(self, until: float, kind: TimeCategory) -> None:
        """All up to `until` is of this kind, as far as it is not written yet."""
        until = min(until, self._end)
        if until <= self.cursor:
            return
        if self.spans and self.spans[-1].kind is kind:
            self.spans[-1] = TimeSpan(self.spans[-1].begin, until, kind)
        else:
            self.spans.append(TimeSpan(self.cursor, until, kind))
        self.cursor = until


def account_time(story: Timeline, now: float) -> GoodputReport:
    """Where the time of a run went, up to `now` (seconds since the epoch) if it is at work.

    A loop of one's own tells neither launches nor steps; then there is no account.
    """
    begins = [at for launch in story.launches.values() if (at := launch.began_at) is not None]
    begin = min([*begins, *(attempt.claimed_at for attempt in story.in_order)], default=None)
    if begin is None or (story.newest_launch(now) is None and not any(item.steps for item in story.in_order)):
        return GoodputReport()
    book = _GoodputBuilder(begin, _end_of(story, now))
    places, reached, ends, is_live = _LaunchIntervals(story, now), 0, story.ends, story.state(now).is_live
    for attempt, following in story.in_pairs:
        _idle(book, places, attempt.claimed_at)
        limit, end = following.claimed_at if following else inf, ends[attempt.id]
        _own(book, attempt, end, limit, reached, now if is_live else None)
        reached = max(reached, attempt.last_step_by(limit))
        (places.left.discard if end.has_successor else places.left.add)(attempt.launch)
    _idle(book, places, inf)
    return GoodputReport(tuple(book.spans))


def _end_of(story: Timeline, now: float) -> float:
    """When the run ended; now, if it is at work; else its last sign of life."""
    launch = story.newest_launch(now)
    if launch is not None and launch.has_ended:
        return float(launch.alive["t"])
    return now if launch is not None and launch.is_live(now) else story.heard_at(now)


@dataclass(frozen=True, slots=True)
class _LaunchInterval:
    """A stretch of time in which a launch was there or, if `is_full`, had no room for its group."""

    begin: float
    end: float
    launch: str
    is_full: bool


class _LaunchIntervals:
    """Those that reach into a stretch of time, asked for from the first stretch to the last: each is sorted in once.

    Attributes:
        left: Launches that start no more groups, though they may take a while to end.
    """

    def __init__(self, story: Timeline, now: float) -> None:
        found = sorted([*_open(story, now), *_full(story)], key=lambda place: place.begin)
        self._ahead, self._here = deque(found), list[_LaunchInterval]()
        self.left = set[str]()

    def within(self, begin: float, end: float) -> list[_LaunchInterval]:
        while self._ahead and self._ahead[0].begin < end:
            self._here.append(self._ahead.popleft())
        self._here = [place for place in self._here if place.end > begin]
        return [place for place in self._here if place.is_full or place.launch not in self.left]


def _idle(book: _GoodputBuilder, places: _LaunchIntervals, until: float) -> None:
    """Time up to `until` in which no attempt owns the run: somebody starts it, or nobody does."""
    found = places.within(book.cursor, until)
    cuts = sorted({at for place in found for at in (place.begin, place.end) if book.cursor < at < until})
    for at in [*cuts, until]:
        middle = book.cursor
        kinds = {place.is_full for place in found if place.begin <= middle < place.end}
        book.put(at, TimeCategory.RESTART if kinds == {False} else TimeCategory.WAIT)


def _open(story: Timeline, now: float) -> Iterator[_LaunchInterval]:
    """From when to when each launch was there."""
    for launch in story.launches.values():
        if launch.began_at is not None and launch.alive:
            end = inf if launch.is_live(now) else float(launch.alive["t"])
            yield _LaunchInterval(launch.began_at, end, launch.id, is_full=False)


def _full(story: Timeline) -> Iterator[_LaunchInterval]:
    """Until when there was no room for a group: its workers began to be, or at the latest it claimed."""
    attempts: dict[str, list[AttemptTimeline]] = {}
    for item in story.in_order:
        attempts.setdefault(item.launch, []).append(item)
    for launch in story.launches.values():
        mine = attempts.get(launch.id, [])
        latest = list(accumulate((item.claimed_at for item in mine), max))
        for since in launch.no_room:
            index = bisect_right(latest, since)
            end = mine[index].marks.get("actor", mine[index].claimed_at) if index < len(mine) else inf
            yield _LaunchInterval(since, max(since, end), launch.id, is_full=True)


def _own(
    book: _GoodputBuilder, attempt: AttemptTimeline, end: AttemptEnd, limit: float, reached: int, now: float | None
) -> None:
    """An attempt's own time, up to `limit`.

    Args:
        book: Where to write.
        attempt: The attempt.
        end: How it ended.
        limit: When the next one claimed.
        reached: The last step that an earlier one had made.
        now: Seconds since the epoch; None if the run is not at work.
    """
    steps = attempt.steps
    resumes = isinstance(attempt.start, ResumeEvent)
    starting = TimeCategory.RESTORE if resumes else TimeCategory.RESTART
    redone = _redone_until(attempt, reached)

    def fill(until: float) -> None:
        until = min(until, limit)
        if steps:
            book.put(min(until, steps.began_at(0)), starting)
            book.put(min(until, redone), TimeCategory.REDO)
            book.put(until, TimeCategory.TRAIN)
        else:
            book.put(until, starting)

    for begin, until, kind in _pauses(attempt):
        fill(begin)
        book.put(min(until, limit), kind)
    known = attempt.last_step_at
    fill(attempt.heard_at if known is None else known)
    if attempt.final is not None:
        book.put(min(attempt.final.t, limit), TimeCategory.SAVE if steps else starting)
    elif end.at is not None:
        book.put(min(end.at, limit), TimeCategory.DETECT)
    elif end.is_planned and end.has_successor and (save := attempt.saves.get(attempt.last_step)):
        book.put(min(save.committed_at or 0.0, limit), TimeCategory.SAVE)
    elif not end.is_over and now is not None:
        fill(now)


def _redone_until(attempt: AttemptTimeline, reached: int) -> float:
    """Until when an attempt makes steps that an earlier one had made."""
    steps = attempt.steps
    if not steps or steps.number[0] > reached:
        return 0.0
    index = steps.find(reached)
    return inf if index is None else steps.ended_at[index]


def _pauses(attempt: AttemptTimeline) -> list[tuple[float, float, TimeCategory]]:
    """Evaluations, and the gaps after steps that were saved, in order."""
    return sorted([*_evaluations(attempt), *_saves(attempt)], key=lambda pause: pause[0])


def _evaluations(attempt: AttemptTimeline) -> Iterator[tuple[float, float, TimeCategory]]:
    for found in attempt.evaluations:
        yield found.began_at, found.ended_at, TimeCategory.EVALUATE


def _saves(attempt: AttemptTimeline) -> Iterator[tuple[float, float, TimeCategory]]:
    steps = attempt.steps
    evaluated = {found.step: found.ended_at for found in attempt.evaluations}
    for save in attempt.saves.values():
        index = steps.find(save.step)
        if index is None:
            continue
        begin = max(steps.ended_at[index], evaluated.get(save.step, 0.0))
        if index + 1 == len(steps):
            continue  # nothing follows: it is told by what ends the attempt
        following = steps.began_at(index + 1)
        yield begin, max(begin, following), TimeCategory.SAVE
        if save.fenced_s:
            yield steps.ended_at[index + 1] - save.fenced_s, steps.ended_at[index + 1], TimeCategory.SAVE
