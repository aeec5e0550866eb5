"""Reads a run's timeline from its storage, and later what is new; works after the cluster is gone.

An update is cheap: only the newest launches and attempts can still write, and only the growing segment of their
journals is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import list_attempts, list_launches, read_claim
from outlast.checkpointing.run_store.journal import JournalTail
from outlast.checkpointing.run_store.liveness import is_dead, read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.cluster.monitoring.timeline_from_events import Timeline

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import StepColumns

#: Launches and attempts that may still write: the newest, and the one that it supersedes.
_NUM_OPEN = 2


class TimelineReader:
    """Follows one run; each update adds what is new to `timeline`.

    Args:
        store: The run.
        exclude_launch: A launch to leave out, because the caller receives its events directly.
        journals: Read journals too, not only claims and liveness files.
    """

    def __init__(self, store: RunStore, *, exclude_launch: str = "", journals: bool = True) -> None:
        self._store, self._exclude_launch, self._journals = store, exclude_launch, journals
        self._tail = JournalTail(store)
        self._closed: set[AttemptId | str] = set()  # read once more after newer ones appeared
        self._is_first = True
        self.timeline = Timeline(store.run)

    def update(self) -> Timeline:
        """Read what is new.

        Raises:
            StorageError: The storage could not be read; the next update continues where this one ended.
        """
        if not self._is_first:
            self._store.refresh()
        self._is_first = False
        self._update_attempts()  # first, because claims give the order of launches
        self._update_launches()
        return self.timeline

    def _update_attempts(self) -> None:
        attempts = list_attempts(self._store)
        for number, attempt in enumerate(attempts):
            if attempt in self._closed:
                continue
            known = self.timeline.attempts.get(attempt)
            claim = (known.claim if known else {}) or read_claim(self._store, attempt)
            if self._exclude_launch and claim.get("launch") == self._exclude_launch:
                continue
            record = self.timeline.attempt(attempt)
            record.claim = claim
            for event in self._new_events(self._store.attempt_dir(attempt)):
                record.apply(event) if isinstance(event, dict) else record.apply_steps(event)
            if claim and number < len(attempts) - _NUM_OPEN:
                self._closed.add(attempt)

    def _update_launches(self) -> None:
        for name in list_launches(self._store):
            if name != self._exclude_launch:
                self.timeline.launch(name)
        launches, superseded = self.timeline.launches_in_order, self.timeline.superseded
        for number, launch in enumerate(launches):
            if launch.id in self._closed:
                continue
            for _ in range(2):  # a driver that ended between the read and the check has written its end by now
                launch.alive = read_liveness(self._store, launch.id) or launch.alive
                launch.is_gone = not launch.has_ended and is_dead(launch.alive)
                if not launch.is_gone:
                    break
            for event in self._new_events(self._store.launch_dir(launch.id)):
                if isinstance(event, dict):  # a driver writes no step columns
                    self.timeline.apply_launch_event(launch.id, event)
            # A launch that owns the run, or may be about to claim it, stays open even if its name is older.
            if number < len(launches) - _NUM_OPEN and (launch.has_ended or launch.id in superseded):
                self._closed.add(launch.id)

    def _new_events(self, directory: str) -> Iterator[dict[str, Any] | StepColumns]:
        return self._tail.new(directory) if self._journals else iter(())
