"""What a person decides about keeping: pin, unpin, prune. The only verbs that write into a run from outside it.

A run may be at work meanwhile. A pin that was granted holds (`pins.py` says why). A prune keeps to the rules of an
attempt's own retention: only when the highest claim holds two commits, never its newest two, the manifest first; and
its deletions are events in a journal of its own, so that a checkpoint that is not there is not taken for a damaged one.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass

from outlast.checkpointing.errors import ConfigError, NoCheckpointError, StorageError
from outlast.checkpointing.format.layout import (
    AttemptId,
    CheckpointRef,
    parse_checkpoint,
    pin_path,
    prune_dir,
)
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.run_store.catalog import delete_checkpoint, deletions
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import DeleteEvent, SparedEvent
from outlast.checkpointing.run_store.journal import COMMITS, Journal
from outlast.checkpointing.run_store.pins import exempt_pinned, is_being_deleted, list_pins
from outlast.checkpointing.run_store.retention import KEEP_LAST_MIN, Retention, RetentionCandidate
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import walk
from outlast.checkpointing.tools.query import load_catalog, pick_manifest


def pin(store: RunStore, which: str, retention: Retention) -> CheckpointRef:
    """Exempts a checkpoint from retention, until it is unpinned. `which` is as `pick_manifest` takes it.

    Raises:
        NoCheckpointError: There is no such checkpoint, or retention was about to delete it; it is not pinned then.
        StorageError: The storage failed.
    """
    ref = pick_manifest(store, which, retention).ref
    if ref in list_pins(store):
        return ref
    store.storage.put(pin_path(store.run, ref), [json.dumps({"pinned_at": time.time()}).encode() + b"\n"])
    going = is_being_deleted(store, ref)
    if going or ref not in {manifest.ref for manifest in load_catalog(store.fresh()).accepted}:
        store.storage.delete(pin_path(store.run, ref))
        gone = "is being" if going else "was"
        raise NoCheckpointError(
            f"{ref} of run {store.run!r} {gone} deleted by retention just now; it is not pinned",
            hint="pin a newer one: `outlast checkpoints ls` lists them",
        )
    return ref


def unpin(store: RunStore, which: str) -> CheckpointRef:
    """Takes a pin back; the checkpoint goes when retention next lets it. `which` is a step or step@attempt.

    Raises:
        ConfigError: No such checkpoint is pinned, or there is no such run.
        StorageError: The storage failed.
    """
    load_catalog(store)
    pins = sorted(list_pins(store), reverse=True)
    for ref in pins:
        if which in (str(ref.step), ref.name):
            store.storage.delete(pin_path(store.run, ref))
            return ref
    known = ", ".join(ref.name for ref in pins) or "none"
    raise ConfigError(
        f"{which!r} is not a pinned checkpoint of run {store.run!r}; pinned: {known}",
        hint="`outlast checkpoints ls RUN` marks those that are pinned",
    )


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a prune would delete, or has deleted.

    Attributes:
        highest: The attempt whose two commits permit it.
        doomed: Checkpoints that go, newest first.
        kept: Checkpoints that stay, newest first.
        remains: What an interrupted deletion left of checkpoints that do not count any more.
    """

    highest: AttemptId
    doomed: tuple[Manifest, ...]
    kept: tuple[Manifest, ...]
    remains: tuple[CheckpointRef, ...]

    @property
    def num_bytes(self) -> int:
        """What deleting the doomed sets free; the remains come on top."""
        return sum(manifest.num_bytes for manifest in self.doomed)


def plan_prune(store: RunStore, retention: Retention) -> PrunePlan:
    """What pruning to a policy would delete.

    Raises:
        ConfigError: The highest claim holds fewer than two commits, or there is no such run.
        StorageError: The storage failed.
    """
    accepted = load_catalog(store).accepted
    highest = list_attempts(store)[-1]
    own = [manifest.ref for manifest in accepted if manifest.ref.attempt == highest]
    if len(own) < KEEP_LAST_MIN:
        raise ConfigError(
            f"run {store.run!r} cannot be pruned: its newest attempt {highest} holds {len(own)} of the {KEEP_LAST_MIN} "
            "commits that make it safe to delete older ones",
            hint="let the run go on until it has saved twice; one that is done keeps what it has",
        )
    keep = retention.keep([RetentionCandidate(item.ref, item.metrics) for item in accepted], list_pins(store))
    keep |= set(own[:KEEP_LAST_MIN])
    return PrunePlan(
        highest,
        tuple(item for item in accepted if item.ref not in keep),
        tuple(item for item in accepted if item.ref in keep),
        _remains(store, {item.ref for item in accepted}),
    )


def _remains(store: RunStore, accepted: set[CheckpointRef]) -> tuple[CheckpointRef, ...]:
    gone = deletions(store) - accepted
    found = {
        CheckpointRef(step, attempt)
        for attempt in {ref.attempt for ref in gone}
        for entry in store.list(store.attempt_dir(attempt))
        if entry.num_bytes is None and (step := parse_checkpoint(entry.name)) is not None
    }
    # Object stores may go on listing a directory that holds no file any more.
    return tuple(sorted(ref for ref in found & gone if any(walk(store.storage, store.checkpoint_dir(ref)))))


def prune(store: RunStore, plan: PrunePlan) -> PrunePlan:
    """Carries a plan out. Returns what was done: checkpoints that were pinned meanwhile have moved to those kept.

    Raises:
        StorageError: The storage failed, or a new attempt began meanwhile; what is left is whole.
    """
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
    journal = Journal(store.storage, prune_dir(store.run, name), 0, stream=COMMITS, flush_s=0)
    doomed, spared = exempt_pinned(store, journal, [manifest.ref for manifest in plan.doomed])
    for count, ref in enumerate(doomed):
        if list_attempts(store.fresh())[-1] != plan.highest:
            journal.write(SparedEvent(checkpoints=tuple(item.name for item in doomed[count:])))
            raise StorageError(
                f"run {store.run!r}: a new attempt began after {count} of {len(doomed)} deletions; the rest stays",
                hint="prune again once it has saved twice",
            )
        journal.write(DeleteEvent(step=ref.step, attempt=str(ref.attempt)))
        delete_checkpoint(store, ref)
    for ref in plan.remains:
        delete_checkpoint(store, ref)
    every = sorted((*plan.doomed, *plan.kept), key=lambda manifest: manifest.ref, reverse=True)
    return PrunePlan(
        plan.highest,
        tuple(manifest for manifest in plan.doomed if manifest.ref not in spared),
        tuple(manifest for manifest in every if manifest.ref not in set(doomed)),
        plan.remains,
    )
