"""What runs in each Ray worker: the line to the hub, the world, and one attempt."""

from __future__ import annotations

import os
import time
from typing import Any

import ray._private.state
import ray.train
import ray.train.torch

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.storage import open_storage
from outlast.cluster.alive import process_start
from outlast.cluster.failures import RankError
from outlast.cluster.hub import Line
from outlast.cluster.memory import log_of_this_process
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.world import World

_IMPORTED_AT = time.time()


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs one attempt. Returns `{"outcome": …}`, or `{"error": …}` for an error that trying again cannot mend.

    Ray restarts the group after every exception, so only what a restart may mend is raised.
    """
    entered_at = time.time()
    assignment: Assignment = payload["assignment"]
    context = ray.train.get_context()
    with Line(assignment.launch, context.get_world_rank(), context.get_world_size()) as line:
        if earlier := line.earlier_failure():
            return {"error": earlier}
        try:
            storage = open_storage(assignment.config.checkpoint.storage)
            marks = {"process": _started_at(), "imports": _IMPORTED_AT, "actor": _actor_at(), "group": entered_at}
            node = ray.get_runtime_context().get_node_id()
            world = World(ray.train.torch.get_device(), node, log_of_this_process(), marks)
            line.watch(world.gather(world.node))
            return {"outcome": run_attempt(assignment, storage, world, line).value}
        except OutlastError as error:
            if error.permanent and line.all_fail(error):
                return {"error": error}
            raise
        except Exception as error:  # noqa: BLE001 - raised again as what survives the way to the driver
            raise RankError.of(error) from None


def _actor_at() -> float:
    """When this process became this worker: it may have waited for that."""
    row = ray._private.state.actors(ray.get_runtime_context().get_actor_id())
    return float(row.get("StartTime", 0)) / 1000


def _started_at() -> float:
    """When this process began, in seconds since the epoch."""
    ticks = int(process_start(os.getpid()) or 0)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
