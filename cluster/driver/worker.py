"""What runs in each Ray worker: the line to the hub, the world, and one attempt."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.events import parse_event
from outlast.checkpointing.run_store.liveness import process_start
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.driver.coordinator_client import CoordinatorClient
from outlast.cluster.driver.prometheus import PrometheusGauges
from outlast.cluster.driver.warm_standby import Standbys
from outlast.cluster.fault_tolerance.failure_cause import RankError
from outlast.cluster.fault_tolerance.out_of_memory import log_of_this_process
from outlast.cluster.fault_tolerance.watchdog import Watchdog
from outlast.cluster.ray_internals import actors
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.config.train import Parallel
from outlast.trainers.distributed.world import World

_IMPORTED_AT = time.time()
#: A step that compiles kernels for a new shape may take so many times as long.
COMPILING = 10


def _watchdog(
    line: CoordinatorClient, world: World, storage: Storage, assignment: Assignment, hang_after_s: float | None
) -> Watchdog:
    store = RunStore(storage, assignment.config.name)

    def directory() -> str:
        """The attempt's journal or, before the claim, the launch's."""
        claimed = AttemptId.parse(line.attempt) if line.attempt else None
        return store.attempt_dir(claimed) if claimed else store.launch_dir(assignment.launch)

    if (
        assignment.config.scale.parallel is Parallel.FSDP
    ):  # a forward pass waits for the others, and tells nothing of this rank
        line.pulse.tells_work = False
    patience = COMPILING if assignment.config.train.compile else 1
    limit_s = None if hang_after_s is None else hang_after_s * patience
    group = world.broadcast(secrets.token_hex(8) if world.rank == 0 else None)
    return Watchdog(line, group, world.rank, world.size, line.pulse, limit_s, storage, directory, line.progress)


def _observers(run: str, nodes: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """What rank 0 keeps up to date by its events: gauges and standbys. Nothing depends on them."""
    gauges, standbys = PrometheusGauges(run), Standbys(nodes)

    def apply(event: dict[str, Any]) -> None:
        parsed = parse_event(event)
        with suppress(RayError, RuntimeError, ValueError, TypeError, LookupError):
            gauges.apply(parsed, event.get("sender"))
        with suppress(RayError, RuntimeError, OSError):
            standbys.apply(parsed)

    return apply


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs one attempt. Returns `{"outcome": …}`, or `{"error": …}` for an error that trying again cannot mend.

    Ray restarts the group after every exception, so only what a restart may mend is raised.
    """
    entered_at = time.time()
    assignment: Assignment = payload["assignment"]
    context = ray.train.get_context()
    with CoordinatorClient(assignment.launch, context.get_world_rank(), context.get_world_size()) as line:
        try:
            storage = open_storage(assignment.config.checkpoint.storage)
            marks = {"process": _started_at(), "imports": _IMPORTED_AT, "actor": _actor_at(), "group": entered_at}
            node = ray.get_runtime_context().get_node_id()
            world = World(ray.train.torch.get_device(), node, log_of_this_process(), marks)
            # One rank asks for all: a verdict that comes just now would be heard by some, and the others wait for them.
            if earlier := world.run_on_rank_0(line.earlier_failure):
                return {"error": earlier}
            nodes = world.gather(world.node)
            if world.rank == 0:
                line.watch(nodes)
                line.listener = _observers(assignment.config.name, nodes)
            with _watchdog(line, world, storage, assignment, payload["hang_after_s"]) as dog:
                try:
                    return {"outcome": run_attempt(assignment, storage, world, line).value}
                except RuntimeError as error:
                    if explained := dog.explain(error):
                        raise explained from error
                    raise
        except OutlastError as error:
            if error.permanent and line.all_fail(error):
                return {"error": error}
            raise
        except Exception as error:  # noqa: BLE001 - raised again as what survives the way to the driver
            raise RankError.of(error) from None


def _actor_at() -> float:
    """When this process became this worker: it may have waited for that."""
    row = actors(ray.get_runtime_context().get_actor_id())
    return float(row.get("StartTime", 0)) / 1000


def _started_at() -> float:
    """When this process began, in seconds since the epoch; psutil's answer is up to a second off."""
    ticks = int(process_start(os.getpid()) or 0)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
