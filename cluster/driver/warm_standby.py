"""Idle worker processes with their imports done, on each node of a group: a restart uses them and skips the imports.

Ray gives an actor an idle process of the same job and runtime environment before it starts a new one. A process that
ran a task cannot become an actor, so the raylets are asked for processes that have run nothing (`PrestartWorkers`).
Training must never depend on it: without a standby a restart only takes longer.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.runtime_env import RuntimeEnv

from outlast.checkpointing.run_store.events import Event, UnderWayEvent
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.ray_internals import (
    WORKER_PROCESS_SETUP_HOOK_ENV_VAR,
    Language,
    WorkerType,
    get_runtime_env_info,
    init_grpc_channel,
    node_manager_pb2,
    node_manager_pb2_grpc,
)
from outlast.trainers.config.task_table import TASKS

NUM_SPARE_NODES = 2
PREWARM_VARIABLE, _AFTER_VARIABLE = "OUTLAST_REHEARSED", "OUTLAST_STANDBY_AFTER_S"
_PERIOD_S = 30.0
_TIMEOUT_S = 5.0
_KEPT_S = 365 * 86400  # until the job ends


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment variables of a worker of this run, standbys included: what to import, for which model.

    Python's hashes are those of one seed, so that a model which iterates over a set does so alike in each process.
    """
    seed = {"PYTHONHASHSEED": "0"}
    if config.failure.standby_after_s is None:
        return seed
    task = config.model.task if config.model.task in TASKS else ""  # a user's own may not be importable yet
    known: Mapping[str, Any] = config.model.config or {}
    if config.model.path is not None:
        with suppress(OSError, ValueError):
            known = json.loads(read_small_file(Path(config.model.path, "config.json")))
    hook = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "outlast.cluster.driver.worker.warm"}
    first = json.dumps([task, known.get("model_type")])
    return {**seed, **hook, PREWARM_VARIABLE: first, _AFTER_VARIABLE: str(config.failure.standby_after_s)}


class Standbys:
    """Keeps one standby process for each worker of an attempt, on its node, and one on each of a few spare nodes.

    Runs in rank 0's worker: Ray only uses standbys of the same job and runtime environment.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._required = Counter(nodes) if PREWARM_VARIABLE in os.environ else Counter()
        self._served: set[str] = set()
        self._next_check = inf

    def apply(self, event: Event) -> None:
        """Handle an event of rank 0: after the first step, and then periodically, start what new nodes lack."""
        now = time.monotonic()
        if isinstance(event, UnderWayEvent):  # earlier, the first step would wait for them
            self._next_check = now + float(os.environ.get(_AFTER_VARIABLE, 0))
        if not self._required or now < self._next_check:
            return
        self._next_check = now + _PERIOD_S
        context = ray.get_runtime_context()
        text = context.get_runtime_env_string()
        environment = get_runtime_env_info(RuntimeEnv.deserialize(text))
        environment.serialized_runtime_env = text  # as Ray passes it for an actor: it decides which processes match
        request = node_manager_pb2.PrestartWorkersRequest(
            language=Language.PYTHON,
            job_id=bytes.fromhex(context.get_job_id()),
            runtime_env_info=environment,
            keep_alive_duration_secs=_KEPT_S,
        )
        for node, required, address in self._unserved():
            with suppress(grpc.RpcError):  # the node is gone or busy: a restart takes longer there
                raylet = node_manager_pb2_grpc.NodeManagerServiceStub(init_grpc_channel(address))
                request.num_workers = max(0, required - _num_waiting(raylet, request.job_id))
                if request.num_workers:
                    raylet.PrestartWorkers(request, timeout=_TIMEOUT_S)
                self._served.add(node)

    def _unserved(self) -> list[tuple[str, int, str]]:
        """Return the nodes still to be served: id, number of processes, address of the raylet."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        uses_gpus = any("GPU" in alive[node]["Resources"] for node in self._required if node in alive)
        kind = "GPU" if uses_gpus else "CPU"
        spare = sorted(node for node in alive.keys() - self._required if alive[node]["Resources"].get(kind, 0) >= 1)
        required = {**self._required, **dict.fromkeys(spare[:NUM_SPARE_NODES], 1)}
        return [
            (node, count, f"{alive[node]['NodeManagerAddress']}:{alive[node]['NodeManagerPort']}")
            for node, count in required.items()
            if node in alive and node not in self._served
        ]


def _num_waiting(raylet: Any, job: bytes) -> int:
    """Count the processes of this job that have run nothing yet."""
    stats = raylet.GetNodeStats(node_manager_pb2.GetNodeStatsRequest(), timeout=_TIMEOUT_S).core_workers_stats
    ours = (worker for worker in stats if worker.worker_type == WorkerType.WORKER and worker.job_id == job)
    return sum(not worker.actor_id.strip(b"\xff") and not worker.num_executed_tasks for worker in ours)
