"""Hangs and slow ranks, decided from the ranks' heartbeats. Pure: the coordinator collects the heartbeats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from outlast.checkpointing.run_store.events import SlowRank
from outlast.trainers.loop.rank_activity import StepPhase

#: A rank without a heartbeat for this long does not run.
SILENT_S = 10.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One rank's progress."""

    rank: int
    size: int  #: of the world
    host: str
    phase: StepPhase
    step: int  #: steps done
    seconds: float  #: time in the phase so far
    limit_s: float  #: the longest that the phase may take
    work_s: float | None = None  #: its time for a micro-batch, if known

    @property
    def position(self) -> tuple[int, int]:
        """Sort key: all ranks of a group pass through the same positions in the same order."""
        return (self.step, self.phase.order)


@dataclass(frozen=True, slots=True)
class Hang:
    """A group without progress: the ranks that the others wait for, and their state."""

    ranks: tuple[int, ...]
    message: str


@dataclass(slots=True)
class GroupProgress:
    """Heartbeats of the ranks of one group."""

    beats: dict[int, tuple[Heartbeat, float]] = field(default_factory=dict)  #: by rank: the last, and when it arrived
    hang: Hang | None = None
    written: set[int] = field(default_factory=set)  #: ranks whose stacks are written
    reported: bool = False  #: whether the end of the group has been explained

    def apply(self, beat: Heartbeat, now: float) -> Hang | None:
        """Add a heartbeat. A hang, once found, is kept."""
        self.beats[beat.rank] = (beat, now)
        return self.check(now)

    def check(self, now: float) -> Hang | None:
        """Return the hang of the group, if any, also when no rank sends heartbeats any more."""
        self.hang = self.hang or find_hang(self.ages(now))
        return self.hang

    def write(self, rank: int, now: float) -> bool:
        """Record that a rank's stacks are written. True once those of all running ranks are."""
        self.written.add(rank)
        return {other for other, (_, age) in self.ages(now).items() if age < SILENT_S / 2} <= self.written

    def ages(self, now: float) -> dict[int, tuple[Heartbeat, float]]:
        """Return every rank's last heartbeat and its age in seconds."""
        return {rank: (beat, now - at) for rank, (beat, at) in self.beats.items()}

    def slow(self) -> list[SlowRank]:
        """Return the slow ranks."""
        work = {rank: beat.work_s for rank, (beat, _) in self.beats.items() if beat.work_s is not None}
        slow = sorted(find_slow(work).items())
        return [SlowRank(rank, self.beats[rank][0].host, times) for rank, times in slow]


def find_hang(beats: Mapping[int, tuple[Heartbeat, float]]) -> Hang | None:
    """Return the hang of a group, if any, from each rank's last heartbeat and its age in seconds.

    A rank that waits for others exceeds its limit without a fault of its own. So it does not count as hanging while
    another rank that is no further is running and within its limit.
    """
    silent = {rank for rank, (_, age) in beats.items() if age > SILENT_S}
    late = {rank for rank, (beat, age) in beats.items() if beat.seconds + age > beat.limit_s}
    running = [beat.position for rank, (beat, _) in beats.items() if rank not in silent | late]
    if not any(all(position > beats[rank][0].position for position in running) for rank in late):
        return None
    ranks = missing(beats)
    details = "; ".join(describe(*beats[rank]) for rank in ranks[:3]) + ("; …" if len(ranks) > 3 else "")
    waited_s = max(beats[rank][0].seconds + beats[rank][1] for rank in late)
    return Hang(ranks, f"no progress for {waited_s:.0f} s: {details}")


def missing(beats: Mapping[int, tuple[Heartbeat, float]]) -> tuple[int, ...]:
    """Return the ranks that the others wait for: the silent ones, else those that are least far."""
    silent = tuple(sorted(rank for rank, (_, age) in beats.items() if age > SILENT_S))
    least = min((beat.position for beat, _ in beats.values()), default=None)
    return silent or tuple(sorted(rank for rank, (beat, _) in beats.items() if beat.position == least))


def describe(beat: Heartbeat, age: float) -> str:
    """Describe where a rank is, for messages."""
    where = f"in step {beat.step + 1}, {beat.phase.value}" if beat.phase is not StepPhase.START else "at the start"
    silence = f", silent for {age:.0f} s" if age > SILENT_S else ""
    return f"rank {beat.rank} on {beat.host} is {where}{silence}"


def find_slow(work: Mapping[int, float]) -> dict[int, float]:
    """Return the slow ranks, each with its time relative to the others' median, from their seconds for a micro-batch.

    Each rank is compared with the others alone, by median and median absolute deviation, so that it does not distort
    its own reference; at least 10 % of the median counts as noise, and more than five times the noise is slow.
    """
    slow = {}
    for rank, seconds in work.items():
        others = [other for name, other in work.items() if name != rank]
        if not others:
            continue
        usual = median(others)
        spread = 1.4826 * median(abs(other - usual) for other in others)
        if seconds - usual > 5 * max(spread, 0.1 * usual):
            slow[rank] = round(seconds / usual, 2)
    return slow
