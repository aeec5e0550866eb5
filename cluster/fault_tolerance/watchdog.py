"""A watch on progress: finds the ranks that a group waits for, and ends a group that goes on no more.

Ray sees that a process lives, not that it works. So each rank has a thread that tells the hub where it is; the hub has
the whole picture, and a rank that is over its time while no other is still at work before it means a hang. Every rank
then writes the stacks of its threads into the journal and ends; Ray Train starts the group again. Where a rank's own
thread cannot run, the others find out, and a clock of the C library is the last resort. Deciding is pure.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any, Protocol

from outlast.checkpointing.errors import OutlastError, StorageError
from outlast.checkpointing.run_store.events import Event, HangEvent, SlowEvent, SlowRank
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.storage.base import Storage
from outlast.cluster.fault_tolerance.hang_detection import Hang, Heartbeat, describe, missing
from outlast.trainers.loop.rank_activity import RankActivity, StepPhase

#: Over its time is a step that takes so many times the median.
STEPS = 20
#: Whatever does not take equally long each time (start, data, evaluation, saves) may take so many times `hang_after`.
PATIENCE = 15
PERIOD_S = 1.0
#: How long the ranks of a group that hangs may take to write their stacks.
LAST_REPORT_S = 15.0
EXIT_CODE = 70
_CONFIRM = 10


class StepTimedOut(OutlastError):
    """A rank waited for the others until its connection gave up."""


class WatchdogTransport(Protocol):
    """The way to the hub. Each returns None when nobody answers."""

    def beat(self, group: str, beat: Heartbeat) -> tuple[Hang | None, list[SlowRank]] | None:
        """Tells where a rank is; learns whether the group hangs, and which ranks are slow."""

    def last_report(self, group: str, rank: int) -> bool | None:
        """Tells that a rank's stacks are written; learns whether everybody's are."""

    def beats(self, group: str) -> dict[int, tuple[Heartbeat, float]] | None:
        """Every rank's last beat and its age."""


class Watchdog:
    """One rank's. Use as a context manager around the attempt.

    Args:
        post: The way to the hub.
        group: Names the group; the same on all its ranks, and on no rank of another.
        rank: This rank.
        size: World size.
        pulse: What the loop says of itself.
        hang_after_s: The least time without progress that counts as a hang; None only looks for slow ranks.
        storage: Where the journal lies.
        directory: Directory of the journal, asked when it is needed.
        tell: Hears of slow ranks (rank 0).
        period_s: Between beats.
    """

    def __init__(
        self,
        post: WatchdogTransport,
        group: str,
        rank: int,
        size: int,
        pulse: RankActivity,
        hang_after_s: float | None,
        storage: Storage,
        directory: Callable[[], str],
        tell: Callable[[dict[str, Any]], None],
        period_s: float = PERIOD_S,
    ) -> None:
        self._post, self._group, self._rank, self._size = post, group, rank, size
        self._pulse, self._hang_after_s = pulse, hang_after_s
        self._storage, self._directory, self._tell = storage, directory, tell
        self._period_s = period_s
        self._journal: Journal | None = None
        self._slow: set[int] = set()
        self._num_seen = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="outlast-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._post.beat(self._group, replace(self._beat(), limit_s=inf))  # nobody waits for a rank that has ended

    def explain(self, error: BaseException) -> StepTimedOut | None:
        """For a collective that timed out: the same with the ranks that did not come. None for other errors."""
        said = str(error)
        if "imed out" not in said and "imeout" not in said:
            return None
        beats = self._post.beats(self._group)
        if not beats:
            return None
        others = {rank: beat for rank, beat in beats.items() if rank != self._rank} or beats
        ranks = missing(others)
        whereabouts = "; ".join(describe(*others[rank]) for rank in ranks[:3])
        phase, step, _ = self._pulse.now
        late = ", ".join(map(str, ranks))
        return StepTimedOut(
            f"rank {self._rank} waited in step {step + 1}, {phase.value}, and rank {late} did not come: {whereabouts}",
            hint="the journal has its stack if it hangs; set failure.hang_after below the time-out of the connection",
        )

    def _watch(self) -> None:
        while not self._closing.wait(self._period_s):
            beat = self._beat()
            if self._hang_after_s is not None:
                rest_s = max(0.0, beat.limit_s - beat.seconds) + 2 * LAST_REPORT_S
                faulthandler.dump_traceback_later(rest_s, exit=True, file=2)
            answer = self._post.beat(self._group, beat)
            if answer is None:
                continue
            hang, slow = answer
            if hang is not None and self._hang_after_s is not None:
                self._give_up(hang)
            if self._rank == 0:
                self._note(slow)

    def _beat(self) -> Heartbeat:
        phase, step, seconds = self._pulse.now
        return Heartbeat(
            self._rank, self._size, socket.gethostname(), phase, step, seconds, self.limit_s(phase), self._pulse.work_s
        )

    def limit_s(self, phase: StepPhase) -> float:
        """How long this rank may be at something."""
        if self._hang_after_s is None:
            return inf
        usual = self._pulse.step_s
        if usual is None or not phase.is_quick:
            return max(self._hang_after_s * PATIENCE, STEPS * (usual or 0.0))
        return max(self._hang_after_s, STEPS * usual)

    def _give_up(self, hang: Hang) -> None:
        """Writes the stacks, waits for the others to do so, and ends the process."""
        faulthandler.dump_traceback_later(2 * LAST_REPORT_S, exit=True, file=2)  # the storage may be what hangs
        phase, step, _ = self._pulse.now
        with suppress(StorageError):  # the stacks then stand in the worker's log alone
            missed, threads = tuple(hang.ranks), stacks()
            self._write(HangEvent(rank=self._rank, missing=missed, step=step, phase=phase.value, threads=threads))
        faulthandler.dump_traceback(2)
        deadline = time.monotonic() + LAST_REPORT_S
        while not self._post.last_report(self._group, self._rank) and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(EXIT_CODE)

    def _note(self, slow: list[SlowRank]) -> None:
        """A change of the slow ranks counts when it has been seen several times in a row."""
        ranks = {item.rank for item in slow}
        self._num_seen = 0 if ranks == self._slow else self._num_seen + 1
        if self._num_seen < _CONFIRM:
            return
        self._slow, self._num_seen = ranks, 0
        event = SlowEvent(ranks=tuple(slow))
        self._tell(event.to_json())
        with suppress(StorageError):  # `status` then knows less
            self._write(event)

    def _write(self, event: Event) -> None:
        if self._journal is None:
            stream = f"events-watch-{self._group[:8]}"  # before the claim, groups share a directory
            self._journal = Journal(self._storage, self._directory(), self._rank, stream=stream, flush_s=0)
        self._journal.write(event)


def stacks() -> dict[str, tuple[str, ...]]:
    """The stack of every Python thread but the one that asks, outermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'thread')} ({ident})": tuple(line.rstrip() for line in traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }
