"""Rank 0's clock for saves: when one is due by time, and how long training goes on while saves fail.

The interval of `every: auto` is an estimate from costs and failures, and must never end a run: storage errors there are
suppressed. A save fails on all ranks or on none, and rank 0 alone reads the clock, so the ranks decide alike.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import REGROUPED_FROM, list_attempts, read_claim
from outlast.checkpointing.run_store.events import IntervalEvent, UnsavedEvent
from outlast.checkpointing.run_store.journal import last_event_at
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_schedule import IntervalUnit, SaveCosts, SaveInterval
from outlast.trainers.config.train import OnSaveError, TrainingFailureSettings
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.event_log import EventLog

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
        self._is_in_memory = False

    def saved(self, *, urgent: bool) -> None:
        """Record that a save has begun. The costs of an urgent one, which training waits for, are ignored."""
        self._saved_at = time.monotonic()
        self._ignores_next = urgent

    @property
    def waited_s(self) -> float:
        """Seconds since the last save began, or since the start."""
        return time.monotonic() - self._saved_at

    def continue_after(self, waited_s: float) -> None:
        """Continue another rank's clock, of a training that goes on in memory and must not wait for the storage."""
        self._saved_at, self._is_in_memory = time.monotonic() - waited_s, True

    def first_step_done(self) -> None:
        """Record how long the start took."""
        if self._every.unit is not IntervalUnit.AUTO:
            return
        if self._is_in_memory:
            threading.Thread(target=self._measure, name="outlast-save-timer", daemon=True).start()
        else:
            with suppress(StorageError):  # an estimate must not end a run
                self._restart_s = self._measure_restart()

    def _measure(self) -> None:
        with suppress(StorageError):
            self._history = self._read_history()
            self._restart_s = self._measure_restart()

    def is_due(self) -> bool:
        """Return whether the interval has passed. Never while a save is in flight: another would be skipped."""
        if self._every.unit is IntervalUnit.AUTO and self._checkpointer.last_save != self._last_save:
            self._last_save = self._checkpointer.last_save
            if not self._ignores_next:
                with suppress(StorageError):
                    self._update_costs()
        return self._every.due_at_time(self.waited_s, self._costs) and not self._checkpointer.is_busy

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
        if self._history is None and not self._is_in_memory:  # it does not change while this attempt lasts
            self._history = self._read_history()
        return between_failures(*(self._history or (time.time(), 1)))

    def _read_history(self) -> tuple[float, int]:
        return history_of(self._checkpointer.store, self._checkpointer.attempt)

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

    Those that continued another one in memory are left out: no checkpoint would have made that cheaper.

    Raises:
        StorageError: A read failed.
    """
    attempts = [item for item in list_attempts(store) if newest is None or item <= newest]
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda item: read_claim(store, item), attempts))
    since = float(claims[0].get("claimed_at", time.time())) if claims else time.time()
    return since, sum(REGROUPED_FROM not in claim for claim in claims)


def between_failures(since: float, num_attempts: int) -> float:
    """Return the mean seconds between interruptions, with `ASSUMED_BETWEEN_FAILURES_S` as one more observation."""
    return (max(0.0, time.time() - since) + ASSUMED_BETWEEN_FAILURES_S) / max(1, num_attempts)


def goes_on(settings: TrainingFailureSettings, unsaved_s: float) -> bool:
    """Return whether training goes on after a failed save, `unsaved_s` seconds after the last one that succeeded."""
    limit = settings.max_unsaved
    return settings.on_save_error is OnSaveError.GO_ON and (limit is None or unsaved_s < limit.amount)


class SaveFailures:
    """Handles the failed saves of one attempt.

    Args:
        settings: The settings under `failure`.
        checkpointer: Holds the claim. With `go-on` its journal keeps what the storage refuses.
        world: This rank.
        log: The events of the step loop.
    """

    def __init__(
        self, settings: TrainingFailureSettings, checkpointer: Checkpointer, world: World, log: EventLog
    ) -> None:
        self._settings, self._checkpointer, self._world, self._log = settings, checkpointer, world, log
        self._began_at = time.time()
        if checkpointer.journal is not None:
            checkpointer.journal.keeps_refused = settings.on_save_error is OnSaveError.GO_ON

    def guard(self, save: Callable[[], bool], step: int, *, is_last: bool = False) -> bool:
        """Call `save`, on every rank, after `step` steps. False when superseded.

        If the storage fails it and the settings allow to go on, that is recorded, and True is returned; whatever the
        limit if `is_last`, as before the save that ends the attempt. Else raises its StorageError.
        """
        try:
            return save()
        except StorageError as error:
            if self._settings.on_save_error is OnSaveError.STOP:
                raise
            unsaved_s = self._world.run_on_rank_0(self._unsaved_s)
            limit = self._settings.max_unsaved
            if not (is_last or goes_on(self._settings, unsaved_s)):
                message = f"{error.message}; no save has succeeded for {unsaved_s:.0f} s (failure.max_unsaved: {limit})"
                raise type(error)(message, hint=error.hint) from error
            self._log.write(
                UnsavedEvent(
                    step=step,
                    error=error.message,
                    newest=next((item.ref.step for item in self._checkpointer.accepted), None),
                    unsaved_s=round(unsaved_s, 1),
                    limit_s=limit.amount if limit else None,
                )
            )
            return True

    def earlier_save_failed(self) -> bool:
        """Return whether the save in flight has failed, so that the next one need not; every rank calls it."""
        if self._settings.on_save_error is OnSaveError.STOP:
            return False
        return any(self._world.gather(self._checkpointer.has_failed_or_superseded))

    def _unsaved_s(self) -> float:
        """Return the seconds since this attempt's newest commit, or since it began."""
        attempt = self._checkpointer.attempt
        committed_at = [item.committed_at for item in self._checkpointer.accepted if item.ref.attempt == attempt]
        return max(0.0, time.time() - max([self._began_at, *committed_at]))
