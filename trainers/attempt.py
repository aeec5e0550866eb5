"""One attempt, from claim to outcome: what every worker of a group runs, under Ray or not."""

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
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.retry import wait_for
from outlast.trainers.checks.preflight import check_metric
from outlast.trainers.checks.resume_checks import (
    _check_architecture,
    _check_base,
    _check_samples,
    _flat,
    _report_changes,
    check_unchanged,
)
from outlast.trainers.config.tracking import TrackSettings
from outlast.trainers.config.train import Parallel
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.sampler import make_plan
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.distributed.fsdp import shard
from outlast.trainers.distributed.world import World
from outlast.trainers.host_info import machine, num_oom_kills
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.non_finite import NonFiniteError
from outlast.trainers.loop.train_loop import Loop, Outcome
from outlast.trainers.models.build import build_model, naming_of
from outlast.trainers.models.lora import is_adapted
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.registry import find_task
from outlast.trainers.tracking.follow import follow
from outlast.trainers.user_code import make_importable


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker group is to do. Crosses process borders, so it holds plain values only.

    Attributes:
        config: The settings, `${env:…}` expanded.
        declared: The settings as the user wrote them, which the claim keeps.
        launch: The launch that this attempt belongs to.
        prepared: The data.
        num_threads: Intra-op threads of a worker, unless the run was started with another number.
        code: Directory of the user's Python files, importable where it is there.
        faults: Faults to arm.
        track: Which tools get the metrics; None for none.
    """

    config: TrainingConfig
    declared: Mapping[str, Any]
    launch: str
    prepared: Prepared
    num_threads: int = 1
    code: str = ""
    faults: Sequence[faults.FaultSpec] = field(default_factory=tuple)
    track: TrackSettings | None = None


def run_attempt(assignment: Assignment, storage: Storage, world: World, control: Control) -> Outcome:
    """Claims the run, restores its resume point, trains. Every rank calls it.

    Raises:
        ConfigError: The settings differ from those that the run was started with.
        NoCheckpointError: No checkpoint is whole.
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
    _check_samples(base, checkpointer.declaration)
    num_threads = int(base.get("num_threads", assignment.num_threads))
    checkpointer.declaration["num_threads"] = num_threads
    make_deterministic(config.deterministic, num_threads)

    tokenizer = assignment.prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, assignment.prepared.facts)
    fresh = checkpointer.catalogue.is_fresh
    model, checkpointer.files = build_model(config.model, task, tokenizer, config.seed, fresh=fresh)
    checkpointer.naming = naming_of(model)
    _check_architecture(checkpointer)
    if is_adapted(model):
        _check_base(checkpointer, base, model)
    _report_changes(checkpointer, base, config.exactness)
    is_spread = config.scale.parallel is Parallel.FSDP and world.size > 1
    model = shard(model, world, config.exactness) if is_spread else model.to(world.device)
    world.mark("model")
    has_eval = assignment.prepared.num_eval_samples > 0
    track = assignment.track or TrackSettings(to=[])
    tracking = follow(track, checkpointer, _flat(dict(assignment.declared)), control.progress)
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
    )
    world.mark("data")
    with tracking:
        return _run(loop, checkpointer)


def _claim(assignment: Assignment, storage: Storage, world: World) -> Checkpointer:
    """Claims the run, once its storage answers, and says in the claim who the ranks are."""
    config = assignment.config
    place = {"rank": world.rank, "host": socket.gethostname(), "node": world.node, "pid": os.getpid()}
    workers = world.gather({**place, "log": world.log, "oom_kills": num_oom_kills(), **machine(world.device)})
    store = RunStore(storage, config.name)
    world.run_on_rank_0(lambda: wait_for(storage, store.attempts_dir))
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
    """Trains; an error stands in the journal before it is raised."""
    try:
        outcome = loop.run()
    except BaseException as error:
        error.add_note(f"after step {loop.step}")
        with suppress(StorageError):  # the first error is the one to report
            if checkpointer.journal is not None:
                said = f"{type(error).__name__}: {error}"[:500]
                final = isinstance(error, NonFiniteError)
                checkpointer.journal.event("failed", step=loop.step + 1, error=said, final=final)
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
        "parallel": assignment.config.scale.parallel.value,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
