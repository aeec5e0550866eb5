"""Rank 0's clock: when a save is due by time, and what `every: auto` makes of costs and failures."""

from __future__ import annotations

import time
from contextlib import suppress

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.events import IntervalEvent
from outlast.checkpointing.run_store.journal import last_event_at
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_interval import IntervalUnit, SaveCosts, SaveInterval

#: What is assumed of machines of which nothing is known: one failure in four hours. It counts as one observation.
ASSUMED_BETWEEN_FAILURES_S = 4 * 3600.0
#: A longer gap between two attempts is somebody's pause, not the cost of a restart.
LONGEST_RESTART_S = 600.0


class SaveTimer:
    """When to save by time.

    Args:
        every: The interval.
        checkpointer: Knows what saves cost.
    """

    def __init__(self, every: SaveInterval, checkpointer: Checkpointer) -> None:
        self._every, self._checkpointer = every, checkpointer
        self._saved_at = self._began_at = time.monotonic()
        self._restart_s: float | None = None
        self._costs: SaveCosts | None = None
        self._ignores_next = False
        self._known: tuple[float, float] | None = None
        self._history: tuple[float, int] | None = None

    def saved(self, *, urgent: bool) -> None:
        """Takes note that a save has begun; an urgent one, which training waits for, says nothing of the others."""
        self._saved_at = time.monotonic()
        self._ignores_next = urgent

    def first_step_is_done(self) -> None:
        """Takes note of how long it took to get going."""
        if self._every.unit is IntervalUnit.AUTO:
            with suppress(StorageError):  # an estimate is no reason to end
                self._restart_s = self._measure_restart()

    def is_due(self) -> bool:
        """Whether the interval has passed. Never while a save is in flight: it would be skipped."""
        if self._every.unit is IntervalUnit.AUTO and self._checkpointer.last_save != self._known:
            self._known = self._checkpointer.last_save
            if not self._ignores_next:
                with suppress(StorageError):
                    self._reckon()
        waited_s = time.monotonic() - self._saved_at
        return self._every.due_at_time(waited_s, self._costs) and not self._checkpointer.is_busy

    def _reckon(self) -> None:
        """New costs give a new interval, which is told with its inputs when it moved by a tenth."""
        assert self._known is not None
        blocked_s, commit_s = self._known
        costs = SaveCosts(blocked_s, commit_s, self._restart_s or 0.0, self._between_failures())
        before = self._costs.interval_s if self._costs else 0.0
        self._costs = costs
        if abs(costs.interval_s - before) > 0.1 * before and self._checkpointer.journal is not None:
            event = IntervalEvent(
                seconds=round(costs.interval_s, 2),
                blocked_s=round(costs.blocked_s, 4),
                commit_s=round(costs.commit_s, 4),
                restart_s=round(costs.restart_s, 2),
                between_failures_s=round(costs.between_failures_s, 1),
            )
            self._checkpointer.journal.write(event)

    def _between_failures(self) -> float:
        """Seconds since the run began, by how often it was interrupted; the assumption counts as one more.

        Pauses count as time, and stops as interruptions: nobody knows better.
        """
        if self._history is None:  # it does not change while this attempt lasts
            self._history = history_of(self._checkpointer.store, self._checkpointer.attempt)
        return between_failures(*self._history)

    def _measure_restart(self) -> float:
        """Seconds from the last sign of the attempt before to this one's first step; from the claim if it is the first.

        Of the attempt before only its newest event is known, which is flushed every few seconds.
        """
        store = self._checkpointer.store
        earlier = [item for item in list_attempts(store) if item < self._checkpointer.attempt]
        last = last_event_at(store.storage, store.attempt_dir(earlier[-1])) if earlier else None
        gap = time.time() - last if last is not None else time.monotonic() - self._began_at
        return min(gap, LONGEST_RESTART_S)


def history_of(store: RunStore, newest: AttemptId | None = None) -> tuple[float, int]:
    """When a run began, in seconds since the epoch, and how many attempts it has had, up to the newest.

    Raises:
        StorageError: A read failed.
    """
    attempts = [item for item in list_attempts(store) if newest is None or item <= newest]
    claim = read_claim(store, attempts[0]) if attempts else {}
    return float(claim.get("claimed_at", time.time())), len(attempts)


def between_failures(since: float, num_attempts: int) -> float:
    """Mean seconds between interruptions; the assumption counts as one more."""
    return (max(0.0, time.time() - since) + ASSUMED_BETWEEN_FAILURES_S) / max(1, num_attempts)
