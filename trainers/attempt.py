"""One attempt, from claim to outcome, as every worker of a group runs it, with or without Ray.

The order is fixed: claim first, then checks against the run's declaration, then the model, then training. An error is
written to the journal before it is raised.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from outlast.checkpointing import fault_injection as faults
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import RECORD
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.run_store.events import AttemptErrorEvent
from outlast.checkpointing.run_store.store import RunStore
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
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.distributed.fsdp import shard
from outlast.trainers.distributed.world import World
from outlast.trainers.host_info import host_facts, num_oom_kills, processor
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.non_finite import NonFiniteError
from outlast.trainers.loop.train_loop import Loop, Outcome
from outlast.trainers.models.build import build_model, weight_naming
from outlast.trainers.models.lora import is_adapted
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tracking.follow import follow
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


def run_attempt(assignment: Assignment, storage: Storage, world: World, control: Control) -> Outcome:
    """Claim the run, restore its resume point, train. Every rank must call it.

    Raises:
        ConfigError: The settings differ from those that the run was started with.
        NoCheckpointError: The run has commits, but all its checkpoints are damaged.
        StorageError: The storage failed.
    """
    config = assignment.config
    faults.arm(assignment.faults, world.rank)
    make_importable(assignment.code)
    make_plan(config, assignment.prepared.num_samples, world.size)
    check_metric(config, assignment.prepared.facts)
    checkpointer = _claim(assignment, storage, world)
    if checkpointer.superseded:
        return Outcome.SUPERSEDED
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

    tokenizer = assignment.prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, assignment.prepared.facts)
    fresh = checkpointer.catalogue.is_fresh
    model, checkpointer.files = build_model(config.model, task, tokenizer, config.seed, fresh=fresh)
    checkpointer.naming = weight_naming(model)
    check_model_config(checkpointer)
    check_ranks_agree(world, model)
    check_layout(checkpointer, base, model)
    if is_adapted(model):
        check_base_model(checkpointer, base, model)
    record_changes(checkpointer, base, config.exactness)
    is_sharded = config.scale.parallel is Parallel.FSDP and world.size > 1
    model = shard(model, world, config.exactness) if is_sharded else model.to(world.device)
    world.mark("model")
    has_eval = assignment.prepared.num_eval_samples > 0
    track = assignment.track or TrackSettings(to=[])
    tracking = follow(track, checkpointer, flatten(dict(assignment.declared)), control.progress)
    loop = Loop(
        config,
        world,
        checkpointer,
        model,
        task,
        assignment.prepared.split(storage, "train"),
        assignment.prepared.split(storage, "eval") if has_eval else None,
        control,
        listeners=[tracking.apply],
        static_graph=static_graph,
    )
    world.mark("data")
    with tracking:
        return _run(loop, checkpointer)


def _claim(assignment: Assignment, storage: Storage, world: World) -> Checkpointer:
    """Claim the run once its storage answers; the claim lists the workers."""
    config = assignment.config
    process = {"rank": world.rank, "host": socket.gethostname(), "node": world.node, "pid": os.getpid()}
    workers = world.gather({**process, "log": world.log, "oom_kills": num_oom_kills(), **host_facts(world.device)})
    store = RunStore(storage, config.name)
    world.run_on_rank_0(lambda: wait_until_responsive(storage, store.attempts_dir))
    return Checkpointer(
        storage,
        config.name,
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


def _run(loop: Loop, checkpointer: Checkpointer) -> Outcome:
    """Train; an error is written to the journal before it is raised."""
    try:
        outcome = loop.run()
    except BaseException as error:
        error.add_note(f"after step {loop.step}")
        with suppress(StorageError):  # the first error is the one to report
            if checkpointer.journal is not None:
                message = redact(f"{type(error).__name__}: {error}")[:500]
                final = isinstance(error, NonFiniteError)
                checkpointer.journal.write(AttemptErrorEvent(step=loop.step + 1, error=message, final=final))
            checkpointer.flush()
        raise
    checkpointer.flush()
    return outcome


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
