"""Elastic groups: Ray Train's scaling configuration, and a checkpoint before a planned resize.

Ray Train resizes a group by ending it, without notice to the workers. `Resizer` runs in its controller: it is called
before the group is ended, and delays that until rank 0 has committed. After a loss no rank is left to save; then it
only makes Ray refresh its view of the cluster, which is otherwise up to 20 s old.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import ResizeEvent
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.config.run_config import ScaleSettings
from outlast.cluster.fault_tolerance.coordinator import find_coordinator
from outlast.cluster.formatting import counted
from outlast.cluster.ray_internals import (
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    ControllerCallback,
    ReschedulingState,
    ResizingState,
    RestartingState,
    TrainControllerState,
    WorkerGroupCallback,
    get_or_create_autoscaling_coordinator,
)

#: Room for the group is available at once or not at all; then a smaller group is tried.
START_TIMEOUT_S = 5
#: Rank 0 calls the coordinator twice a second; after this much silence it will not save.
SILENCE_S = 20.0
_POLL_S = 0.2


def scaling(scale: ScaleSettings, resources: Mapping[str, float]) -> ray.train.ScalingConfig:
    """Return how many workers Ray Train starts, and the resources of each."""
    if scale.is_elastic:
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(START_TIMEOUT_S))
    return ray.train.ScalingConfig(
        num_workers=scale.workers if scale.is_elastic else scale.max_workers + scale.spares,
        use_gpu=scale.gpus_per_worker > 0,
        resources_per_worker=dict(resources),
        elastic_resize_monitor_interval_s=scale.resize_every.amount,
    )


class Resizer(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Callback in Ray Train's controller. An exception here would end the run, so every foreseeable one is caught."""

    def __init__(self, storage_url: str, run: str, launch: str) -> None:
        self._location = (storage_url, run, launch)
        self._requester = ""
        self._size = 0
        self._is_planned = False
        self._journal: Journal | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        self._requester = f"train-{train_run_context.run_id}"

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, ResizingState):
            self._is_planned = True
            size = counted(current_state.scaling_decision.num_workers, "worker")
            coordinator = find_coordinator(self._location[2])
            coordinator.request_save(f"the group is resized from {self._size} to {size}")
            while coordinator.is_saved(SILENCE_S) is False:  # until rank 0 has committed, or cannot
                time.sleep(_POLL_S)
        elif isinstance(current_state, RestartingState | ReschedulingState):
            with suppress(RayError):  # otherwise Ray refreshes its view of the cluster by itself, later
                autoscaling = get_or_create_autoscaling_coordinator()
                ray.get(autoscaling.get_reserved_resources.remote(self._requester, recompute=True), timeout=5)

    def after_worker_group_start(self, worker_group: Any) -> None:
        before, self._size = self._size, len(worker_group.get_workers())
        is_planned, self._is_planned = self._is_planned, False
        if before in (0, self._size):
            return
        url, run, launch = self._location
        event = ResizeEvent(before=before, now=self._size, planned=is_planned, attempt=None)
        with suppress(StorageError):  # the timeline has a gap; the claims hold the numbers of workers
            store = RunStore(open_storage(url), run)
            if self._journal is None:
                self._journal = Journal(store.storage, store.launch_dir(launch), 0, stream="events-resize", flush_s=0)
            event = replace(event, attempt=next((str(attempt) for attempt in list_attempts(store)[-1:]), None))
            self._journal.write(event)
        find_coordinator(launch).exchange([event.to_json()])
