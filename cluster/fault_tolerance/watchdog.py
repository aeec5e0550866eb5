"""Watchdog of a rank: reports progress, and ends the process when its group hangs.

Ray detects that a process lives, not that it makes progress. So a thread of each rank sends heartbeats to the
coordinator, which sees all ranks; a rank over its limit while no other is still running before it means a hang
(`hang_detection`, pure). Every rank then writes its threads' stacks into the journal and ends, and Ray Train restarts
the group. Where a rank's own thread cannot run, the others detect it, and a timer of the C library is the last resort.
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
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from outlast.checkpointing.errors import OutlastError, StorageError
from outlast.checkpointing.run_store.events import Event, HangEvent, SlowEvent, SlowRank
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.storage.base import Storage
from outlast.cluster.fault_tolerance.coordinator import CoordinatorHandle
from outlast.cluster.fault_tolerance.hang_detection import Hang, Heartbeat, describe, missing
from outlast.trainers.loop.rank_activity import RankActivity, StepPhase

#: A step may take this many times the median.
STEP_FACTOR = 20
#: Phases of varying length (start, data, evaluation, saves) may take this many times `hang_after`.
SLOW_PHASE_FACTOR = 15
PERIOD_S = 1.0
#: How long the ranks of a hanging group may take to write their stacks.
LAST_REPORT_S = 15.0
EXIT_CODE = 70
_CONFIRM = 10


class StepTimedOut(OutlastError):
    """A rank waited for the others until its connection gave up."""


@dataclass(eq=False)
class Watchdog:
    """One rank's watchdog. Use as a context manager around the attempt."""

    coordinator: CoordinatorHandle
    group: str  #: name of the group, unique to it and equal on all its ranks
    rank: int
    size: int
    progress: RankActivity
    hang_after_s: float | None  #: the least time without progress that counts as a hang; None only detects slow ranks
    storage: Storage
    directory: Callable[[], str]  #: returns the journal's directory; called when it is needed
    listener: Callable[[dict[str, Any]], None]  #: called with the event of slow ranks (rank 0)
    period_s: float = PERIOD_S
    in_place: bool = False  #: only the ranks end that the others wait for, who then go on without them
    _journal: Journal | None = None
    _slow: set[int] = field(default_factory=set)
    _num_seen: int = 0
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="outlast-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        # The others must not wait for a rank that has ended.
        self.coordinator.beat(self.group, replace(self._beat(), limit_s=inf))

    def explain(self, error: BaseException) -> StepTimedOut | None:
        """Return the error of a timed-out collective with the ranks that are missing; None for other errors."""
        message = str(error)
        if "imed out" not in message and "imeout" not in message:
            return None
        beats: dict[int, tuple[Heartbeat, float]] | None = self.coordinator.beats(self.group)
        if not beats:
            return None
        others = {rank: beat for rank, beat in beats.items() if rank != self.rank} or beats
        ranks = missing(others)
        whereabouts = "; ".join(describe(*others[rank]) for rank in ranks[:3])
        phase, step, _ = self.progress.now
        late = f"rank {', '.join(map(str, ranks))} did not arrive"
        return StepTimedOut(
            f"rank {self.rank} waited in step {step + 1}, {phase.value}, and {late}: {whereabouts}",
            hint="set failure.hang_after below the connection's time-out: the journal then has the stacks of a hang",
        )

    def _watch(self) -> None:
        while not self._closing.wait(self.period_s):
            beat = self._beat()
            if self.hang_after_s is not None:
                rest_s = max(0.0, beat.limit_s - beat.seconds) + 2 * LAST_REPORT_S
                faulthandler.dump_traceback_later(rest_s, exit=True, file=2)
            answer: tuple[Hang | None, list[SlowRank]] | None = self.coordinator.beat(self.group, beat)
            if answer is None:
                continue
            hang, slow = answer
            if hang is not None and self.hang_after_s is not None:
                if self.in_place and self.rank not in hang.ranks:
                    self._report(hang)
                    faulthandler.cancel_dump_traceback_later()
                    return
                self._give_up(hang)
            if self.rank == 0:
                self._record_slow(slow)

    def _beat(self) -> Heartbeat:
        phase, step, seconds = self.progress.now
        return Heartbeat(
            self.rank,
            self.size,
            socket.gethostname(),
            phase,
            step,
            seconds,
            self.limit_s(phase),
            self.progress.work_s,
        )

    def limit_s(self, phase: StepPhase) -> float:
        """Return how long this rank may stay in a phase."""
        if self.hang_after_s is None:
            return inf
        usual = self.progress.step_s
        if usual is None or not phase.is_quick:
            return max(self.hang_after_s * SLOW_PHASE_FACTOR, STEP_FACTOR * (usual or 0.0))
        return max(self.hang_after_s, STEP_FACTOR * usual)

    def _give_up(self, hang: Hang) -> None:
        """Write the stacks, wait for the others to do so, and end the process."""
        faulthandler.dump_traceback_later(2 * LAST_REPORT_S, exit=True, file=2)  # the storage itself may hang
        self._report(hang)
        faulthandler.dump_traceback(2)
        deadline = time.monotonic() + LAST_REPORT_S
        while not self.coordinator.last_report(self.group, self.rank) and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(EXIT_CODE)

    def _report(self, hang: Hang) -> None:
        """Write where this rank's threads are to the journal."""
        phase, step, _ = self.progress.now
        with suppress(StorageError):  # the stacks are then in the worker's log alone
            missed, threads = tuple(hang.ranks), stacks()
            self._write(HangEvent(rank=self.rank, missing=missed, step=step, phase=phase.value, threads=threads))

    def _record_slow(self, slow: list[SlowRank]) -> None:
        """Record a change of the slow ranks once it is confirmed by several heartbeats in a row."""
        ranks = {item.rank for item in slow}
        self._num_seen = 0 if ranks == self._slow else self._num_seen + 1
        if self._num_seen < _CONFIRM:
            return
        self._slow, self._num_seen = ranks, 0
        event = SlowEvent(ranks=tuple(slow))
        self.listener(event.to_json())
        with suppress(StorageError):  # `status` then lacks it
            self._write(event)

    def _write(self, event: Event) -> None:
        if self._journal is None:
            stream = f"events-watch-{self.group[:8]}"  # before the claim, groups share a directory
            self._journal = Journal(self.storage, self.directory(), self.rank, stream=stream, flush_s=0)
        self._journal.write(event)


def stacks() -> dict[str, tuple[str, ...]]:
    """Return the stack of every Python thread but the calling one, outermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'thread')} ({ident})": tuple(line.rstrip() for line in traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }
