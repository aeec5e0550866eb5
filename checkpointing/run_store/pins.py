"""Pins: checkpoints that retention never deletes.

A pin does not depend on what the run's attempts are doing. A deletion is announced before the pins are listed; a pin is
written before announcements are read. So one of the two sees the other, and a granted pin holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from outlast.checkpointing.format.layout import CheckpointRef, pins_dir
from outlast.checkpointing.run_store.catalog import commit_journals
from outlast.checkpointing.run_store.events import DeletingEvent, SparedEvent, parse_event
from outlast.checkpointing.run_store.journal import COMMITS, Journal, read_events
from outlast.checkpointing.run_store.store import RunStore


def list_pins(store: RunStore) -> set[CheckpointRef]:
    entries = store.list(pins_dir(store.run))
    names = (CheckpointRef.parse(entry.name) for entry in entries if entry.num_bytes is not None)
    return {ref for ref in names if ref is not None}


def exempt_pinned(
    store: RunStore, journal: Journal, doomed: Sequence[CheckpointRef]
) -> tuple[list[CheckpointRef], set[CheckpointRef]]:
    """Announce deletions in the deleter's `journal`, whose events must be durable at once.

    Returns:
        The checkpoints that may be deleted, and those that are pinned.
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
        for event in map(parse_event, read_events(now, directory, COMMITS)):
            if isinstance(event, DeletingEvent | SparedEvent) and ref.name in event.checkpoints:
                doomed[directory] = isinstance(event, DeletingEvent)
    return any(doomed.values())
