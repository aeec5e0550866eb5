"""Reads a run's story from its storage, and what is new in it: works when the cluster that trained it has gone.

Looking again is cheap: only the newest launches and attempts can still say something, and of their journals only the
segment that grows is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import list_attempts, list_launches, read_claim
from outlast.checkpointing.run_store.journal import JournalTail
from outlast.checkpointing.run_store.liveness import is_dead, read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.cluster.monitoring.timeline import Timeline

if TYPE_CHECKING:
    from outlast.checkpointing.run_store.compacted_segment import StepColumns

#: A launch that is taken over, or an attempt, may still say something after the next one has begun.
_OPEN = 2


class TimelineReader:
    """Follows one run: each look adds what is new to its story.

    Args:
        store: The run.
        but: A launch that is left out, because its story is told by itself.
        journals: Read them too, not only who has claimed and who is alive.

    Attributes:
        story: What is known so far.
    """

    def __init__(self, store: RunStore, *, but: str = "", journals: bool = True) -> None:
        self._store, self._but, self._journals = store, but, journals
        self._tail = JournalTail(store)
        self._closed: set[AttemptId | str] = set()  # read once more after they had left the newest ones
        self._has_looked = False
        self.story = Timeline(store.run)

    def look(self) -> Timeline:
        """Reads what is new.

        Raises:
            StorageError: The storage could not be read; the next look goes on where this one ended.
        """
        if self._has_looked:
            self._store.refresh()
        self._has_looked = True
        self._look_at_attempts()  # first: their claims tell the order of the launches
        self._look_at_launches()
        return self.story

    def _look_at_attempts(self) -> None:
        attempts = list_attempts(self._store)
        for number, attempt in enumerate(attempts):
            if attempt in self._closed:
                continue
            known = self.story.attempts.get(attempt)
            claim = (known.claim if known else {}) or read_claim(self._store, attempt)
            if self._but and claim.get("launch") == self._but:
                continue
            told = self.story.attempt(attempt)
            told.claim = claim
            for event in self._new(self._store.attempt_dir(attempt)):
                told.apply(event) if isinstance(event, dict) else told.apply_steps(event)
            if claim and number < len(attempts) - _OPEN:
                self._closed.add(attempt)

    def _look_at_launches(self) -> None:
        for name in list_launches(self._store):
            if name != self._but:
                self.story.launch(name)
        launches, superseded = self.story.launches_in_order, self.story.superseded
        for number, launch in enumerate(launches):
            if launch.id in self._closed:
                continue
            for _ in range(2):  # one that ended while its sign of life was read says so in the next
                launch.alive = read_liveness(self._store, launch.id) or launch.alive
                launch.is_gone = not launch.has_ended and is_dead(launch.alive)
                if not launch.is_gone:
                    break
            for event in self._new(self._store.launch_dir(launch.id)):
                if isinstance(event, dict):  # a driver makes no steps
                    self.story.apply_launch(launch.id, event)
            # One that has the run, or may be about to claim it, goes on, whatever its name says.
            if number < len(launches) - _OPEN and (launch.has_ended or launch.id in superseded):
                self._closed.add(launch.id)

    def _new(self, directory: str) -> Iterator[dict[str, Any] | StepColumns]:
        return self._tail.new(directory) if self._journals else iter(())
