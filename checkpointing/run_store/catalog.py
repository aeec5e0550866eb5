"""The catalog: which checkpoints of a run count, and from which one an attempt resumes.

The danger is the zombie: a worker of an older attempt that was cut off, is still running, and writes. So every attempt
has a directory of its own, claimed before anything is read, and only the order of claims decides what counts:

1. *Claim*: list `attempts/`, create `NNNN-nonce/claim.json` with the next number. Claims are totally ordered by
   (number, nonce), never reused, never deleted.
2. *Check again*: a higher claim than one's own means superseded.
3. *Base*: only now read. The highest lower attempt with a valid manifest; candidates are its checkpoints and the
   lineage that its newest manifest names. Reading before the claim loses commits that are acknowledged in between.
4. After each commit list claims once more, and acknowledge only if one's own is still the highest.

So a zombie's commit is never acknowledged once its successor has claimed, and never accepted once the successor has
committed. Being superseded is an outcome, not an exception. Nothing here writes, except `delete_checkpoint`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.checkpointing.errors import DamagedError
from outlast.checkpointing.format.layout import MANIFEST, AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.run_store.claims import list_attempts, list_checkpoints_of
from outlast.checkpointing.run_store.deletion import deletions
from outlast.checkpointing.run_store.events import CommitEvent, DeleteEvent, parse_event
from outlast.checkpointing.run_store.journal import COMMITS, read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage, read_bytes


@dataclass(frozen=True, slots=True)
class RejectedCheckpoint:
    """A checkpoint that does not count, and why."""

    ref: CheckpointRef
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """The checkpoints that count, from one read of the storage."""

    owner: AttemptId | None  #: the attempt whose commits decide, or None when nothing was ever committed
    accepted: tuple[Manifest, ...]  #: manifests of the owner and of its lineage, newest first
    #: Commits whose manifest is damaged, or missing without a recorded deletion; newest first
    rejected: tuple[RejectedCheckpoint, ...]
    doubtful: frozenset[CheckpointRef] = frozenset()  #: checkpoints to resume from only if no other one is intact

    @property
    def candidates(self) -> list[tuple[int, Manifest]]:
        """The accepted ones with their index in `accepted`, in the order in which to resume from them."""
        return sorted(enumerate(self.accepted), key=lambda item: item[1].ref in self.doubtful)

    @property
    def declaration(self) -> Mapping[str, Any]:
        """The settings in the newest accepted checkpoint; empty if there is none."""
        declared: Mapping[str, Any] = self.accepted[0].extra.get("declaration", {}) if self.accepted else {}
        return declared

    @property
    def is_fresh(self) -> bool:
        """Whether the run has no commit."""
        return not self.accepted and not self.rejected


def read_manifest(store: RunStore, ref: CheckpointRef) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises FileNotFoundError, ManifestError if it is damaged or belongs to another checkpoint, and StorageError.
    """
    try:
        manifest = Manifest.parse(read_bytes(store, f"{store.checkpoint_dir(ref)}/{MANIFEST}"))
    except DamagedError as error:
        raise ManifestError(error.message) from error
    if manifest.ref != ref:
        raise ManifestError(f"it belongs to {manifest.ref}")
    return manifest


def read_catalog(
    storage: Storage, run: str, below: AttemptId | None = None, doubtful: Collection[CheckpointRef] = ()
) -> Catalog:
    """Read the catalog of a run; see `build_catalog`."""
    return build_catalog(RunStore(storage, run), below, doubtful)


def build_catalog(store: RunStore, below: AttemptId | None = None, doubtful: Collection[CheckpointRef] = ()) -> Catalog:
    """Build the catalog of a run. Raises StorageError if a listing or a read fails, which proves nothing.

    With `below` only lower attempts count, as for an attempt that chooses its own resume point.
    """
    owner: AttemptId | None = None
    accepted: list[Manifest] = []
    rejected: list[RejectedCheckpoint] = []
    for attempt in reversed(list_attempts(store)):
        if below is not None and attempt >= below:
            continue
        valid, refused = _read_attempt(store, attempt)
        rejected += refused
        if valid:
            older, damaged, missing = _read_manifests(store, valid[0].lineage)
            rejected += damaged + _lost_commits(store, missing)
            owner, accepted = attempt, valid + older
            break
    rejected.sort(key=lambda item: item.ref, reverse=True)
    return Catalog(owner, tuple(accepted), tuple(rejected), frozenset(doubtful))


def _read_attempt(store: RunStore, attempt: AttemptId) -> tuple[list[Manifest], list[RejectedCheckpoint]]:
    """Return an attempt's own commits: the intact ones, newest first, and those that are damaged or lost."""
    directory = store.attempt_dir(attempt)
    committed = {CheckpointRef(step, attempt) for step in _standing_commits(store, directory)}
    valid, damaged, missing = _read_manifests(store, committed.union(list_checkpoints_of(store, attempt)))
    return valid, damaged + _lost_commits(store, [ref for ref in missing if ref in committed])


def _read_manifests(
    store: RunStore, refs: Collection[CheckpointRef]
) -> tuple[list[Manifest], list[RejectedCheckpoint], list[CheckpointRef]]:
    """Return the intact, the damaged and the missing ones, each newest first."""
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
    """Return commits whose manifest is missing and whose deletion is not recorded."""
    lost = set(missing) - deletions(store) if missing else set()
    if lost:  # a deletion may have been recorded after the journal was read
        lost -= deletions(store.fresh())
    reason = f"{MANIFEST}: missing, although this checkpoint was committed and never deleted"
    return [RejectedCheckpoint(ref, (reason,)) for ref in missing if ref in lost]


def _standing_commits(store: RunStore, directory: str) -> set[int]:
    """Return the steps that an attempt has committed and not deleted since, by its own journal."""
    standing: set[int] = set()
    for event in map(parse_event, read_events(store, directory, COMMITS)):
        match event:
            case CommitEvent(step=step):
                standing.add(step)
            case DeleteEvent(step=step, attempt=attempt) if attempt == directory.rsplit("/", 1)[-1]:
                standing.discard(step)
    return standing


def run_events(store: RunStore) -> Iterator[tuple[AttemptId, dict[str, Any]]]:
    """Yield every attempt's events, lowest attempt first. A repeated step appears each time."""
    for attempt in list_attempts(store):
        for event in read_events(store, store.attempt_dir(attempt)):
            yield attempt, event
