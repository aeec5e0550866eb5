"""One attempt, from claim to outcome: what every worker of a group runs, under Ray or not."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic_core import to_jsonable_python
from torch import nn

from outlast.checkpointing import fault_injection as faults
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, DamagedError, StorageError
from outlast.checkpointing.format.layout import RECORD, attempts_dir, checkpoint_dir, launch_dir
from outlast.checkpointing.restore.reader import read_verified
from outlast.checkpointing.storage.base import Storage, wait_for
from outlast.trainers.checks.preflight import check_metric
from outlast.trainers.config.model import Settings
from outlast.trainers.config.training_config import Exactness, NonFinite, Parallel, TrainingConfig, check_parallel
from outlast.trainers.distributed.fsdp import shard
from outlast.trainers.distributed.world import World, make_deterministic
from outlast.trainers.loop.control import Control, Overheard
from outlast.trainers.loop.non_finite import NonFiniteError
from outlast.trainers.loop.train_loop import Loop, Outcome, make_plan
from outlast.trainers.models.build import build_model, naming_of
from outlast.trainers.models.custom_model import make_importable
from outlast.trainers.models.lora import base_digest, is_adapted
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.registry import find_task
from outlast.trainers.tracking.follow import TrackSettings, follow


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker group is to do. Crosses process borders, so it holds plain values only.

    Attributes:
        config: The settings, `${env:…}` expanded.
        declared: The settings as the user wrote them, which the claim keeps.
        launch: The launch that this attempt belongs to.
        prepared: The data.
        num_threads: Intra-op threads of a worker, unless the run was started with another number.
        parallel: How the model is spread.
        non_finite: What becomes of a step whose loss or gradient is not finite.
        code: Directory of the user's Python files, importable where it is there.
        faults: Faults to arm.
        track: Which tools get the metrics; None for none.
    """

    config: TrainingConfig
    declared: Mapping[str, Any]
    launch: str
    prepared: Prepared
    num_threads: int = 1
    parallel: Parallel = Parallel.DDP
    non_finite: NonFinite = NonFinite.STOP
    code: str = ""
    faults: Sequence[faults.Fault] = field(default_factory=tuple)
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
    exactness = Exactness(config.exactness)
    check_parallel(assignment.parallel, exactness)
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
    _tell_changes(checkpointer, base, exactness)
    is_spread = assignment.parallel is Parallel.FSDP and world.size > 1
    model = shard(model, world, exactness) if is_spread else model.to(world.device)
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
        Overheard(control, tracking.hear),
        non_finite=assignment.non_finite,
    )
    world.mark("data")
    with tracking:
        return _run(loop, checkpointer)


