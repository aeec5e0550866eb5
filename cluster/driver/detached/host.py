"""Starts the root actor of a launch, and attaches this driver to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store.liveness import LivenessFile
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.detached.attachment import NAMESPACE, Attachment, root_name
from outlast.cluster.driver.detached.root import LaunchRoot, RootWork
from outlast.cluster.driver.launch import EventListener, Finished
from outlast.cluster.driver.ray_train import NODES_WAIT_S, WAIT_VARIABLE
from outlast.cluster.driver.signals import INTERRUPTIONS
from outlast.cluster.ray_internals import get_env_vars_to_propagate
from outlast.trainers.attempt import Assignment

#: How long a root waits for its work, beyond what the driver may wait for nodes.
_IDLE_S = 600.0
#: Calls that a root answers at a time.
_NUM_CALLS = 8


class DetachedHost:
    """Runs a launch's workers below a root actor, which this driver starts and attaches to."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def train(
        self, config: RunConfig, assignment: Assignment, cpus: float, listener: EventListener, liveness: LivenessFile
    ) -> Finished:
        """Run the workers to the launch's end. Raises as `run_workers`, and RootLost."""
        work = RootWork(config, assignment, cpus, liveness.began, get_env_vars_to_propagate())
        liveness.hand_over()
        ray.get(self._attachment.actor.start.remote(work))
        return self._attachment.follow(listener)

    def kill(self) -> None:
        """End the workers at once."""
        self._attachment.kill()


@contextlib.contextmanager
def detached_host(config: RunConfig, launch: str) -> Iterator[DetachedHost]:
    """Start the root actor of a launch, on this driver's node; its imports are made while the driver goes on.

    It outlives the body only if the driver is killed, or fails while it shows the progress.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    wait_s = float(os.environ.get(WAIT_VARIABLE) or NODES_WAIT_S)
    actor_class = ray.remote(num_cpus=0, max_concurrency=_NUM_CALLS, scheduling_strategy=here)(LaunchRoot)
    options = {"name": root_name(config.name, launch), "namespace": NAMESPACE, "lifetime": "detached"}
    actor = actor_class.options(**options).remote(wait_s + _IDLE_S)
    attachment = Attachment(actor, launch, config.store)
    try:
        yield DetachedHost(attachment)
    except (OutlastError, *INTERRUPTIONS):
        attachment.kill()
        raise
