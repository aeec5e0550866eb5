"""Who may write, and from where to go on: claims, fencing by listing, the resume point.

The danger is the zombie: a worker of an older attempt that was cut off, believes itself alive, and writes. So every
attempt has a directory of its own, claimed before anything is read, and what counts as the run's checkpoints is decided
by position alone:

1. *Claim*: list `attempts/`, create `NNNN-nonce/claim.json` with the next number. Claims are totally ordered by
   (number, nonce), never reused, never deleted.
2. *Look again*: a higher claim than mine means superseded.
3. *Base*: only now read. The highest lower attempt with a valid manifest; candidates are its checkpoints and the
   lineage that its newest manifest names. Reading before the claim loses commits that are acknowledged in between.
4. After each commit list claims once more, and acknowledge only if mine is still the highest.

A zombie's commit is thus never acknowledged once its successor has claimed, and never accepted once the successor has
committed. Being superseded is an outcome, not an exception.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.checkpointing.format.layout import (
    MANIFEST,
    AttemptId,
    CheckpointRef,
    parse_checkpoint,
    prune_dir,
    prunes_dir,
)
from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import CommitEvent, DeleteEvent, parse_event
from outlast.checkpointing.run_store.journal import COMMITS, read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage, read_bytes, walk


@dataclass(frozen=True, slots=True)
class RejectedCheckpoint:
    """A checkpoint that does not count, and why."""

    ref: CheckpointRef
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """The checkpoints that count, as one look at the storage shows them.

    Attributes:
        owner: The attempt whose commits decide, or None when nothing was ever committed.
        accepted: Manifests of the owner and of its lineage, newest first.
        rejected: Commits whose manifest is damaged, or has gone although nobody deleted it; newest first.
        doubtful: Those that are to be resumed from only if no other one is whole.
    """

    owner: AttemptId | None
    accepted: tuple[Manifest, ...]
    rejected: tuple[RejectedCheckpoint, ...]
    doubtful: frozenset[CheckpointRef] = frozenset()

    @property
    def candidates(self) -> list[tuple[int, Manifest]]:
        """The accepted ones, each with its place among them, in the order in which to resume from them."""
        return sorted(enumerate(self.accepted), key=lambda item: item[1].ref in self.doubtful)

    @property
    def declaration(self) -> Mapping[str, Any]:
        """What the newest accepted checkpoint says of the settings it was made with; empty when there is none."""
        declared: Mapping[str, Any] = self.accepted[0].extra.get("declaration", {}) if self.accepted else {}
        return declared

    @property
    def is_fresh(self) -> bool:
        """True if no commit was ever made."""
        return not self.accepted and not self.rejected


def read_manifest(store: RunStore, ref: CheckpointRef) -> Manifest:
    """The manifest of one checkpoint.

    Raises:
        FileNotFoundError: There is none.
        ManifestError: It is damaged, or belongs to another checkpoint.
        StorageError: The read failed.
    """
    manifest = Manifest.parse(read_bytes(store, f"{store.checkpoint_dir(ref)}/{MANIFEST}"))
    if manifest.ref != ref:
        raise ManifestError(f"it belongs to {manifest.ref}")
    return manifest


def read_catalog(
    storage: Storage, run: str, below: AttemptId | None = None, doubtful: Collection[CheckpointRef] = ()
) -> Catalog:
    """`build_catalog` of a run now."""
    return build_catalog(RunStore(storage, run), below, doubtful)


def build_catalog(store: RunStore, below: AttemptId | None = None, doubtful: Collection[CheckpointRef] = ()) -> Catalog:
    """What counts as the run's checkpoints.

    Args:
        store: The run.
        below: Only look at lower attempts, as an attempt does that chooses its own resume point.
        doubtful: The attribute of that name.

    Raises:
        StorageError: A listing or a read failed, which proves nothing.
    """
    rejected: list[RejectedCheckpoint] = []
    for attempt in reversed(list_attempts(store)):
        if below is not None and attempt >= below:
            continue
        valid, refused = _read_attempt(store, attempt)
        rejected += refused
        if valid:
            older, damaged, missing = _read_manifests(store, valid[0].lineage)
            rejected += damaged + _lost_commits(store, missing)
            refused = sorted(rejected, key=_newest_first)
            return Catalog(attempt, (*valid, *older), tuple(refused), frozenset(doubtful))
    return Catalog(None, (), tuple(sorted(rejected, key=_newest_first)))


def _newest_first(item: RejectedCheckpoint) -> tuple[int, int, str]:
    return (-item.ref.step, -item.ref.attempt.number, item.ref.attempt.nonce)


def _read_attempt(store: RunStore, attempt: AttemptId) -> tuple[list[Manifest], list[RejectedCheckpoint]]:
    """An attempt's own commits: the whole ones, newest first, and those that are damaged or lost."""
    directory = store.attempt_dir(attempt)
    folders = [entry.name for entry in store.list(directory) if entry.num_bytes is None]
    steps = {step for step in map(parse_checkpoint, folders) if step is not None}
    committed = _standing_commits(store, directory)
    refs = [CheckpointRef(step, attempt) for step in steps | committed]
    valid, damaged, missing = _read_manifests(store, refs)
    return valid, damaged + _lost_commits(store, [ref for ref in missing if ref.step in committed])


