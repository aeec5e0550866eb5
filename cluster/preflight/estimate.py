"""`outlast plan`: estimates of a run before any resources are allocated.

Steps and tokens follow from the prepared data, sizes from the model built without memory, seconds from measurements of
the storage and of this machine's memory. An assumption must be named as one.
"""

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.save.save_schedule import FIRST_AUTO_S, SaveCosts
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.formatting import size as format_size
from outlast.cluster.preflight.doctor_probe import Probe
from outlast.trainers.checks.model_checks import check_metric, check_model
from outlast.trainers.checks.pretrained_checks import check_pretrained
from outlast.trainers.checks.state_size import StateSize, copy_speed, estimate_state
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.loop.save_timer import between_failures, history_of
from outlast.trainers.preparation.data_summary import describe_summary, summarize_data
from outlast.trainers.preparation.prepare import prepare

_MIN_BYTES, _MAX_BYTES = 2**20, 64 * 2**20
#: Other files of a checkpoint: two of the loop's state, the manifest, the journal.
_OTHER_FILES = 4


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Amount of data of a run."""

    num_steps: int  #: optimizer updates
    num_samples: int  #: samples of an epoch
    num_eval_samples: int  #: held-out samples
    eval_share: float | None  #: share of the rows held out; None if evaluation has its own data, or none
    epochs: float  #: passes over the data
    tokens: int  #: tokens of all steps
    tokens_per_step: int  #: mean tokens of a step
    fingerprint: str = ""  #: identifies the data
    notes: tuple[str, ...] = ()  #: guesses and skipped rows
    summary: Mapping[str, Any] = field(default_factory=dict)  #: columns, classes and counts, of `summarize_data`


@dataclass(frozen=True, slots=True)
class SaveEstimate:
    """Cost of saves, from measurements on this machine; speeds are in bytes per second."""

    measured_bytes: int  #: bytes written and read for the measurement
    write_speed: float  #: of one process that writes durably to the storage
    read_speed: float  #: of one process that reads it back
    put_s: float  #: seconds for a small file
    copy_speed: float  #: of a copy in memory
    commit_s: float  #: seconds from the beginning of a save to its commit, if all workers together write no faster
    blocked_s: float  #: seconds that training waits at most
    restart_s: float  #: seconds from a failure to the next step; 0, because it is unknown before a run
    between_failures_s: float  #: mean time between interruptions: of this run so far, and an assumed one
    auto_s: float  #: the interval that `every: auto` chooses from these
    first_s: float = FIRST_AUTO_S  #: seconds until its first save


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """Estimates of a run; the fields are the keys of `outlast plan --json`."""

    run: str
    workers: int
    parallel: str
    every: str
    kept: int
    free_bytes: int | None  #: free space of the storage; None if it is no local directory
    held_bytes: int  #: size of the checkpoints that the run has already
    walk: DataPlan
    size: StateSize
    saving: SaveEstimate

    @property
    def needed_bytes(self) -> int:
        """What the storage holds at most: the kept checkpoints, the one that is being written, and the model."""
        return (self.kept + 1) * self.size.checkpoint_bytes + 4 * self.size.num_parameters

    @property
    def shortage(self) -> str | None:
        """Why the storage is too small; None if it is not, or its free space is unknown."""
        if self.free_bytes is None or self.needed_bytes <= self.free_bytes + self.held_bytes:
            return None
        return (
            f"the storage has {format_size(self.free_bytes)} free, and the kept checkpoints, the one being written and "
            f"the model need {format_size(self.needed_bytes)}: free some, set checkpoint.storage to another disk, or "
            "lower checkpoint.keep_last"
        )

    def as_json(self) -> dict[str, Any]:
        body = asdict(self)
        body["size"]["checkpoint_bytes"] = self.size.checkpoint_bytes
        return body


def estimate_run(config: RunConfig) -> RunEstimate:
    """Prepare the data, build the model without memory, measure the storage.

    Raises:
        ConfigError: The run cannot be done with its settings.
        StorageError: The storage failed.
    """
    storage = config.store.storage
    prepared = prepare(config, storage, like=build_catalog(config.store).declaration.get("data"))
    check_metric(config, prepared.facts)
    notes = list[str]()
    if not build_catalog(config.store).declaration:  # a resumed run does not read the pretrained files
        notes = check_pretrained(config, prepared, storage, check_model(config, prepared, storage)[0])
    workers = config.scale.max_workers
    plan = make_plan(config, prepared.num_samples, workers)
    per_sample = (prepared.num_tokens["train"] - prepared.num_dropped_tokens["train"]) / prepared.num_samples
    walk = DataPlan(
        num_steps=plan.num_steps,
        num_samples=prepared.num_samples,
        num_eval_samples=prepared.num_eval_samples,
        eval_share=config.data.eval_share,
        epochs=plan.epoch(plan.num_steps),
        tokens=round(plan.total_samples * per_sample),
        tokens_per_step=round(plan.batch * per_sample),
        fingerprint=prepared.fingerprint,
        notes=(*prepared.notes, *notes),
        summary=summarize_data(config, prepared),
    )
    size = estimate_state(config, prepared, storage, workers)
    retention = config.checkpoint.retention
    return RunEstimate(
        run=config.name,
        workers=workers,
        parallel=config.scale.parallel.value,
        every=str(config.checkpoint.every),
        kept=retention.keep_last + retention.keep_best,
        free_bytes=_free_bytes(storage),
        held_bytes=sum(manifest.num_bytes for manifest in build_catalog(config.store).accepted),
        walk=walk,
        size=size,
        saving=_estimate_saves(config, size),
    )


def _free_bytes(storage: Storage) -> int | None:
    """Return the free space for this user; None for an object store, or where it cannot be read."""
    if not isinstance(storage, LocalStorage):
        return None
    path = Path(storage.url)
    with suppress(OSError):
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    return None


def _estimate_saves(config: RunConfig, size: StateSize) -> SaveEstimate:
    """Measure the storage with a file of a checkpoint's size, within limits."""
    num_bytes = min(max(size.checkpoint_bytes, _MIN_BYTES), _MAX_BYTES)
    probe = Probe(config.checkpoint.storage, f".plan-{secrets.token_hex(4)}")
    try:
        written = probe.write_speed("file", num_bytes)
        read = probe.read_speed("file", num_bytes)
    finally:
        probe.clean()
    copied = copy_speed()
    commit_s = size.checkpoint_bytes / written["write"] + (len(size.files) + _OTHER_FILES) * written["put_s"]
    blocked_s = size.share_bytes / copied if config.checkpoint.overlap else commit_s
    between = between_failures(*history_of(config.store))
    costs = SaveCosts(blocked_s, commit_s, restart_s=0.0, between_failures_s=between)
    return SaveEstimate(
        measured_bytes=num_bytes,
        write_speed=written["write"],
        read_speed=read["read"],
        put_s=written["put_s"],
        copy_speed=copied,
        commit_s=commit_s,
        blocked_s=blocked_s,
        restart_s=costs.restart_s,
        between_failures_s=between,
        auto_s=costs.interval_s,
    )


