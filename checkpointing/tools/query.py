"""Queries of a run's checkpoints: list, show, pick, verify. Never writes.

A run may delete checkpoints while they are read. So a failed read is only reported as damage if the manifest still
exists afterwards and the owner of the run is unchanged; otherwise the query restarts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from outlast.checkpointing.error_hints import did_you_mean
from outlast.checkpointing.errors import ConfigError, DamagedError, NoCheckpointError, StorageError
from outlast.checkpointing.format.layout import MANIFEST, RECORD, AttemptId, CheckpointRef, pins_dir
from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.run_store.catalog import Catalog, UnreadEntry, build_catalog, read_manifest, read_manifest_in
from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.deletion import list_pins
from outlast.checkpointing.run_store.retention_policy import Retention, RetentionCandidate
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import list_directories, read_bytes
from outlast.checkpointing.storage.retry import retry

_MAX_PASSES = 5  # over a run that changes while it is read


@dataclass(frozen=True, slots=True)
class ResolvedCheckpoint:
    """The directory and manifest of a checkpoint, or of the finished model, that a user named."""

    store: RunStore
    directory: str
    manifest: Manifest

    @property
    def url(self) -> str:
        return f"{self.store.storage.url}/{self.directory}"

    @property
    def declaration(self) -> Mapping[str, Any] | None:
        """The settings it was made with, for the finished model those of its checkpoint; None if they are unknown."""
        manifest = self.manifest
        if "declaration" not in manifest.extra:
            try:
                manifest = read_manifest(self.store, manifest.ref)
            except (FileNotFoundError, ManifestError):
                return None
        declared: Mapping[str, Any] | None = manifest.extra.get("declaration")
        return declared


def load_catalog(store: RunStore) -> Catalog:
    """Build the catalog of an existing run.

    Raises ConfigError if the run does not exist, NoCheckpointError if no worker has claimed it yet, and StorageError.
    """
    existing_attempts(store)
    return retry(lambda: build_catalog(store))


def existing_attempts(store: RunStore) -> list[AttemptId]:
    """Return the attempts of an existing run, oldest first. Raises as `load_catalog`."""
    if not (attempts := list_attempts(store)):
        run, url = store.run, store.storage.url
        names = retry(lambda: list_directories(store.storage, ""))
        if run in names and retry(lambda: list_launches(store)):
            raise NoCheckpointError(
                f"run {run!r} in {url} has begun, but no worker has claimed it: there is no checkpoint yet",
                hint="start it again with `outlast train` and its run file",
            )
        others = [name for name in names if name != run and not name.startswith(".")]
        raise ConfigError(
            f"there is no run {run!r} in {url}{did_you_mean(run, others)}",
            hint="name a run's directory, its run file, or its name with --storage; `outlast list` shows all runs",
        )
    return attempts


def list_checkpoints(store: RunStore, catalog: Catalog, retention: Retention | None = None) -> list[dict[str, Any]]:
    """Return a row per accepted checkpoint, newest first. Raises StorageError."""
    accepted, pins = catalog.accepted, readable_pins(store)
    best = [kept.ref for kept in _rated(accepted, retention or Retention())[:1]]
    return [{**_row(store, manifest, manifest.ref in pins), "best": manifest.ref in best} for manifest in accepted]


def readable_pins(store: RunStore) -> set[CheckpointRef]:
    """Return the pinned checkpoints; none if their directory cannot be listed, which is recorded."""
    pins: set[CheckpointRef] = set()
    with store.going_on(pins_dir(store.run)):
        pins |= list_pins(store)
    return pins


def _rated(accepted: Sequence[Manifest], retention: Retention) -> list[RetentionCandidate]:
    return retention.best([RetentionCandidate(item.ref, item.metrics) for item in accepted])


def _row(store: RunStore, manifest: Manifest, pinned: bool) -> dict[str, Any]:
    return {
        "step": manifest.ref.step,
        "path": store.checkpoint_url(manifest.ref),
        "attempt": str(manifest.ref.attempt),
        "committed_at": manifest.committed_at,
        "bytes": manifest.num_bytes,
        "metrics": dict(manifest.metrics),
        "pinned": pinned,
    }


def show_checkpoint(store: RunStore, which: str = "newest", retention: Retention | None = None) -> dict[str, Any]:
    """Return the row of a checkpoint with its files and lineage. Raises as `pick_manifest`."""
    manifest = pick_manifest(store, which, retention)
    return {
        **_row(store, manifest, manifest.ref in readable_pins(store)),
        "world_size": manifest.world_size,
        "launch": manifest.launch,
        "record": _record(store, manifest.launch),
        "lineage": [str(ref) for ref in manifest.lineage],
        "files": [asdict(entry) for entry in manifest.files],
    }


def _record(store: RunStore, launch: str) -> str | None:
    """Return the URL of the provenance record of a launch; None for custom loops and older releases."""
    folder = store.launch_dir(launch)
    exists = False
    with store.going_on(folder):
        exists = bool(launch) and any(entry.name == RECORD for entry in store.list(folder))
    return f"{store.storage.url}/{folder}/{RECORD}" if exists else None


def pick_manifest(store: RunStore, which: str, retention: Retention | None = None) -> Manifest:
    """Return the accepted checkpoint named `newest`, `best`, by a step, or by step@attempt.

    Raises ConfigError if `which` is no such name, NoCheckpointError if there is none, and as `load_catalog`.
    """
    retention = retention or Retention()
    if which not in ("newest", "best") and not which.isdecimal() and CheckpointRef.parse(which) is None:
        raise ConfigError(
            f"{which!r} is not the name of a checkpoint", hint="write newest, best, a step, or step@attempt"
        )
    accepted = load_catalog(store).accepted
    if which == "best":
        rated = _rated(accepted, retention)
        if not rated:
            hint = "choose another metric: `outlast checkpoints ls RUN` shows those of each checkpoint"
            raise NoCheckpointError(
                f"no checkpoint of run {store.run!r} has the metric {retention.metric!r}", hint=hint
            )
        which = rated[0].ref.name
    for manifest in accepted:
        if which in ("newest", str(manifest.ref.step), manifest.ref.name):
            return manifest
    steps = ", ".join(str(manifest.ref.step) for manifest in accepted) or "none"
    wanted = "checkpoint" if which == "newest" else f"checkpoint {which}"
    hint = "name one of these" if accepted else "continue the run until its first one is saved"
    raise NoCheckpointError(f"run {store.run!r} has no {wanted}; it has: {steps}", hint=hint)


def resolve_checkpoint(store: RunStore, which: str, retention: Retention) -> ResolvedCheckpoint:
    """Resolve a name as `pick_manifest` does, or `model`, the finished model. Raises as `pick_manifest`."""
    if which != "model":
        manifest = pick_manifest(store, which, retention)
        return ResolvedCheckpoint(store, store.checkpoint_dir(manifest.ref), manifest)
    directory, model = newest_model(store, existing_attempts(store))
    if isinstance(model, ManifestError):
        raise DamagedError(f"{store.storage.url}/{directory}/{MANIFEST}: {model}") from model
    if model is None:
        raise NoCheckpointError(
            f"run {store.run!r} has no finished model yet", hint="run `outlast train` until it is done"
        )
    return ResolvedCheckpoint(store, directory, model)


def newest_model(store: RunStore, attempts: Iterable[AttemptId]) -> tuple[str, Manifest | ManifestError | None]:
    """Return directory and manifest of the newest model of some attempts, which may be damaged or None."""
    for attempt in sorted(attempts, reverse=True):
        directory = store.model_dir(attempt)
        try:
            return directory, read_manifest_in(store, directory)
        except FileNotFoundError:
            continue
        except ManifestError as error:
            return directory, error
    return "", None


@contextmanager
def damage_or_deletion(source: ResolvedCheckpoint) -> Iterator[None]:
    """Wrap reads of a checkpoint's files, to tell damage from a deletion by the run.

    Raises the reads' DamagedError with the checkpoint's URL, or NoCheckpointError if it was deleted while it was read.
    """
    try:
        yield
    except DamagedError as error:
        try:
            read_bytes(source.store.storage, f"{source.directory}/{MANIFEST}")
        except FileNotFoundError:
            raise NoCheckpointError(
                f"{source.url} was deleted while it was read", hint="choose a newer one, or pin it first"
            ) from error
        hint = f"`outlast checkpoints verify {source.store.url}` shows which checkpoints are intact; use one of them"
        raise DamagedError(f"{source.url}: {error.message}", hint=hint) from error


# -- verification ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The result of verifying a checkpoint or the finished model; it is intact if there are no faults.

    `path` begins with the storage's URL, or for `find_model` at the storage root.
    """

    path: str
    step: int
    num_bytes: int
    faults: tuple[str, ...]
    litter: tuple[str, ...] = ()  #: files of desktops and editors beside its own, which do no harm
    unread: str = ""  #: why it could not be read, which proves nothing