def _read_manifests(
    store: RunStore, refs: Sequence[CheckpointRef]
) -> tuple[list[Manifest], list[RejectedCheckpoint], list[CheckpointRef]]:
    """Those that are whole, those that are damaged, and those that are not there; newest first."""
    valid: list[Manifest] = []
    damaged: list[RejectedCheckpoint] = []
    missing: list[CheckpointRef] = []
    for ref in sorted(refs, reverse=True):
        try:
            valid.append(read_manifest(store, ref))
        except FileNotFoundError:
            missing.append(ref)
        except ManifestError as error:
            damaged.append(RejectedCheckpoint(ref, (f"{MANIFEST}: {error}",)))
    return valid, damaged, missing


def _lost_commits(store: RunStore, missing: Sequence[CheckpointRef]) -> list[RejectedCheckpoint]:
    """Of the commits whose manifest is not there, those that nobody deleted."""
    lost = set(missing) - deletions(store) if missing else set()
    if lost:  # or whose deletion the journal told after it was read
        lost -= deletions(store.fresh())
    return [RejectedCheckpoint(ref, (_MISSING_MANIFEST,)) for ref in missing if ref in lost]


_MISSING_MANIFEST = f"{MANIFEST}: missing, although this checkpoint was committed and never deleted"


def _standing_commits(store: RunStore, directory: str) -> set[int]:
    """Steps that the attempt's own journal says are committed and that it has not deleted since."""
    standing: set[int] = set()
    for event in map(parse_event, read_events(store, directory, COMMITS)):
        match event:
            case CommitEvent(step=step):
                standing.add(step)
            case DeleteEvent(step=step, attempt=attempt) if attempt == directory.rsplit("/", 1)[-1]:
                standing.discard(step)
    return standing


def deletions(store: RunStore) -> set[CheckpointRef]:
    """Every checkpoint that some attempt, or a prune from outside, says it deleted."""
    return {
        CheckpointRef(event.step, target)
        for directory in commit_journals(store)
        for event in map(parse_event, read_events(store, directory, COMMITS))
        if isinstance(event, DeleteEvent) and (target := AttemptId.parse(event.attempt)) is not None
    }


def delete_checkpoint(store: RunStore, ref: CheckpointRef) -> None:
    """Deletes the manifest first: from then on the checkpoint does not count. Raises StorageError."""
    storage, directory = store.storage, store.checkpoint_dir(ref)
    storage.delete(f"{directory}/{MANIFEST}")
    for entry in list(walk(storage, directory)):
        storage.delete(f"{directory}/{entry.name}")


def commit_journals(store: RunStore) -> list[str]:
    """The directories of all who may commit or delete: the attempts, and prunes from outside."""
    prunes = [entry.name for entry in store.list(prunes_dir(store.run)) if entry.num_bytes is None]
    return [
        *(store.attempt_dir(attempt) for attempt in list_attempts(store)),
        *(prune_dir(store.run, name) for name in prunes),
    ]


def run_events(store: RunStore) -> Iterator[tuple[AttemptId, dict[str, Any]]]:
    """Every attempt's events, lowest attempt first. A step that was done again appears once for each time."""
    for attempt in list_attempts(store):
        for event in read_events(store, store.attempt_dir(attempt)):
            yield attempt, event
