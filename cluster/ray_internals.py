"""Private parts of Ray: imported here alone, each at its first use, because some import much.

Ray may change them in any release. `TRIED_ON` lists those that they were tried on, and
`tests/cluster/test_ray_internals.py` holds what the code relies on.
"""

import secrets
import socket
import sys
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any

TRIED_ON = ("2.60",)
#: Label with the id of its node, which Ray gives each node.
NODE_LABEL = "ray.io/node-id"

_TRAIN = "ray.train.v2._internal"
_HOME = {
    "ControllerCallback": f"{_TRAIN}.execution.callback",
    "DatasetsCallback": f"{_TRAIN}.callbacks",
    "HEALTH_CHECK_INTERVAL_S_ENV_VAR": f"{_TRAIN}.constants",
    "Language": "ray.core.generated.common_pb2",
    "ReschedulingState": f"{_TRAIN}.execution.controller.state",
    "ResizeDecision": f"{_TRAIN}.execution.scaling_policy",
    "ResizingState": f"{_TRAIN}.execution.controller.state",
    "RestartingState": f"{_TRAIN}.execution.controller.state",
    "TrainController": f"{_TRAIN}.execution.controller.controller",
    "TrainControllerState": f"{_TRAIN}.execution.controller.state",
    "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR": f"{_TRAIN}.constants",
    "WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "ray._private.ray_constants",
    "Worker": f"{_TRAIN}.execution.worker_group.worker",
    "WorkerGroup": f"{_TRAIN}.execution.worker_group.worker_group",
    "WorkerGroupCallback": f"{_TRAIN}.execution.callback",
    "WorkerGroupStartupTimeoutError": f"{_TRAIN}.exceptions",
    "WorkerStatus": f"{_TRAIN}.execution.worker_group.worker",
    "WorkerType": "ray.core.generated.common_pb2",
    "NoopDecision": f"{_TRAIN}.execution.scaling_policy",
    "PreemptionCallback": f"{_TRAIN}.callbacks.preemption_callback",
    "_TorchBackend": "ray.train.torch.config",
    "_set_torch_distributed_env_vars": "ray.train.torch.config",
    "_setup_torch_process_group": "ray.train.torch.config",
    "bundle_to_remote_args": f"{_TRAIN}.util",
    "get_env_vars_to_propagate": f"{_TRAIN}.constants",
    "get_or_create_autoscaling_coordinator": "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
    "get_runtime_env_info": "ray._private.utils",
    "init_grpc_channel": "ray._private.grpc_utils",
    "node_manager_pb2": "ray.core.generated",
    "node_manager_pb2_grpc": "ray.core.generated",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOME[name])
    return getattr(home, name, None) or import_module(f"{_HOME[name]}.{name}")


def actors(actor_id: str | None = None) -> dict[str, Any]:
    """Return the rows of the actor table by actor id; given an id, the row of that actor."""
    from ray._private import state

    table: dict[str, Any] = state.actors(actor_id)
    return table


def draining_nodes() -> dict[str, float]:
    """Return the nodes that Ray is about to lose, by id, and their deadline in seconds since the epoch (0: unknown)."""
    from ray._private.state import state

    found: dict[str, int] = state.get_draining_nodes() or {}
    return {node: deadline_ms / 1000 for node, deadline_ms in found.items()}


def dashboard_address() -> str | None:
    """Return HOST:PORT of the connected cluster's dashboard, or None."""
    from ray._private.worker import _global_node

    url: str | None = _global_node.webui_url
    return url


def loopback_variables() -> dict[str, str]:
    """Return the variables with which gloo and NCCL listen on the loopback. Pickled by value, as `temp_dir`."""
    name = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def loopback_rendezvous() -> str | None:
    """Return the URL of a new file in this node's session of Ray, by which a process group meets.

    None if the node's address is no loopback. Pickled by value, as `temp_dir`.
    """
    import ray
    from ray._private.worker import _global_node

    if not ip_address(ray.util.get_node_ip_address()).is_loopback:
        return None
    return Path(_global_node.get_session_dir_path(), f"group-{secrets.token_hex(8)}").as_uri()


def temp_dir() -> str | None:
    """Return the directory of this node's Ray; None without a connection. The doctor pickles this function by value."""
    from ray._private.worker import _global_node

    return str(_global_node.get_temp_dir_path()) if _global_node else None


def requires_token() -> bool:
    """Return whether the connected Ray answers only those who have its token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def reload_environment() -> None:
    """Have Ray read again, from the environment, the authentication, and whether nodes listen beyond the loopback."""
    from ray._private import ray_constants

    raylet: Any = import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(variable, sys.platform not in ("darwin", "win32"))
