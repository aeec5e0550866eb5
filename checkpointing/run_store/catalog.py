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
committed. Being superseded is an outcome, not an exception. Nothing here writes.

What cannot be read proves nothing: it neither counts nor is damaged. It hides no other checkpoint, but an attempt must
not resume from one that comes after it (`Catalog.unread_before`). A directory or a link that leads nowhere in the place
of a file is proof, and damage.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from outlast.checkpointing.errors import (
    DamagedError,
    NoCheckpointError,
    NotAFileError,
    StorageError,
    StorageRefused,
)
from outlast.checkpointing.format.layout import MANIFEST, AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.run_store.claims import list_attempts, list_checkpoints_of
from outlast.checkpointing.run_store.deletion import deletions
from outlast.checkpointing.run_store.events import (
    CommitEvent,
    DeleteEvent,
    EvalEvent,
    RegroupedEvent,
    Rejection,
    StepEvent,
    parse_event,
)
from outlast.checkpointing.run_store.journal import COMMITS, read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage, read_bytes
from outlast.checkpointing.storage.location import Location
from outlast.checkpointing.storage.retry import retry


@dataclass(frozen=True, slots=True)
class RejectedCheckpoint:
    """A checkpoint that does not count, and why."""

    ref: CheckpointRef
    reasons: tuple[str, ...]

    @property
    def record(self) -> Rejection:
        """The same for an event."""
        return Rejection(str(self.ref), self.reasons)


@dataclass(frozen=True, slots=True)
class UnreadEntry:
    """A manifest, or the directory of an attempt, that could not be read, and why."""

    attempt: AttemptId
    step: int | None  #: the step of the manifest's checkpoint; None for the attempt's directory
    reason: str
    is_refusal: bool  #: a person must act

    def is_named(self, name: str) -> bool:
        """Return whether this is the checkpoint that a step or step@attempt names."""
        return self.step is not None and name in (str(self.step), CheckpointRef(self.step, self.attempt).name)

    def __str__(self) -> str:
        return str(self.attempt if self.step is None else CheckpointRef(self.step, self.attempt))


@dataclass(frozen=True, slots=True)
class Catalog:
    """The checkpoints that count, from one read of the storage."""

    owner: AttemptId | None  #: the attempt whose commits decide, or None when nothing was ever committed
    accepted: tuple[Manifest, ...]  #: manifests of the owner and of its lineage, newest first
    #: Commits whose manifest is damaged, or missing without a recorded deletion; newest first
    rejected: tuple[RejectedCheckpoint, ...]
    doubtful: frozenset[CheckpointRef] = frozenset()  #: checkpoints to resume from only if no other one is intact
    unread: tuple[UnreadEntry, ...] = ()  #: entries that could not be read, which proves nothing

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
        return not self.accepted and not self.rejected and not self.unread

    @property
    def unread_refs(self) -> set[CheckpointRef]:
        """The checkpoints whose manifest could not be read; they may be intact."""
        return {CheckpointRef(item.step, item.attempt) for item in self.unread if item.step is not None}

    def unread_before(self, ref: CheckpointRef | None) -> list[UnreadEntry]:
        """Return what could not be read and may hold a newer state than `ref`, or any if `ref` is None."""
        return [item for item in self.unread if ref is None or self._precedes(item, ref)]

    def _precedes(self, item: UnreadEntry, ref: CheckpointRef) -> bool:
        if item.step is None or self.owner is None or item.attempt > self.owner:
            return True  # an attempt's commit ends those of all lower attempts, whatever its step
        return CheckpointRef(item.step, item.attempt) > ref


def check_unread(store: RunStore, catalog: Catalog, ref: CheckpointRef | None) -> None:
    """Raise StorageError if something that could not be read may be newer than `ref`: it is not passed over."""
    if unread := catalog.unread_before(ref):
        lines = "\n".join(f"  {item}: {item.reason}" for item in unread)
        refused = any(item.is_refusal for item in unread)
        raise (StorageRefused if refused else StorageError)(
            f"run {store.run!r} does not resume from {f'the older {ref}' if ref else 'the beginning'}, because a newer "
            f"state cannot be read\n{lines}",
            hint=f"make it readable, then start again; `outlast checkpoints verify {store.url}` names it. To continue "
            "without it, move its directory away",
        )


def none_intact(store: RunStore, rejected: Sequence[RejectedCheckpoint]) -> NoCheckpointError:
    """Return the error of a run of which every checkpoint was rejected."""
    lines = "\n".join(f"  {item.ref}: {'; '.join(item.reasons)}" for item in rejected)
    return NoCheckpointError(
        f"run {store.run!r} has commits, but no checkpoint is intact; nothing was changed\n{lines}",
        hint=f"`outlast checkpoints verify {store.url}` reads every byte again; restore the files from a copy, or "
        "start a new run under another name",
    )


