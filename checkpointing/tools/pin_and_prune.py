"""Pin, unpin and prune: the commands that write into a run from outside.

The run may be active meanwhile. A granted pin holds (see `run_store/deletion.py`). A prune follows the rules of an
attempt's own retention: only if the highest claim has two commits, never its newest two, the manifest first. Its
deletions are events in a journal of its own, so that a deleted checkpoint is not reported as damaged.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from outlast.checkpointing.errors import ConfigError, NoCheckpointError, NotAFileError, StorageError
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef, pin_path, prune_dir
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.run_store.claims import list_attempts, list_checkpoints_of
from outlast.checkpointing.run_store.deletion import (
    delete_checkpoint,
    deletions,
    exempt_pinned,
    is_being_deleted,
    list_pins,
)
from outlast.checkpointing.run_store.events import DeleteEvent, SparedEvent
from outlast.checkpointing.run_store.journal import COMMITS, Journal
from outlast.checkpointing.run_store.retention_policy import KEEP_LAST_MIN, Retention, RetentionCandidate
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import walk
from outlast.checkpointing.tools.query import load_catalog, pick_manifest


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a prune would delete, or has deleted."""

    highest: AttemptId  #: the attempt whose two commits permit it
    doomed: tuple[Manifest, ...]  #: checkpoints to delete, newest first
    kept: tuple[Manifest, ...]  #: checkpoints that stay, newest first
    remains: tuple[CheckpointRef, ...]  #: checkpoints whose deletion was interrupted
    left: tuple[str, ...] = ()  #: paths of links and other special files, which a prune never touches

    @property
    def num_bytes(self) -> int:
        """Bytes of the doomed checkpoints, without the remains."""
        return sum(manifest.num_bytes for manifest in self.doomed)


def plan_prune(store: RunStore, retention: Retention) -> PrunePlan:
    """Plan a prune to a policy. Raises ConfigError unless the highest claim has two commits, and as `load_catalog`."""
    accepted = load_catalog(store).accepted
    highest = list_attempts(store)[-1]
    own = [manifest.ref for manifest in accepted if manifest.ref.attempt == highest]
    if len(own) < KEEP_LAST_MIN:
        raise ConfigError(
            f"run {store.run!r} cannot be pruned: its newest attempt {highest} has {len(own)} of the {KEEP_LAST_MIN} "
            "commits that make it safe to delete older ones",
            hint="continue the run until it has saved twice; a finished run cannot be pruned",
        )
    keep = retention.keep([RetentionCandidate(item.ref, item.metrics) for item in accepted], list_pins(store))
    keep |= set(own[:KEEP_LAST_MIN])
    return PrunePlan(
        highest,
        tuple(item for item in accepted if item.ref not in keep),
        tuple(item for item in accepted if item.ref in keep),
        _remains(store, {item.ref for item in accepted}),
        tuple(_special_files(store)),
    )


def _special_files(store: RunStore) -> Iterator[str]:
    """Yield each link and other special file in the directories of checkpoints, and in their place, with its kind."""
    for attempt in list_attempts(store):
        directory = store.attempt_dir(attempt)
        for entry in walk(store.storage, directory):
            if entry.special:
                yield f"{store.storage.url}/{directory}/{entry.name}: {entry.special}"


def _remains(store: RunStore, accepted: set[CheckpointRef]) -> tuple[CheckpointRef, ...]:
    deleted = deletions(store) - accepted
    existing = {ref for attempt in {ref.attempt for ref in deleted} for ref in list_checkpoints_of(store, attempt)}
    # Object stores may still list a directory after its last file is deleted.
    return tuple(sorted(ref for ref in existing & deleted if any(walk(store.storage, store.checkpoint_dir(ref)))))


def prune(store: RunStore, plan: PrunePlan) -> PrunePlan:
    """Execute a plan and return the outcome: checkpoints that were pinned meanwhile are among those kept.

    Raises StorageError if the storage failed or a new attempt began meanwhile; the remaining checkpoints are intact.
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
        _delete(store, ref)
    for ref in plan.remains:
        _delete(store, ref)
    every = sorted((*plan.doomed, *plan.kept), key=lambda manifest: manifest.ref, reverse=True)
    return PrunePlan(
        plan.highest,
        tuple(manifest for manifest in plan.doomed if manifest.ref not in spared),
        tuple(manifest for manifest in every if manifest.ref not in set(doomed)),
        plan.remains,
        plan.left,
    )


def _delete(store: RunStore, ref: CheckpointRef) -> None:
    with suppress(NotAFileError):  # the plan names them
        delete_checkpoint(store, ref)


def pin(store: RunStore, which: str, retention: Retention) -> CheckpointRef:
    """Pin a checkpoint, named as for `pick_manifest`.

    Raises NoCheckpointError if it does not exist or retention is deleting it, and StorageError.
    """
    ref = pick_manifest(store, which, retention).ref
    if ref in list_pins(store):
        return ref
    store.storage.put(pin_path(store.run, ref), [json.dumps({"pinned_at": time.time()}).encode() + b"\n"])
    is_doomed = is_being_deleted(store, ref)
    if is_doomed or ref not in {manifest.ref for manifest in load_catalog(store.fresh()).accepted}:
        store.storage.delete(pin_path(store.run, ref))
        verb = "is being" if is_doomed else "was"
        raise NoCheckpointError(
            f"{ref} of run {store.run!r} {verb} deleted by retention just now; it is not pinned",
            hint="pin a newer one: `outlast checkpoints ls` lists them",
        )
    return ref


def unpin(store: RunStore, which: str) -> CheckpointRef:
    """Remove a pin, named by step or step@attempt; the next retention may then delete the checkpoint.

    Raises ConfigError if no such checkpoint is pinned, and as `load_catalog`.
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