def _claim(assignment: Assignment, storage: Storage, world: World) -> Checkpointer:
    """Claims the run, once its storage answers, and says in the claim who the ranks are."""
    config = assignment.config
    place = {"rank": world.rank, "host": socket.gethostname(), "node": world.node, "pid": os.getpid()}
    workers = world.gather({**place, "log": world.log, "oom_kills": num_oom_kills(), **machine(world.device)})
    world.from_rank_0(lambda: wait_for(storage, attempts_dir(config.name)))
    return Checkpointer(
        storage,
        config.name,
        ranks=world,
        launch=assignment.launch,
        declaration=_declaration(assignment, world),
        notes={
            "settings": dict(assignment.declared),
            "workers": workers,
            "record": f"{launch_dir(config.name, assignment.launch)}/{RECORD}",
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


def machine(device: torch.device | None) -> dict[str, Any]:
    """Processor, number of processors and bytes of memory of this machine, and the accelerator's name."""
    found: dict[str, Any] = {"cpu": platform.processor(), "cpus": os.cpu_count(), "memory": None}
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        found["cpu"] = next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        found["memory"] = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def num_oom_kills() -> int | None:
    """How many processes the kernel has killed so far for want of memory, in this container or on this machine."""
    for place in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", place.read_text(), re.MULTILINE)
            if found:
                return int(found[1])
    return None


def _declaration(assignment: Assignment, world: World) -> dict[str, Any]:
    return {
        "mathematics": assignment.config.mathematics(),
        "data": assignment.prepared.fingerprint,
        "samples": {entry.path: entry.xxh3_128 for entry in assignment.prepared.files if entry.path.endswith(".arrow")},
        "facts": assignment.prepared.facts,
        "num_threads": assignment.num_threads,
        "versions": _versions(),
        "world_size": world.size,
        "device": world.device.type,
        "parallel": assignment.parallel.value,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def check_unchanged(base: Mapping[str, Any], config: TrainingConfig, fingerprint: str | None) -> None:
    """Compares the settings with those that a run was started with. One that an older release did not know was at its
    default: a new setting's default is what was done before there was the setting.

    Args:
        base: The declaration in the newest checkpoint; empty on a fresh start.
        config: The settings now.
        fingerprint: The data's, or None when it is not to be compared.

    Raises:
        ConfigError: A setting that decides the run's numbers has changed.
    """
    if not base:
        return
    mathematics = config.mathematics()
    before, now = _flat(_completed(base["mathematics"], mathematics, config)), _flat(mathematics)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [f"{key.rstrip('_')} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys]
    if fingerprint is not None and base["data"] != fingerprint:
        changed.append("the data is not the same (the files, or the settings under data: or model.tokenizer)")
    if changed:
        hint = "put them back, or start a new run with another `name:`"
        if {line.split()[0] for line in changed} <= {"train.steps", "train.epochs"}:
            model = f"{config.checkpoint.storage}/{config.name}/model"
            hint = "put them back to go on; to train its finished model further, start a run with another `name:` "
            hint += f"and `model: {{path: {model}}}`"
        raise ConfigError(
            f"run {config.name!r} was started with other settings, and going on with these would be another "
            "run:\n" + "\n".join(f"  {line}" for line in changed),
            hint=hint,
        )


def _check_samples(base: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """The same sources and settings can come out otherwise: with another release of a library, or a template that
    writes the date."""
    if base.get("samples", now["samples"]) != now["samples"]:
        raise ConfigError(
            "the data was prepared again, and its samples are not those that the run was started with",
            hint="put the directory .data in the storage back, or start a new run with another `name:`",
        )


def _completed(before: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What was declared, with the defaults of settings that are declared only now, and without those that say nothing
    now: what silences them is declared itself.
    """
    whole = dict(before)
    for name, setting in type(settings).model_fields.items():
        inner = getattr(settings, name)
        if isinstance(inner, Settings) and isinstance(before.get(name), Mapping):
            whole[name] = _completed(before[name], now[name], inner)
        elif name in now and name not in before and not setting.is_required():
            whole[name] = to_jsonable_python(setting.get_default(call_default_factory=True))
        elif name not in now:
            whole.pop(name, None)
    return whole


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    inner = (_flat(item, f"{prefix}.{name}".strip(".")) for name, item in value.items())
    return {key: item for part in inner for key, item in part.items()}


def _check_architecture(checkpointer: Checkpointer) -> None:
    """A pretrained directory that changed since the run began is found out before its settings are mixed in."""
    for manifest in checkpointer.catalogue.accepted[:1]:
        entry = next((entry for entry in manifest.files if entry.path == "config.json"), None)
        if entry is None:
            return
        directory = checkpoint_dir(checkpointer.run, manifest.ref)
        try:
            before = json.loads(read_verified(checkpointer.storage, directory, entry).numpy().tobytes())
        except DamagedError:
            return  # the resume point is verified whole when it is read, and passed over
        now = json.loads(checkpointer.files["config.json"])
        changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        if changed := changed - {"transformers_version"}:
            raise ConfigError(
                f"the model's configuration is not what run {checkpointer.run!r} was started with: "
                f"{', '.join(sorted(changed))}",
                hint="put the model directory back, or start a new run with another `name:`",
            )


def _check_base(checkpointer: Checkpointer, base: Mapping[str, Any], model: nn.Module) -> None:
    """An adapter's checkpoint does not hold the model beneath, so another one under the same name is found out here."""
    checkpointer.declaration["base"] = base_digest(model)
    if base.get("base", checkpointer.declaration["base"]) != checkpointer.declaration["base"]:
        raise ConfigError(
            f"the model beneath the adapter has not the weights that run {checkpointer.run!r} was started with",
            hint="put the model directory back, or start a new run with another `name:`",
        )


def _tell_changes(checkpointer: Checkpointer, base: Mapping[str, Any], exactness: Exactness) -> None:
    """Puts into the journal what does not forbid going on, and whether the numbers stay the same to the last bit."""
    if checkpointer.journal is None:
        return
    for key in ("world_size", "parallel", "versions", "device"):
        before, now = base.get(key), checkpointer.declaration[key]
        if before not in (None, now):
            same_bits = key == "world_size" and exactness is Exactness.ELASTIC
            checkpointer.journal.event("changed", what=key, before=before, now=now, same_bits=same_bits)
