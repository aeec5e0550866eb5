"""Reads a run's story from its storage, and what is new in it: works when the cluster that trained it has gone.

Looking again is cheap: only the newest launches and attempts can still say something, and of their journals only the
segment that grows is read.
"""

from __future__ import annotations

import json
from typing import Any

from outlast.checkpointing.journal import Tail
from outlast.checkpointing.layout import attempt_dir, launch_dir
from outlast.checkpointing.lineage import list_attempts, read_claim
from outlast.checkpointing.storage import Storage, read_bytes
from outlast.cluster.story import Story

#: A launch that is taken over, or an attempt, may still say something after the next one has begun.
_OPEN = 2


class Follower:
    """Follows one run.

    Args:
        storage: Where it lies.
        run: Its name.
        but: A launch that is left out, because its story is told by itself.

    Attributes:
        story: What is known so far.
    """

    def __init__(self, storage: Storage, run: str, *, but: str = "") -> None:
        self._storage, self._run, self._but = storage, run, but
        self._tail = Tail(storage)
        self.story = Story(run)

    def look(self) -> Story:
        """Reads what is new.

        Raises:
            StorageError: The storage could not be read; the next look goes on where this one ended.
        """
        story, storage = self.story, self._storage
        launches = [name for name in list_launches(storage, self._run) if name != self._but]
        for number, name in enumerate(launches):
            if number < len(launches) - _OPEN and name in story.launches:
                continue
            directory = launch_dir(self._run, name)
            launch = story.launch(name)
            launch.alive = read_alive(storage, self._run, name) or launch.alive
            for event in self._tail.new(directory):
                story.hear_launch(name, event)
        attempts = list_attempts(storage, self._run)
        for number, attempt in enumerate(attempts):
            if number < len(attempts) - _OPEN and attempt in story.attempts and story.attempts[attempt].claim:
                continue
            claim = (story.attempts[attempt].claim if attempt in story.attempts else {}) or read_claim(
                storage, self._run, attempt
            )
            if self._but and claim.get("launch") == self._but:
                continue
            told = story.attempt(attempt)
            told.claim = claim
            for event in self._tail.new(attempt_dir(self._run, attempt)):
                told.hear(event)
        return story


def list_launches(storage: Storage, run: str) -> list[str]:
    """The run's launches, oldest first."""
    return [entry.name for entry in storage.list(f"{run}/launches") if entry.num_bytes is None]


def read_alive(storage: Storage, run: str, launch: str) -> dict[str, Any]:
    """A launch's last sign of life; empty when there is none that can be read."""
    try:
        body = json.loads(read_bytes(storage, f"{launch_dir(run, launch)}/alive.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
