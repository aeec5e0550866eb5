"""Entry point of each Ray worker: connect to the coordinator, join the process group, run one attempt.

In a group that goes on in memory it runs attempt after attempt. Ray restarts the group after every exception that the
group does not survive in memory, so it must only raise what a restart may fix.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
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
from outlast.cluster.driver.in_place.invitation import accepted
from outlast.cluster.driver.prometheus import PrometheusGauges
from outlast.cluster.driver.warm_standby import PREWARM_VARIABLE, Standbys
from outlast.cluster.fault_tolerance.failure_cause import RankError
from outlast.cluster.fault_tolerance.watchdog import Watchdog
from outlast.cluster.ray_internals import actors
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.config.train import Parallel
from outlast.trainers.distributed.world import World
from outlast.trainers.in_place import Environment, run_in_place
from outlast.trainers.regrouping.membership import Member

_IMPORTED_AT = time.time()
#: A step that compiles kernels for a new shape may take this many times as long.
COMPILE_FACTOR = 10


def _watchdog(
    client: CoordinatorClient,
    world: World,
    storage: Storage,
    assignment: Assignment,
    hang_after_s: float | None,
    *,
    in_place: bool,
) -> Watchdog:
    store = RunStore(storage, assignment.config.name)

    def directory() -> str:
        """Return the attempt's directory or, before the claim, the launch's."""
        claimed = AttemptId.parse(client.attempt) if client.attempt else None
        return store.attempt_dir(claimed) if claimed else store.launch_dir(assignment.launch)

    progress = client.step_progress
    if assignment.config.scale.parallel is Parallel.FSDP:  # a forward pass waits for the other ranks
        progress.measures_work = False
    factor = COMPILE_FACTOR if assignment.config.train.compile else 1
    limit_s = None if hang_after_s is None else hang_after_s * factor
    group = world.broadcast(secrets.token_hex(8) if world.rank == 0 else None)
    place = (client.coordinator, group, world.rank, world.size)
    return Watchdog(*place, progress, limit_s, storage, directory, client.progress, in_place=in_place)


def _observers(run: str, nodes: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """Return the listener that updates rank 0's gauges and standbys. Training does not depend on them."""
    gauges, standbys = PrometheusGauges(run), Standbys(nodes)

    def apply(event: dict[str, Any]) -> None:
        parsed = parse_event(event)
        with suppress(RayError, RuntimeError, ValueError, TypeError, LookupError):
            gauges.apply(parsed, event.get("sender"))
        with suppress(RayError, RuntimeError, OSError):
            standbys.apply(parsed)

    return apply


def warm() -> None:
    """Import what a worker will need. Ray calls it first in every worker process, and starts none where it raises."""
    from outlast.trainers.prewarm import prewarm

    task, model_type = json.loads(os.environ[PREWARM_VARIABLE])
    if task:
        with suppress(Exception):  # the attempt itself raises the error
            prewarm(task, model_type)


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one attempt, or several in memory.

    Returns `{"outcome": …}`, or `{"error": …}` for an error that a restart cannot fix.
    """
    entered_at = time.time()
    assignment: Assignment = payload["assignment"]
    invitation = accepted()
    has_failed_alike: list[bool] = []
    with CoordinatorClient(assignment.launch) as client:
        try:
            storage = open_storage(assignment.config.checkpoint.storage)
            marks = {"process": _started_at(), "imports": _IMPORTED_AT, "actor": _actor_at(), "group": entered_at}
            environment = Environment(
                control=client,
                device=ray.train.torch.get_device(),
                backend=invitation.backend if invitation else "",
                node=ray.get_runtime_context().get_node_id(),
                log=_log_of_this_process(),
                marks=marks,
                watch=partial(_watched, client, storage, payload, in_place=invitation is not None),
                is_stopping=client.asks_to_stop,
                failing=lambda error: has_failed_alike.append(client.all_fail(error)),
            )
            if invitation is None:
                return _train_once(assignment, storage, client, environment)
            # An error reported just now would reach some ranks only.
            if invitation.rank is not None and (earlier := client.earlier_failure()):
                return {"error": earlier}
            join = partial(Member, invitation.address, invitation.key, invitation.name, invitation.rank)
            outcome = run_in_place(assignment, storage, join, environment, is_spare=invitation.rank is None)
            return {"outcome": outcome.value}
        except OutlastError as error:
            if any(has_failed_alike) or (error.permanent and invitation is None and client.all_fail(error)):
                return {"error": error}
            raise
        except Exception as error:  # noqa: BLE001 - raised again in a form that can be unpickled in the driver
            raise RankError.of(error) from None


def _train_once(
    assignment: Assignment, storage: Storage, client: CoordinatorClient, environment: Environment
) -> dict[str, Any]:
    """Run one attempt in the group that Ray Train has connected. Returns as `train_worker`."""
    world = World(environment.device, environment.node, environment.log, environment.marks)
    # Rank 0 alone queries it: an error reported just now would reach some ranks only, the others would wait.
    if earlier := world.run_on_rank_0(client.earlier_failure):
        return {"error": earlier}
    with environment.watch(world) as watchdog:
        try:
            return {"outcome": run_attempt(assignment, storage, world, client).value}
        except RuntimeError as error:
            if timed_out := watchdog.explain(error):
                raise timed_out from error
            raise


@contextmanager
def _watched(
    client: CoordinatorClient, storage: Storage, payload: dict[str, Any], world: World, *, in_place: bool
) -> Iterator[Watchdog]:
    """Connect a group's ranks with the coordinator, and watch their progress."""
    assignment: Assignment = payload["assignment"]
    client.begin(world.rank, world.size)
    nodes = world.gather(world.node)
    if world.rank == 0:
        client.watch(nodes)
        client.listener = _observers(assignment.config.name, nodes)
    with _watchdog(client, world, storage, assignment, payload["hang_after_s"], in_place=in_place) as watchdog:
        yield watchdog


def _log_of_this_process() -> str:
    """Return the file that this process' stderr is redirected to, or an empty string."""
    with suppress(OSError):
        target = Path("/proc/self/fd/2").readlink()
        return str(target) if target.is_absolute() and not str(target).startswith("/dev/") else ""
    return ""


def _actor_at() -> float:
    """Return when this process became this worker; a standby has waited before."""
    row = actors(ray.get_runtime_context().get_actor_id())
    return float(row.get("StartTime", 0)) / 1000


def _started_at() -> float:
    """Return when this process started, in seconds since the epoch; psutil's value is up to a second off."""
    ticks = int(process_start(os.getpid()) or 0)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
