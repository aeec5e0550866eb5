"""One attempt, from claim to outcome, as every worker of a group runs it, with or without Ray.

The order is fixed: claim first, then checks against the run's declaration, then the model, then training. An error is
written to the journal before it is raised.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing import fault_injection as faults
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import RECORD
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.regrouping_checkpointer import RegroupingCheckpointer
from outlast.checkpointing.run_store.attempt_claim import Continuation
from outlast.checkpointing.run_store.events import AttemptErrorEvent
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.state.named_weights import WeightNaming
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.retry import wait_until_responsive
from outlast.trainers.checks.model_checks import check_metric
from outlast.trainers.checks.resume_checks import (
    check_base_model,
    check_layout,
    check_model_config,
    check_ranks_agree,
    check_samples,
    check_unchanged,
    flatten,
    record_changes,
)
from outlast.trainers.config.tracking import TrackSettings
from outlast.trainers.config.train import Parallel
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import Samples
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.distributed.fsdp import shard
from outlast.trainers.distributed.memory_snapshots import keeps_snapshots
from outlast.trainers.distributed.world import World
from outlast.trainers.host_info import host_facts, num_oom_kills, processor
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.non_finite import NonFiniteError
from outlast.trainers.loop.train_loop import Loop, Outcome
from outlast.trainers.models.build import build_model, weight_naming
from outlast.trainers.models.lora import is_adapted
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import Task, find_task
from outlast.trainers.tracking.follow import Tracking, follow
from outlast.trainers.user_code import make_importable


@dataclass(frozen=True, slots=True)
class Assignment:
    """The work of a worker group. It is sent to other processes, so it holds plain values only.

    Attributes:
        config: The settings, with `${env:…}` expanded.
        declared: The settings as the user wrote them, which the claim stores.
        launch: The launch that this attempt belongs to.
        prepared: The prepared data.
        num_threads: Intra-op threads of a worker, unless the run was started with another number.
        static_graph: Whether each backward pass gives every trained parameter a gradient, as far as a dry step tells.
        code: Directory of the user's Python files; made importable if it exists.
        faults: Faults to arm.
        track: Experiment trackers; None for none.
    """

    config: TrainingConfig
    declared: Mapping[str, Any]
    launch: str
    prepared: Prepared
    num_threads: int = 1
    static_graph: bool = False
    code: str = ""
    faults: Sequence[faults.FaultSpec] = field(default_factory=tuple)
    track: TrackSettings | None = None


@dataclass(frozen=True)
class BuiltModel:
    """What every rank builds from the settings alone, before or after it has a place in a group.

    Attributes:
        model: The model, on its device.
        task: What it learns.
        files: Small files of every checkpoint.
        naming: Names of the weights in checkpoints.
        data: Training samples, and held-out ones if there are any.
    """

    model: nn.Module
    task: Task
    files: dict[str, bytes]
    naming: WeightNaming
    data: tuple[Samples, Samples | None]


def run_attempt(assignment: Assignment, storage: Storage, world: World, control: Control) -> Outcome:
    """Claim the run, restore its resume point, train. Every rank must call it.

    Raises:
        ConfigError: The settings differ from those that the run was started with.
        NoCheckpointError: The run has commits, but all its checkpoints are damaged.
        StorageError: The storage failed.
    """
    prepared = prepare_attempt(assignment, storage, world, control)
    if prepared is None:
        return Outcome.SUPERSEDED
    try:
        return prepared.train()
    except BaseException as error:
        prepared.record_error(error)
        raise


@dataclass(frozen=True)
class LoopOptions:
    """Options of `Loop`, which has their meaning."""

    static_graph: bool = False
    may_regroup: bool = False
    keeps_snapshots: bool = False
    optimizer: torch.optim.Optimizer | None = None
    tracking: Tracking | None = None  #: that of this process' attempt before; its trackers go on


@dataclass(frozen=True)
class PreparedAttempt:
    """An attempt that has claimed the run and is ready to train.

    Attributes:
        checkpointer: Holds the claim.
        loop: Its loop.
        tracking: Its trackers.
        built: Its model.
        members: Names of its processes by rank, if it may go on in memory.
    """

    checkpointer: RegroupingCheckpointer
    loop: Loop
    tracking: Tracking
    built: BuiltModel
    members: tuple[str, ...] = ()

    def train(self) -> Outcome:
        """Train. Raises as `Loop.run`."""
        with self.tracking:
            outcome = self.loop.run()
            self.checkpointer.flush()
        return outcome

    def record_error(self, error: BaseException) -> None:
        """Write the error that ends the attempt to the journal."""
        error.add_note(f"after step {self.loop.step}")
        checkpointer = self.checkpointer
        with suppress(StorageError):  # the first error is the one to report
            if checkpointer.journal is not None:
                message = redact(f"{type(error).__name__}: {error}")[:500]
                final = isinstance(error, NonFiniteError)
                checkpointer.journal.write(AttemptErrorEvent(step=self.loop.step + 1, error=message, final=final))
            checkpointer.flush()


def prepare_attempt(
    assignment: Assignment,
    storage: Storage,
    world: World,
    control: Control,
    *,
    may_regroup: bool = False,
    tracking: Tracking | None = None,
) -> PreparedAttempt | None:
    """Claim the run and build its loop; None if a later launch has claimed it. Every rank calls it.

    With `may_regroup` each rank keeps what the others need to go on in memory. `tracking` is that of this process'
    attempt before. Raises as `run_attempt`.
    """
    config = assignment.config
    faults.arm(assignment.faults, world.rank)
    make_importable(assignment.code)
    make_plan(config, assignment.prepared.num_samples, world.size)
    check_metric(config, assignment.prepared.facts)
    checkpointer = claim_attempt(assignment, storage, world)
    if checkpointer.superseded:
        return None
    control.claimed(str(checkpointer.attempt))
    world.mark("claim")
    base = checkpointer.catalogue.declaration
    check_unchanged(base, config, assignment.prepared.fingerprint)
    check_samples(base, checkpointer.declaration)
    num_threads = int(base.get("num_threads", assignment.num_threads))
    # Version 0.1.0 did not declare it, and trained static graphs only, on several workers.
    static_graph = bool(base.get("static_graph", base.get("world_size", 1) > 1 or assignment.static_graph))
    checkpointer.declaration |= {"num_threads": num_threads, "static_graph": static_graph}
    make_deterministic(config.deterministic, num_threads)

    built = build(assignment, storage, fresh=checkpointer.catalogue.is_fresh)
    model, checkpointer.files, checkpointer.naming = built.model, built.files, built.naming
    check_model_config(checkpointer)
    check_ranks_agree(world, model)
    check_layout(checkpointer, base, model)
    if is_adapted(model):
        check_base_model(checkpointer, base, model)
    record_changes(checkpointer, base, config.exactness)
    is_sharded = config.scale.parallel is Parallel.FSDP and world.size > 1
    model = shard(model, world, config.exactness) if is_sharded else model.to(world.device)
    built = replace(built, model=model)
    world.mark("model")
    keeps = keeps_snapshots(config) and not may_regroup
    options = LoopOptions(static_graph, may_regroup, keeps, tracking=tracking)
    prepared = make_loop(assignment, world, control, checkpointer, built, options)
    world.mark("data")
    return prepared


def build(assignment: Assignment, storage: Storage, *, fresh: bool) -> BuiltModel:
    """Build the model and open the data. `fresh` as in `build_model`. Raises ConfigError and StorageError."""
    config, prepared = assignment.config, assignment.prepared
    tokenizer = prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
    model, files = build_model(config.model, task, tokenizer, config.seed, fresh=fresh)
    held_out = prepared.split(storage, "eval") if prepared.num_eval_samples > 0 else None
    return BuiltModel(model, task, files, weight_naming(model), (prepared.split(storage, "train"), held_out))


def make_loop(
    assignment: Assignment,
    world: World,
    control: Control,
    checkpointer: RegroupingCheckpointer,
    built: BuiltModel,
    options: LoopOptions,
) -> PreparedAttempt:
    """Make the loop of an attempt that has claimed the run."""
    track = assignment.track or TrackSettings(to=[])
    tracking = follow(track, checkpointer, flatten(dict(assignment.declared)), control.progress, options.tracking)
    loop = Loop(
        assignment.config,
        world,
        checkpointer,
        built.model,
        built.task,
        *built.data,
        control,
        listeners=[tracking.apply],
        static_graph=options.static_graph,
        may_regroup=options.may_regroup,
        snapshots_of=assignment.launch if options.keeps_snapshots else None,
        optimizer=options.optimizer,
    )
    return PreparedAttempt(checkpointer, loop, tracking, built)


def claim_attempt(
    assignment: Assignment,
    storage: Storage,
    world: World,
    continues: Continuation | None = None,
    has_ended: Callable[[], bool] = lambda: False,
) -> RegroupingCheckpointer:
    """Claim the run once its storage answers, or prepare the claim of a generation; the claim lists the workers.

    `continues` and `has_ended` are as in `RegroupingCheckpointer`.
    """
    config = assignment.config
    process = {"rank": world.rank, "host": socket.gethostname(), "node": world.node, "pid": os.getpid()}
    workers = world.gather({**process, "log": world.log, "oom_kills": num_oom_kills(), **host_facts(world.device)})
    store = RunStore(storage, config.name)
    if continues is None:
        world.run_on_rank_0(lambda: wait_until_responsive(storage, store.attempts_dir))
    return RegroupingCheckpointer(
        storage,
        config.name,
        continues=continues,
        has_ended=has_ended,
        ranks=world,
        launch=assignment.launch,
        declaration=_declaration(assignment, world),
        notes={
            "settings": dict(assignment.declared),
            "workers": workers,
            "record": f"{store.launch_dir(assignment.launch)}/{RECORD}",
        },
        retention=config.checkpoint.retention,
        max_shard_bytes=config.checkpoint.max_shard_bytes,
        settle_s=config.checkpoint.settle_s,
    )


def _declaration(assignment: Assignment, world: World) -> dict[str, Any]:
    return {
        "mathematics": assignment.config.numerics_settings(),
        "data": assignment.prepared.fingerprint,
        "samples": {entry.path: entry.xxh3_128 for entry in assignment.prepared.files if entry.path.endswith(".arrow")},
        "facts": assignment.prepared.facts,
        "num_threads": assignment.num_threads,
        "versions": _versions(),
        "world_size": world.size,
        "device": world.device.type,
        "processor": processor(world.device),
        "parallel": assignment.config.scale.parallel.value,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
