"""`RunStore`: one run in a storage, with a cache of listings, claims, manifests and other small files.

A command needs the same files in several places; with one `RunStore` it reads each once and sees one state of the run.
The protocol must never act on cached state: a step that must see what other processes did meanwhile uses a `fresh`
store, which no other thread fills, or `storage` itself.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

from outlast.checkpointing.errors import DamagedError, StorageError
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import CLAIM, AttemptId, CheckpointRef
from outlast.checkpointing.storage.base import Entry, Storage, read_bytes
from outlast.checkpointing.storage.factory import as_storage
from outlast.checkpointing.storage.location import Location


class RunStore:
    """One run in a storage. Paths are relative to the storage root.

    Attributes:
        storage: The storage itself, without a cache; may be given as a path or a URL.
        run: Name of the run.
        unreadable: Paths that could not be read, with the reason, by those readers that go on without them.
    """

    def __init__(self, storage: Storage | Location, run: str) -> None:
        self.storage, self.run = as_storage(storage), run
        self._listed: dict[str, builtins.list[Entry]] = {}
        self._files: dict[str, bytes] = {}
        self._claims: dict[str, bytes] = {}
        self._missing: set[str] = set()
        self.unreadable: dict[str, str] = {}

    def fresh(self) -> RunStore:
        """Return the same run with an empty cache, except for claims, which never change."""
        new = RunStore(self.storage, self.run)
        new._claims, new.unreadable = self._claims, self.unreadable
        return new

    def refresh(self) -> None:
        """Discard what may have changed, for readers that poll."""
        self._listed.clear()
        self._files.clear()
        self._missing.clear()

    def list(self, path: str) -> builtins.list[Entry]:
        """List a directory as it was first seen. Records links and other special files. Raises as `Storage.list`."""
        entries = self._listed.get(path)
        if entries is None:
            entries = self._listed[path] = self.storage.list(path)
            for entry in entries:
                if entry.special and path != self.run:  # there, `model` is a link of outlast's own
                    self.unreadable[f"{path}/{entry.name}"] = f"it is {entry.special}"
        return entries

    def forget(self, path: str) -> None:
        """Discard the listing of a directory that has changed."""
        self._listed.pop(path, None)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading. Raises as `Storage.open`.

        JSON and journals of commits are small and cached; one that is missing stays missing. Others are not cached.
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

    @contextmanager
    def going_on(self, path: str) -> Iterator[None]:
        """Record an error of reading in the block as that of `path`, and go on: one entry must not hide the others."""
        try:
            yield
        except (StorageError, DamagedError) as error:
            self.unreadable[path] = error.message
        else:
            self.unreadable.pop(path, None)

    @property
    def url(self) -> str:
        """The run's directory as a user writes it."""
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