def read_manifest(store: RunStore, ref: CheckpointRef) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises FileNotFoundError, ManifestError if it is damaged or belongs to another checkpoint, and StorageError.
    """
    manifest = read_manifest_in(store, store.checkpoint_dir(ref))
    if manifest.ref != ref:
        raise ManifestError(f"it belongs to {manifest.ref}")
    return manifest


def read_manifest_in(store: RunStore, directory: str) -> Manifest:
    """Read the manifest in a directory. Raises FileNotFoundError, ManifestError if it is damaged, and StorageError."""
    try:
        return Manifest.parse(read_bytes(store, f"{directory}/{MANIFEST}"))
    except NotAFileError as error:
        raise ManifestError(f"it is not a file ({error.message})") from error
    except DamagedError as error:
        raise ManifestError(error.message) from error


def read_catalog(
    storage: Storage | Location, run: str, below: AttemptId | None = None, doubtful: Collection[CheckpointRef] = ()
) -> Catalog:
    """Read the catalog of a run; see `build_catalog`."""
    return build_catalog(RunStore(storage, run), below, doubtful)


def build_catalog(store: RunStore, below: AttemptId | None = None, doubtful: Collection[CheckpointRef] = ()) -> Catalog:
    """Build the catalog of a run. Raises StorageError if the attempts cannot be listed.

    With `below` only lower attempts count, as for an attempt that chooses its own resume point.
    """
    found = _Reading(store)
    owner: AttemptId | None = None
    accepted: list[Manifest] = []
    for attempt in reversed(list_attempts(store)):
        if (below is None or attempt < below) and (valid := found.commits_of(attempt)):
            owner, accepted = attempt, valid + found.lineage_of(valid[0])
            break
    found.rejected.sort(key=lambda item: item.ref, reverse=True)
    return Catalog(owner, tuple(accepted), tuple(found.rejected), frozenset(doubtful), tuple(found.unread))


class _Reading:
    """One read of a run's manifests; collects what is damaged, and what cannot be read."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self.rejected: list[RejectedCheckpoint] = []
        self.unread: list[UnreadEntry] = []

    def commits_of(self, attempt: AttemptId) -> list[Manifest]:
        """Return an attempt's own intact commits, newest first."""
        directory = self._store.attempt_dir(attempt)
        listed: list[CheckpointRef] = []
        try:
            listed = retry(lambda: list_checkpoints_of(self._store, attempt))
        except NotAFileError as error:
            self._store.unreadable[directory] = error.message
        except StorageError as error:
            self._add_unread(attempt, None, directory, error)
            return []
        committed = {CheckpointRef(step, attempt) for step in _standing_commits(self._store, directory)}
        valid, missing = self._manifests(committed.union(listed))
        self._add_lost([ref for ref in missing if ref in committed])
        return valid

    def lineage_of(self, manifest: Manifest) -> list[Manifest]:
        """Return the intact checkpoints of a commit's lineage, newest first."""
        valid, missing = self._manifests(manifest.lineage)
        self._add_lost(missing)
        return valid

    def _manifests(self, refs: Collection[CheckpointRef]) -> tuple[list[Manifest], list[CheckpointRef]]:
        """Return the intact and the missing ones, each newest first."""
        valid: list[Manifest] = []
        missing: list[CheckpointRef] = []
        for ref in sorted(refs, reverse=True):
            try:
                valid.append(retry(partial(read_manifest, self._store, ref)))
            except FileNotFoundError:
                missing.append(ref)
            except ManifestError as error:
                self.rejected.append(RejectedCheckpoint(ref, (f"{MANIFEST}: {error}",)))
            except StorageError as error:
                self._add_unread(ref.attempt, ref.step, f"{self._store.checkpoint_dir(ref)}/{MANIFEST}", error)
        return valid, missing

    def _add_unread(self, attempt: AttemptId, step: int | None, path: str, error: StorageError) -> None:
        self.unread.append(UnreadEntry(attempt, step, error.message, error.permanent))
        self._store.unreadable[path] = error.message

    def _add_lost(self, missing: Sequence[CheckpointRef]) -> None:
        """Reject commits whose manifest is missing and whose deletion is not recorded."""
        lost = set(missing) - deletions(self._store) if missing else set()
        if lost:  # a deletion may have been recorded after the journal was read
            lost -= deletions(self._store.fresh())
        reason = f"{MANIFEST}: missing, although this checkpoint was committed and never deleted"
        self.rejected += [RejectedCheckpoint(ref, (reason,)) for ref in missing if ref in lost]


def _standing_commits(store: RunStore, directory: str) -> set[int]:
    """Return the steps that an attempt has committed and not deleted since, by its own journal."""
    standing: set[int] = set()
    bodies: list[dict[str, Any]] = []
    with store.going_on(f"{directory}/{COMMITS}-0"):  # manifests decide; it only shows which of them are lost
        bodies = retry(lambda: list(read_events(store, directory, COMMITS)))
    for event in map(parse_event, bodies):
        match event:
            case CommitEvent(step=step):
                standing.add(step)
            case DeleteEvent(step=step, attempt=attempt) if attempt == directory.rsplit("/", 1)[-1]:
                standing.discard(step)
    return standing


def run_events(store: RunStore) -> Iterator[tuple[AttemptId, dict[str, Any]]]:
    """Yield every attempt's events, lowest attempt first. A step that was done again appears each time.

    A step that several attempts record, of which one continues in memory what the other held, appears once: the member
    that is lost may have recorded it too, before or after the others did so in its place.
    """
    newest: dict[str, int] = {}
    for attempt in list_attempts(store):
        is_first = True
        for event in read_events(store, store.attempt_dir(attempt)):
            kind, step = str(event["event"]), event.get("step")
            if is_first and kind != RegroupedEvent.kind:
                newest.clear()
            is_first = False
            if kind in (StepEvent.kind, EvalEvent.kind) and type(step) is int:
                if step <= newest.get(kind, -1):
                    continue
                newest[kind] = step
            yield attempt, event
