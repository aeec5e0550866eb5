"""Pins: checkpoints that retention keeps."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.checkpointing.format.layout import (
    CheckpointRef,
    pins_dir,
)
from outlast.checkpointing.run_store.catalog import _journals
from outlast.checkpointing.run_store.journal import COMMITS, Journal, read_events
from outlast.checkpointing.storage.base import Storage


def list_pins(storage: Storage, run: str) -> set[CheckpointRef]:
    """The checkpoints that are exempt from retention."""
    names = (CheckpointRef.parse(entry.name) for entry in storage.list(pins_dir(run)) if entry.num_bytes is not None)
    return {ref for ref in names if ref is not None}


def exempt_pinned(
    storage: Storage, run: str, journal: Journal, doomed: Sequence[CheckpointRef]
) -> tuple[list[CheckpointRef], set[CheckpointRef]]:
    """Of the checkpoints that are about to be deleted, those that may be, and those whose pin was seen just now.

    Args:
        storage: Where the run lies.
        run: Name of the run.
        journal: Whoever deletes writes the deletions here; each event must be durable at once.
        doomed: What the policy lets go.
    """
    if not doomed:
        return [], set()
    journal.event("deleting", checkpoints=[ref.name for ref in doomed])
    spared = list_pins(storage, run) & set(doomed)
    if spared:
        journal.event("spared", checkpoints=[ref.name for ref in sorted(spared)])
    return [ref for ref in doomed if ref not in spared], spared


def is_being_deleted(storage: Storage, run: str, ref: CheckpointRef) -> bool:
    """True if somebody said that this checkpoint is about to go, and has not spared it since."""
    doomed: dict[str, bool] = {}
    for directory in _journals(storage, run):
        for event in read_events(storage, directory, COMMITS):
            if event.get("event") in ("deleting", "spared") and ref.name in event.get("checkpoints", ()):
                doomed[directory] = event["event"] == "deleting"
    return any(doomed.values())
