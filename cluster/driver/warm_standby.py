"""Workers that wait, their imports done, on each node of a group: a restart takes them, and begins where imports end.

Ray gives an actor an idle process of the same job and the same runtime environment before it starts a new one. A
process that ran a task is no good for an actor, so the raylets are asked for processes that have run nothing
(`PrestartWorkers`). All of it is courtesy: without a standby a restart takes longer.
"""

from __future__ import annotations

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
from outlast.trainers.config.task_names import TASKS

NUM_SPARE_NODES = 2
_PREWARM, _AFTER_S = "OUTLAST_REHEARSED", "OUTLAST_STANDBY_AFTER_S"
_LOOK_S = 30.0
_TIMEOUT_S = 5.0
_KEPT_S = 365 * 86400  # until the job ends


def environment(config: RunConfig) -> dict[str, str]:
    """The variables of a worker of this run, and so of those that wait: what to do first, and for what model."""
    if config.failure.standby_after_s is None:
        return {}
    task = config.model.task if config.model.task in TASKS else ""  # a user's own may not be importable yet
    known: Mapping[str, Any] = config.model.config or {}
    if config.model.path is not None:
        with suppress(OSError, ValueError):
            known = json.loads(Path(config.model.path, "config.json").read_text())
    hook = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "outlast.cluster.driver.prewarm_hook.warm"}
    first = json.dumps([task, known.get("model_type")])
    return {**hook, _PREWARM: first, _AFTER_S: str(config.failure.standby_after_s)}


class Standbys:
    """Keeps one waiting process for each worker of an attempt, on its node, and one on each of a few spare nodes.

    Lives in rank 0's worker, whose job and runtime environment the others must have to be taken.

    Args:
        nodes: The node of each rank.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._wanted = Counter(nodes) if _PREWARM in os.environ else Counter()
        self._served: set[str] = set()
        self._next_look = inf

    def apply(self, event: Event) -> None:
        """Takes an event of rank 0. Some time after the first step, and then now and again, asks the raylets of nodes
        that are new for what is missing there."""
        now = time.monotonic()
        if isinstance(event, UnderWayEvent):  # earlier, the first step would wait for them
            self._next_look = now + float(os.environ.get(_AFTER_S, 0))
        if not self._wanted or now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        context = ray.get_runtime_context()
        request = node_manager_pb2.PrestartWorkersRequest(
            language=Language.PYTHON,
            job_id=bytes.fromhex(context.get_job_id()),
            runtime_env_info=_environment_info(context.get_runtime_env_string()),
            keep_alive_duration_secs=_KEPT_S,
        )
        for node, wanted, address in self._unserved():
            with suppress(grpc.RpcError):  # it has just gone, or is busy: a restart takes longer there
                raylet = node_manager_pb2_grpc.NodeManagerServiceStub(init_grpc_channel(address))
                request.num_workers = max(0, wanted - _num_waiting(raylet, request.job_id))
                if request.num_workers:
                    raylet.PrestartWorkers(request, timeout=_TIMEOUT_S)
                self._served.add(node)

    def _unserved(self) -> list[tuple[str, int, str]]:
        """Nodes to ask: id, how many processes, address of the raylet."""
        there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        kind = "GPU" if any("GPU" in there[node]["Resources"] for node in self._wanted if node in there) else "CPU"
        spare = [node for node in there if node not in self._wanted and there[node]["Resources"].get(kind, 0) >= 1]
        wanted = {**self._wanted, **dict.fromkeys(sorted(spare)[:NUM_SPARE_NODES], 1)}
        return [
            (node, count, f"{there[node]['NodeManagerAddress']}:{there[node]['NodeManagerPort']}")
            for node, count in wanted.items()
            if node in there and node not in self._served
        ]


def _environment_info(text: str) -> Any:
    """What Ray says of this runtime environment when it starts an actor; `text` decides which processes are alike."""
    info = get_runtime_env_info(RuntimeEnv.deserialize(text))
    info.serialized_runtime_env = text
    return info


def _num_waiting(raylet: Any, job: bytes) -> int:
    """How many processes of this job have run nothing yet."""
    stats = raylet.GetNodeStats(node_manager_pb2.GetNodeStatsRequest(), timeout=_TIMEOUT_S).core_workers_stats
    ours = (worker for worker in stats if worker.worker_type == WorkerType.WORKER and worker.job_id == job)
    return sum(not worker.actor_id.strip(b"\xff") and not worker.num_executed_tasks for worker in ours)