class _ChangedWhileReading(Exception):
    """The run changed while it was read."""


def verify_run(
    store: RunStore, which: str | None = None, retention: Retention | None = None
) -> list[VerificationResult]:
    """Verify every byte of all accepted checkpoints and the model, or of one, named as for `resolve_checkpoint`.

    Raises as `pick_manifest`, and StorageError also if the run changed during each attempt.
    """
    for _ in range(_MAX_PASSES):
        catalog = load_catalog(store)
        wanted = which
        if which in ("newest", "best"):
            wanted = pick_manifest(store, which, retention).ref.name
        verdicts = [
            VerificationResult(store.checkpoint_url(item.ref), item.ref.step, 0, item.reasons)
            for item in catalog.rejected
            if wanted in (None, str(item.ref.step), item.ref.name)
        ]
        verdicts += [_unread_result(store, item) for item in catalog.unread if wanted is None or item.is_named(wanted)]
        try:
            for manifest in catalog.accepted:
                if wanted in (None, str(manifest.ref.step), manifest.ref.name):
                    verdicts.append(_verify(store, manifest, catalog.owner))
        except _ChangedWhileReading:
            store = store.fresh()
            continue
        if which in (None, "model") and (model := _verify_model(store)):
            verdicts.append(replace(model, path=f"{store.storage.url}/{model.path}"))
        if which is not None and not verdicts:
            resolve_checkpoint(store, which, retention or Retention())  # raises with the names of existing ones
        return verdicts
    raise StorageError(f"run {store.run!r} changed {_MAX_PASSES} times while it was read", hint="try again later")


