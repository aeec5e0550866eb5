"""One run in a storage: what is passed to whatever reads or writes a run.

A command asks for the same listings, claims and manifests in several places. A `RunStore` remembers them, so a command
reads each once and sees one state of the run. The protocol must not act on what is remembered: a step that has to see
what others did meanwhile takes a `fresh` store, which no other thread fills, or asks `storage` itself.
"""

from __future__ import annotations

import builtins
from io import BytesIO
from typing import BinaryIO

from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import CLAIM, AttemptId, CheckpointRef
from outlast.checkpointing.storage.base import Entry, Storage, read_bytes


class RunStore:
    """One run in a storage. Paths are relative to the storage root.

    Attributes:
        storage: The storage itself, which remembers nothing.
        run: Name of the run.
    """

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self.run = storage, run
        self._listed: dict[str, builtins.list[Entry]] = {}
        self._files: dict[str, bytes] = {}
        self._claims: dict[str, bytes] = {}
        self._missing: set[str] = set()

    def fresh(self) -> RunStore:
        """The same run with nothing remembered but claims, which never change."""
        new = RunStore(self.storage, self.run)
        new._claims = self._claims
        return new

    def refresh(self) -> None:
        """Forgets what may have changed: for readers that look again and again."""
        self._listed.clear()
        self._files.clear()
        self._missing.clear()

    def list(self, path: str) -> builtins.list[Entry]:
        """The names in a directory when it was first listed. Raises as `Storage.list`."""
        entries = self._listed.get(path)
        if entries is None:
            entries = self._listed[path] = self.storage.list(path)
        return entries

    def forget(self, path: str) -> None:
        """Forgets the listing of a directory, for who finds that it has changed."""
        self._listed.pop(path, None)

    def open(self, path: str) -> BinaryIO:
        """A file, for reading. Raises as `Storage.open`.

        JSON and journals of commits are small, and read once; a missing one stays missing. Others are not remembered.
        """
        name = path.rpartition("/")[2]
        if not name.endswith(".json") and not name.startswith("commits-"):
            return self.storage.open(path)
        known = self._claims if name == CLAIM else self._files
        if path not in known and path not in self._missing:
            try:
                known[path] = read_bytes(self.storage, path)
            except FileNotFoundError:
                self._missing.add(path)
        if path not in known:
            raise FileNotFoundError(path)
        return BytesIO(known[path])

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
