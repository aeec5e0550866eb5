"""Where the ranks of a group are, whether the group hangs and on whom, and which ranks are slow. Pure: the hub gathers
what each rank's watchdog says, and this decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from outlast.checkpointing.run_store.events import SlowRank
from outlast.trainers.loop.rank_activity import StepPhase

#: A rank whose thread was not heard of for so long does not run.
SILENT_S = 10.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank says of itself.

    Attributes:
        rank: Who.
        size: World size.
        host: Its machine.
        phase: What it is at.
        step: Steps done.
        seconds: How long it has been at it.
        limit_s: How long it may be.
        work_s: What a micro-batch takes it, if that is known.
    """

    rank: int
    size: int
    host: str
    phase: StepPhase
    step: int
    seconds: float
    limit_s: float
    work_s: float | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Ranks of one group go through the same places in the same order."""
        return (self.step, self.phase.order)


@dataclass(frozen=True, slots=True)
class Hang:
    """A group that goes on no more: the ranks that the others wait for, and what is known of them."""

    ranks: tuple[int, ...]
    message: str


@dataclass(slots=True)
class GroupProgress:
    """What the hub knows of the ranks of one group.

    Attributes:
        beats: Rank to the last that it said, and when.
        hang: The hang, once there is one.
        written: The ranks whose stacks are written.
        reported: Whether the end of the group has been explained.
    """

    beats: dict[int, tuple[Heartbeat, float]] = field(default_factory=dict)
    hang: Hang | None = None
    written: set[int] = field(default_factory=set)
    reported: bool = False

    def apply(self, beat: Heartbeat, now: float) -> Hang | None:
        """Takes a beat. Once there is a hang it stays one."""
        self.beats[beat.rank] = (beat, now)
        return self.look(now)

    def look(self, now: float) -> Hang | None:
        """Whether the group hangs, also when no rank is left to say anything."""
        self.hang = self.hang or find_hang(self.ages(now))
        return self.hang

    def write(self, rank: int, now: float) -> bool:
        """Takes note that a rank's stacks are written. True once those of all are that seem to run."""
        self.written.add(rank)
        return {other for other, (_, age) in self.ages(now).items() if age < SILENT_S / 2} <= self.written

    def ages(self, now: float) -> dict[int, tuple[Heartbeat, float]]:
        """Every rank's last beat, and how many seconds ago it was."""
        return {rank: (beat, now - at) for rank, (beat, at) in self.beats.items()}

    def slow(self) -> list[SlowRank]:
        """The slow ranks."""
        work = {rank: beat.work_s for rank, (beat, _) in self.beats.items() if beat.work_s is not None}
        slow = sorted(find_slow(work).items())
        return [SlowRank(rank, self.beats[rank][0].host, times) for rank, times in slow]


def find_hang(beats: Mapping[int, tuple[Heartbeat, float]]) -> Hang | None:
    """Whether the group hangs, and on whom.

    A rank that waits is over its time without a fault of its own; it is excused while another one, which has come no
    further, is awake and within its own time.

    Args:
        beats: Rank to the last that it said, and how many seconds ago that was.
    """
    silent = {rank for rank, (_, age) in beats.items() if age > SILENT_S}
    late = {rank for rank, (beat, age) in beats.items() if beat.seconds + age > beat.limit_s}
    at_work = [beat.place for rank, (beat, _) in beats.items() if rank not in silent | late]
    if not any(all(place > beats[rank][0].place for place in at_work) for rank in late):
        return None
    ranks = missing(beats)
    said = "; ".join(describe(*beats[rank]) for rank in ranks[:3]) + ("; …" if len(ranks) > 3 else "")
    waited_s = max(beats[rank][0].seconds + beats[rank][1] for rank in late)
    return Hang(ranks, f"no progress for {waited_s:.0f} s: {said}")


def missing(beats: Mapping[int, tuple[Heartbeat, float]]) -> tuple[int, ...]:
    """The ranks that the others wait for: those that are not heard of, else those that have come least far."""
    silent = tuple(sorted(rank for rank, (_, age) in beats.items() if age > SILENT_S))
    least = min((beat.place for beat, _ in beats.values()), default=None)
    return silent or tuple(sorted(rank for rank, (beat, _) in beats.items() if beat.place == least))


def describe(beat: Heartbeat, age: float) -> str:
    """A rank's whereabouts in words."""
    where = f"in step {beat.step + 1}, {beat.phase.value}" if beat.phase is not StepPhase.START else "at the start"
    silence = f", silent for {age:.0f} s" if age > SILENT_S else ""
    return f"rank {beat.rank} on {beat.host} is {where}{silence}"


def find_slow(work: Mapping[int, float]) -> dict[int, float]:
    """The ranks that are slower than the others, with how many times.

    Each rank is held against the others alone, by median and median absolute deviation, so that it does not spoil what
    it is measured by; 10 % of the median count as noise in any case, and five times that much is slow.

    Args:
        work: Rank to what a micro-batch takes it, in seconds.
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