def describe(estimate: RunEstimate) -> Iterator[str]:
    """Yield the estimates as lines of text."""
    walk, size, saving = estimate.walk, estimate.size, estimate.saving
    memory = size.memory
    free = f"; the storage has {format_size(estimate.free_bytes)} free" if estimate.free_bytes is not None else ""
    shared = f"; snapshots in shared memory up to {format_size(memory.shared)}" if memory.shared else ""
    of_rows = f" (from {100 * walk.eval_share:g} % of the rows)" if walk.eval_share and walk.num_eval_samples else ""
    yield (
        f"{estimate.run}: {walk.num_steps:,} steps, {walk.epochs:.2f} epochs of {walk.num_samples:,} samples; "
        f"{walk.tokens:,} tokens, {walk.tokens_per_step:,} per step; {walk.num_eval_samples:,} samples held out"
        f"{of_rows}"
    )
    yield from (f"note: {text}" for text in walk.notes)
    yield from describe_summary(walk.summary)
    yield f"model: {size.model}, {size.num_parameters:,} parameters, {size.num_trained:,} of them trained"
    yield (
        f"memory per worker ({estimate.workers} workers, {estimate.parallel}): weights {format_size(memory.weights)}, "
        f"gradients {format_size(memory.gradients)}, optimizer {format_size(memory.optimizer)}; "
        f"host snapshot {format_size(memory.snapshot)}{shared}; activations are not counted"
    )
    yield (
        f"a checkpoint: {format_size(size.checkpoint_bytes)} in {len(size.files) + _OTHER_FILES - 1} files; "
        f"up to {estimate.kept} are kept: {format_size(estimate.kept * size.checkpoint_bytes)}{free}"
    )
    yield (
        f"storage: writes {format_size(saving.write_speed)}/s, reads {format_size(saving.read_speed)}/s, a small file "
        f"takes {saving.put_s * 1000:.1f} ms (measured with {format_size(saving.measured_bytes)})"
    )
    yield f"a save: {saving.commit_s:.2f} s until its commit; training waits up to {saving.blocked_s:.2f} s of it"
    yield (
        f"every: auto would save after {saving.first_s:.0f} s, then every {saving.auto_s:.0f} s (from these costs, "
        f"assuming an interruption every {saving.between_failures_s / 3600:.1f} h; the restart time is not measured "
        f"yet); this run has every: {estimate.every}"
    )
