"""What a run will take, before anything is held: `outlast plan`.

Steps and tokens follow from the prepared data, sizes from the model as it is built without memory, and seconds from
what the storage and this machine's memory do when they are tried. Nothing is guessed without being called so.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from outlast.checkpointing.save.save_interval import FIRST_AUTO_S, SaveCosts
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.formatting import size as shown
from outlast.cluster.preflight.doctor_probe import Probe
from outlast.trainers.checks.memory_estimate import Size, copy_speed, measure
from outlast.trainers.checks.preflight import check_metric
from outlast.trainers.data.sampler import make_plan
from outlast.trainers.loop.save_timer import between_failures, history_of
from outlast.trainers.preparation.prepare import prepare

_LEAST_BYTES, _MOST_BYTES = 2**20, 64 * 2**20
#: Files of a checkpoint beside those that are known beforehand: two of the loop's state, the manifest, the journal.
_MORE_FILES = 4


@dataclass(frozen=True, slots=True)
class Walk:
    """The way through the data.

    Attributes:
        num_steps: Optimizer updates.
        num_samples: Samples of an epoch.
        num_eval_samples: Held-out samples.
        eval_share: The share of rows that were held out; None where evaluation has data of its own, or none.
        epochs: Passes over the data.
        tokens: Tokens of all steps.
        tokens_per_step: Tokens of a step, in the mean.
    """

    num_steps: int
    num_samples: int
    num_eval_samples: int
    eval_share: float | None
    epochs: float
    tokens: int
    tokens_per_step: int


@dataclass(frozen=True, slots=True)
class Saving:
    """What saves cost, as measured here and now.

    Attributes:
        measured_bytes: How much was written and read to measure it.
        write_speed: Bytes a second that one process writes to the storage, durably.
        read_speed: Bytes a second that it reads back.
        put_s: Seconds for a small file.
        copy_speed: Bytes a second that memory is copied with.
        commit_s: Seconds from the beginning of a save to its commit, if all workers together write no faster.
        blocked_s: Seconds that training waits at the most.
        restart_s: Seconds from a failure to the next step; 0 because nobody knows before a run.
        between_failures_s: Mean time between interruptions: of this run so far, and one more that is assumed.
        auto_s: The interval that `every: auto` would choose from these.
        first_s: When it would save first.
    """

    measured_bytes: int
    write_speed: float
    read_speed: float
    put_s: float
    copy_speed: float
    commit_s: float
    blocked_s: float
    restart_s: float
    between_failures_s: float
    auto_s: float
    first_s: float = FIRST_AUTO_S


@dataclass(frozen=True, slots=True)
class Forecast:
    """The plan of a run."""

    run: str
    workers: int
    parallel: str
    every: str
    kept: int
    walk: Walk
    size: Size
    saving: Saving

    def as_json(self) -> dict[str, Any]:
        body = asdict(self)
        body["size"]["checkpoint_bytes"] = self.size.checkpoint_bytes
        return body


def forecast(config: RunConfig) -> Forecast:
    """Prepares the data, builds the model without memory, and tries the storage.

    Raises:
        ConfigError: The run cannot be done as its settings say.
        StorageError: The storage failed.
    """
    storage = config.store.storage
    prepared = prepare(config, storage)
    check_metric(config, prepared.facts)
    workers = config.scale.max_workers
    plan = make_plan(config, prepared.num_samples, workers)
    per_sample = (prepared.num_tokens["train"] - prepared.num_dropped_tokens["train"]) / prepared.num_samples
    walk = Walk(
        num_steps=plan.num_steps,
        num_samples=prepared.num_samples,
        num_eval_samples=prepared.num_eval_samples,
        eval_share=config.data.eval_share,
        epochs=plan.epoch(plan.num_steps),
        tokens=round(plan.total_samples * per_sample),
        tokens_per_step=round(plan.batch * per_sample),
    )
    size = measure(config, prepared, storage, workers)
    retention = config.checkpoint.retention
    return Forecast(
        run=config.name,
        workers=workers,
        parallel=config.scale.parallel.value,
        every=str(config.checkpoint.every),
        kept=retention.keep_last + retention.keep_best,
        walk=walk,
        size=size,
        saving=_saving(config, size),
    )


def _saving(config: RunConfig, size: Size) -> Saving:
    """Tries the storage with a file as large as a checkpoint, within reason."""
    num_bytes = min(max(size.checkpoint_bytes, _LEAST_BYTES), _MOST_BYTES)
    probe = Probe(config.checkpoint.storage, f".plan-{secrets.token_hex(4)}")
    try:
        written = probe.write_speed("file", num_bytes)
        read = probe.read_speed("file")
    finally:
        probe.clean()
    copied = copy_speed()
    commit_s = size.checkpoint_bytes / written["write"] + (len(size.files) + _MORE_FILES) * written["put_s"]
    blocked_s = size.share_bytes / copied if config.checkpoint.overlap else commit_s
    between = between_failures(*history_of(config.store))
    costs = SaveCosts(blocked_s, commit_s, restart_s=0.0, between_failures_s=between)
    return Saving(
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


def lines(found: Forecast) -> Iterator[str]:
    """The plan for people."""
    walk, size, saving = found.walk, found.size, found.saving
    memory = size.memory
    of_rows = f" (from {100 * walk.eval_share:g} % of the rows)" if walk.eval_share and walk.num_eval_samples else ""
    yield (
        f"{found.run}: {walk.num_steps:,} steps, {walk.epochs:.2f} epochs of {walk.num_samples:,} samples; "
        f"{walk.tokens:,} tokens, {walk.tokens_per_step:,} a step; {walk.num_eval_samples:,} samples held out{of_rows}"
    )
    yield f"model: {size.model}, {size.num_parameters:,} parameters, {size.num_trained:,} of them trained"
    yield (
        f"memory of a worker ({found.workers} of them, {found.parallel}): weights {shown(memory.weights)}, gradients "
        f"{shown(memory.gradients)}, optimizer {shown(memory.optimizer)}; on the host a snapshot of "
        f"{shown(memory.snapshot)}; activations are not counted"
    )
    yield (
        f"a checkpoint: {shown(size.checkpoint_bytes)} in {len(size.files) + _MORE_FILES - 1} files; "
        f"up to {found.kept} stay: {shown(found.kept * size.checkpoint_bytes)}"
    )
    yield (
        f"storage: writes {shown(saving.write_speed)}/s, reads {shown(saving.read_speed)}/s, a small file takes "
        f"{saving.put_s * 1000:.1f} ms (measured with {shown(saving.measured_bytes)})"
    )
    yield f"a save: {saving.commit_s:.2f} s until its commit; training waits up to {saving.blocked_s:.2f} s of it"
    yield (
        f"every: auto would save after {saving.first_s:.0f} s, then every {saving.auto_s:.0f} s (from these, a restart "
        f"of {saving.restart_s:.0f} s, which nobody knows yet, and an interruption every "
        f"{saving.between_failures_s / 3600:.1f} h, which is assumed); this run says every: {found.every}"
    )
