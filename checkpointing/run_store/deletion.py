"""Deletion of checkpoints: manifest first, recorded before it happens, and never of a pinned one.

A pin does not depend on what the run's attempts are doing. A deletion is announced before the pins are listed; a pin is
written before announcements are read. So one of the two sees the other, and a granted pin holds.
"""

from collections.abc import Sequence

from outlast.checkpointing.errors import NotAFileError
from outlast.checkpointing.format.layout import (
    MANIFEST,
    AttemptId,
    CheckpointRef,
    is_litter,
    pins_dir,
    prune_dir,
    prunes_dir,
)
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import DeleteEvent, DeletingEvent, SparedEvent, parse_event
from outlast.checkpointing.run_store.journal import COMMITS, Journal, read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import list_directories, walk


def deletions(store: RunStore) -> set[CheckpointRef]:
    """Return every checkpoint that an attempt or a prune has recorded as deleted, as far as that can be read."""
    deleted = set()
    for directory in commit_journals(store):
        with store.going_on(f"{directory}/{COMMITS}-0"):
            for event in map(parse_event, read_events(store, directory, COMMITS)):
                if isinstance(event, DeleteEvent) and (target := AttemptId.parse(event.attempt)) is not None:
                    deleted.add(CheckpointRef(event.step, target))
    return deleted


def delete_checkpoint(store: RunStore, ref: CheckpointRef) -> None:
    """Delete a checkpoint, manifest first: from then on it does not count.

    Links and other special files in it stay, and so do those that lie in its place. Raises NotAFileError, which names
    them, after everything else is deleted; and StorageError.
    """
    storage, directory = store.storage, store.checkpoint_dir(ref)
    entries = list(walk(storage, directory))
    if all(entry.name != MANIFEST or not entry.special for entry in entries):
        storage.delete(f"{directory}/{MANIFEST}")
    for entry in entries:
        if not entry.special:
            storage.delete(f"{directory}/{entry.name}")
    if special := [f"{entry.name} ({entry.special})" for entry in entries if entry.special]:
        raise NotAFileError(
            f"{storage.url}/{directory}: outlast did not write {', '.join(special)}, and leaves it there",
            hint="look where it leads, and remove it yourself",
        )


def exempt_pinned(
    store: RunStore, journal: Journal, doomed: Sequence[CheckpointRef]
) -> tuple[list[CheckpointRef], set[CheckpointRef]]:
    """Announce deletions in the deleter's `journal`, whose events must be durable at once.

    Returns the checkpoints that may be deleted, and those that are pinned.
    """
    if not doomed:
        return [], set()
    journal.write(DeletingEvent(checkpoints=tuple(ref.name for ref in doomed)))
    spared = list_pins(store.fresh()) & set(doomed)
    if spared:
        journal.write(SparedEvent(checkpoints=tuple(ref.name for ref in sorted(spared))))
    return [ref for ref in doomed if ref not in spared], spared


def is_being_deleted(store: RunStore, ref: CheckpointRef) -> bool:
    """Return whether a deletion of this checkpoint is announced and not withdrawn."""
    doomed: dict[str, bool] = {}
    now = store.fresh()
    for directory in commit_journals(now):
        for event in map(parse_event, read_events(now.storage, directory, COMMITS)):  # all of it, or an error
            if isinstance(event, DeletingEvent | SparedEvent) and ref.name in event.checkpoints:
                doomed[directory] = isinstance(event, DeletingEvent)
    return any(doomed.values())


def list_pins(store: RunStore) -> set[CheckpointRef]:
    """Return the pinned checkpoints: a name is a pin, whatever has it. Raises StorageError."""
    names = (entry.name for entry in store.list(pins_dir(store.run)))
    return set(filter(None, map(CheckpointRef.parse, names)))


def commit_journals(store: RunStore) -> list[str]:
    """Return the directories of all writers that commit or delete: attempts and prunes."""
    attempts = [store.attempt_dir(attempt) for attempt in list_attempts(store)]
    prunes = [name for name in list_directories(store, prunes_dir(store.run)) if not is_litter(name)]
    return attempts + [prune_dir(store.run, name) for name in prunes]
