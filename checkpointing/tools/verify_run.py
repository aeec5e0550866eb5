"""Verification of a whole run while it may go on: every accepted checkpoint and the final model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import MANIFEST, AttemptId
from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.run_store.catalog import build_catalog, read_manifest
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.query import load_catalog, newest_model, pick_manifest, resolve_checkpoint

_MAX_PASSES = 5  # over a run that changes while it is read


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The result of verifying a checkpoint or the finished model; it is intact if there are no faults.

    `path` begins with the storage's URL, or for `find_model` at the storage root.
    """

    path: str
    step: int
    num_bytes: int
    faults: tuple[str, ...]


def verify_run(
    store: RunStore, which: str | None = None, retention: Retention | None = None
) -> list[VerificationResult]:
    """Verify every byte of all accepted checkpoints and the model, or of one, named as for `resolve_checkpoint`.

    Raises:
        ConfigError: `which` is not a valid name, or the run does not exist.
        NoCheckpointError: The checkpoint does not exist.
        StorageError: The storage could not be read, or the run changed during each attempt.
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
        try:
            for manifest in catalog.accepted:
                if wanted in (None, str(manifest.ref.step), manifest.ref.name):
                    verdicts.append(_verify(store, manifest, catalog.owner))
        except _ChangedWhileReading:
            store = store.fresh()
            continue
        if which in (None, "model") and (model := find_model(store)):
            verdicts.append(replace(model, path=f"{store.storage.url}/{model.path}"))
        if which is not None and not verdicts:
            resolve_checkpoint(store, which, retention or Retention())  # raises with the names of existing ones
        return verdicts
    raise StorageError(f"run {store.run!r} changed {_MAX_PASSES} times while it was read", hint="try again later")


class _ChangedWhileReading(Exception):
    """The run changed while it was read."""


def _verify(store: RunStore, manifest: Manifest, owner: AttemptId | None) -> VerificationResult:
    from outlast.checkpointing.restore.verify import verify  # imports torch, which listings do not need

    directory = store.checkpoint_dir(manifest.ref)
    faults = verify(store.storage, directory, manifest)
    if faults:
        now = store.fresh()
        try:
            read_manifest(now, manifest.ref)
        except (FileNotFoundError, ManifestError) as error:
            raise _ChangedWhileReading from error
        if build_catalog(now).owner != owner:
            raise _ChangedWhileReading
    return VerificationResult(store.checkpoint_url(manifest.ref), manifest.ref.step, manifest.num_bytes, tuple(faults))


def find_model(store: RunStore) -> VerificationResult | None:
    """Verify the run's finished model; None if there is none. Raises StorageError.

    It is the newest one of the attempt that owns the checkpoints, or of a later one that found the last step committed.
    """
    from outlast.checkpointing.restore.verify import verify

    owner = build_catalog(store).owner
    attempts = [attempt for attempt in list_attempts(store) if owner is not None and attempt >= owner]
    directory, manifest = newest_model(store, attempts)
    if manifest is None:
        return None
    if isinstance(manifest, ManifestError):
        return VerificationResult(directory, 0, 0, (f"{MANIFEST}: {manifest}",))
    faults = verify(store.storage, directory, manifest)
    return VerificationResult(directory, manifest.ref.step, manifest.num_bytes, tuple(faults))
