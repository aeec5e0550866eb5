"""One run in a storage: what is passed to whatever reads or writes a run."""

from __future__ import annotations

from dataclasses import dataclass

from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.storage.base import Storage


@dataclass(frozen=True, slots=True)
class RunStore:
    """One run in a storage. Paths are relative to the storage root.

    Attributes:
        storage: The storage.
        run: Name of the run.
    """

    storage: Storage
    run: str

    @property
    def url(self) -> str:
        """Where the run lies, as a user would write it."""
        return f"{self.storage.url}/{self.run}"

    @property
    def attempts_dir(self) -> str:
        return layout.attempts_dir(self.run)

    def attempt_dir(self, attempt: AttemptId) -> str:
        return layout.attempt_dir(self.run, attempt)

    def checkpoint_dir(self, ref: CheckpointRef) -> str:
        return layout.checkpoint_dir(self.run, ref)

    def checkpoint_url(self, ref: CheckpointRef) -> str:
        return f"{self.storage.url}/{self.checkpoint_dir(ref)}"

    def model_dir(self, attempt: AttemptId) -> str:
        return layout.model_dir(self.run, attempt)

    def launch_dir(self, launch: str) -> str:
        return layout.launch_dir(self.run, launch)
