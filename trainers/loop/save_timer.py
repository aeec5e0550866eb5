"""Rank 0's clock for saves: when one is due by time, and the interval of `every: auto` from costs and failures.

An estimate must never end a run: storage errors here are suppressed.
"""

import time
from contextlib import suppress

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.events import IntervalEvent
from outlast.checkpointing.run_store.journal import last_event_at
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_schedule import IntervalUnit, SaveCosts, SaveInterval

#: Prior for the time between failures, one in four hours. It counts as one observation.
ASSUMED_BETWEEN_FAILURES_S = 4 * 3600.0
#: A longer gap between two attempts is a user's pause, not the cost of a restart.
LONGEST_RESTART_S = 600.0


class SaveTimer:
    """Decides when to save by time.

    Args:
        every: The interval.
        checkpointer: Measures the costs of saves.
    """

    def __init__(self, every: SaveInterval, checkpointer: Checkpointer) -> None:
        self._every, self._checkpointer = every, checkpointer
        self._saved_at = self._began_at = time.monotonic()
        self._restart_s: float | None = None
        self._costs: SaveCosts | None = None
        self._ignores_next = False
        self._last_save: tuple[float, float] | None = None
        self._history: tuple[float, int] | None = None

    def saved(self, *, urgent: bool) -> None:
        """Record that a save has begun. The costs of an urgent one, which training waits for, are ignored."""
        self._saved_at = time.monotonic()
        self._ignores_next = urgent

    def first_step_done(self) -> None:
        """Record how long the start took."""
        if self._every.unit is IntervalUnit.AUTO:
            with suppress(StorageError):  # an estimate must not end a run
                self._restart_s = self._measure_restart()

    def is_due(self) -> bool:
        """Return whether the interval has passed. Never while a save is in flight: another would be skipped."""
        if self._every.unit is IntervalUnit.AUTO and self._checkpointer.last_save != self._last_save:
            self._last_save = self._checkpointer.last_save
            if not self._ignores_next:
                with suppress(StorageError):
                    self._update_costs()
        waited_s = time.monotonic() - self._saved_at
        return self._every.due_at_time(waited_s, self._costs) and not self._checkpointer.is_busy

    def _update_costs(self) -> None:
        """Update the interval, and write it with its inputs to the journal if it changed by a tenth."""
        assert self._last_save is not None
        blocked_s, commit_s = self._last_save
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
        """Return the mean seconds between interruptions. Pauses count as time, and stops as interruptions."""
        if self._history is None:  # it does not change while this attempt lasts
            self._history = history_of(self._checkpointer.store, self._checkpointer.attempt)
        return between_failures(*self._history)

    def _measure_restart(self) -> float:
        """Return the seconds from the earlier attempt's newest event, flushed every few seconds, to the first step.

        The first attempt counts from its claim.
        """
        store = self._checkpointer.store
        earlier = [item for item in list_attempts(store) if item < self._checkpointer.attempt]
        last = last_event_at(store.storage, store.attempt_dir(earlier[-1])) if earlier else None
        gap = time.time() - last if last is not None else time.monotonic() - self._began_at
        return min(gap, LONGEST_RESTART_S)


def history_of(store: RunStore, newest: AttemptId | None = None) -> tuple[float, int]:
    """Return a run's start, in seconds since the epoch, and its number of attempts up to `newest`.

    Raises:
        StorageError: A read failed.
    """
    attempts = [item for item in list_attempts(store) if newest is None or item <= newest]
    claim = read_claim(store, attempts[0]) if attempts else {}
    return float(claim.get("claimed_at", time.time())), len(attempts)


def between_failures(since: float, num_attempts: int) -> float:
    """Return the mean seconds between interruptions, with `ASSUMED_BETWEEN_FAILURES_S` as one more observation."""
    return (max(0.0, time.time() - since) + ASSUMED_BETWEEN_FAILURES_S) / max(1, num_attempts)
