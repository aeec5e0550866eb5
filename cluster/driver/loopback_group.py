"""A process group of workers whose Ray listens on the loopback only: the group listens no wider.

Elsewhere it is Ray Train's own, whose store and sockets are reachable on the network, without authentication.
"""

import os
from typing import Any

import ray
from ray.train.torch import TorchConfig

from outlast.cluster.ray_internals import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
    loopback_rendezvous,
    loopback_variables,
)


class TorchGroup(TorchConfig):  # type: ignore[misc]
    """Ray Train's settings of a process group, with the backend below."""

    @property
    def backend_cls(self) -> Any:
        """The class that connects the workers."""
        return GroupBackend


class GroupBackend(_TorchBackend):  # type: ignore[misc]
    """Connects the workers: on the loopback by a file in Ray's folder, which only its user can open."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Connect a new group."""
        rendezvous = worker_group.execute_single(0, loopback_rendezvous)
        if rendezvous is None:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        settings = {"backend": backend_config.backend, "init_method": rendezvous, "timeout_s": backend_config.timeout_s}
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, world_rank=rank, world_size=size, **settings)
                for rank in range(size)
            ]
        )


def _join(**settings: Any) -> None:
    os.environ |= loopback_variables()
    _setup_torch_process_group(**settings)
