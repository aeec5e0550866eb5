"""Workers that wait, their imports done, on each node of a group: a restart takes them, and begins where imports end.

Ray gives an actor an idle process of the same job and the same runtime environment before it starts a new one. A
process that ran a task is no good for an actor, so the raylets are asked for processes that have run nothing
(`PrestartWorkers`, as Ray's own libraries may). All of it is courtesy: without a standby a restart takes longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.utils import get_runtime_env_info
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
from ray.core.generated.common_pb2 import Language, WorkerType
from ray.runtime_env import RuntimeEnv

KEPT_S = 365 * 86400
_PATIENCE_S = 5.0
#: For workers of the group, and so for those that wait.
ENVIRONMENT = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "outlast.cluster.standby.warm"}


def warm() -> None:
    """What every worker process does first: the imports that it will need."""
    import outlast.cluster.worker  # noqa: F401


def keep_standbys(nodes: Iterable[str]) -> int:
    """Asks the raylets for a waiting process for each of these workers. To be called in one of the workers.

    Args:
        nodes: The node of each worker.

    Returns:
        How many were asked for; those that wait already are left as they are.
    """
    asked = 0
    context = ray.get_runtime_context()
    request = node_manager_pb2.PrestartWorkersRequest(
        language=Language.PYTHON,
        job_id=bytes.fromhex(context.get_job_id()),
        runtime_env_info=_environment(context.get_runtime_env_string()),
        keep_alive_duration_secs=KEPT_S,
    )
    places = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    for node, wanted in Counter(nodes).items():
        with suppress(grpc.RpcError, KeyError):  # a node that has just gone, or is busy: a restart takes longer
            address = f"{places[node]['NodeManagerAddress']}:{places[node]['NodeManagerPort']}"
            raylet = node_manager_pb2_grpc.NodeManagerServiceStub(init_grpc_channel(address))
            request.num_workers = max(0, wanted - _num_waiting(raylet, request.job_id))
            if request.num_workers:
                raylet.PrestartWorkers(request, timeout=_PATIENCE_S)
                asked += request.num_workers
    return asked


def _environment(text: str) -> Any:
    """What Ray says of this runtime environment when it starts an actor; `text` decides which processes are alike."""
    info = get_runtime_env_info(RuntimeEnv.deserialize(text))
    info.serialized_runtime_env = text
    return info


def _num_waiting(raylet: Any, job: bytes) -> int:
    """How many processes of this job have run nothing yet. The job runs no tasks, only actors."""
    stats = raylet.GetNodeStats(node_manager_pb2.GetNodeStatsRequest(), timeout=_PATIENCE_S).core_workers_stats
    print([(w.pid, w.worker_type, w.job_id.hex(), w.actor_id.hex(), w.num_executed_tasks) for w in stats], file=open("/tmp/g_stats","a"))
    return sum(
        worker.worker_type == WorkerType.WORKER and worker.job_id == job and not worker.actor_id.strip(b"\xff")
        for worker in stats
    )