def _unread_result(store: RunStore, item: UnreadEntry) -> VerificationResult:
    url = f"{store.storage.url}/{store.attempts_dir}/{item}"
    return VerificationResult(url, item.step or 0, 0, (), unread=item.reason)


def _verify_model(store: RunStore) -> VerificationResult | None:
    try:
        return find_model(store)
    except StorageError as error:
        return VerificationResult(store.attempts_dir, 0, 0, (), unread=error.message)


def _verify(store: RunStore, manifest: Manifest, owner: AttemptId | None) -> VerificationResult:
    from outlast.checkpointing.restore.verify import find_litter, verify  # imports torch, which listings do not need

    directory, url, step = store.checkpoint_dir(manifest.ref), store.checkpoint_url(manifest.ref), manifest.ref.step
    try:
        faults = verify(store.storage, directory, manifest)
        litter = tuple(find_litter(store.storage, directory, manifest))
    except StorageError as error:
        return VerificationResult(url, step, manifest.num_bytes, (), unread=error.message)
    if faults:
        now = store.fresh()
        try:
            read_manifest(now, manifest.ref)
        except (FileNotFoundError, ManifestError) as error:
            raise _ChangedWhileReading from error
        if build_catalog(now).owner != owner:
            raise _ChangedWhileReading
    return VerificationResult(url, step, manifest.num_bytes, tuple(faults), litter)


def find_model(store: RunStore) -> VerificationResult | None:
    """Verify the run's finished model; None if there is none. Raises StorageError.

    It is the newest one of the attempt that owns the checkpoints, or of a later one that found the last step committed.
    """
    from outlast.checkpointing.restore.verify import find_litter, verify

    owner = build_catalog(store).owner
    attempts = [attempt for attempt in list_attempts(store) if owner is not None and attempt >= owner]
    directory, manifest = newest_model(store, attempts)
    if manifest is None:
        return None
    if isinstance(manifest, ManifestError):
        return VerificationResult(directory, 0, 0, (f"{MANIFEST}: {manifest}",))
    faults = verify(store.storage, directory, manifest)
    litter = tuple(find_litter(store.storage, directory, manifest))
    return VerificationResult(directory, manifest.ref.step, manifest.num_bytes, tuple(faults), litter)
