"""Ray Train for a launch: check the resources, run the worker group, turn its end into a result or one error.

Ray's own checkpoint manager and failure counts must stay unused; each launch has a Ray run name of its own.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.autoscaler.sdk import request_resources
from ray.train import TrainingFailedError

from outlast.checkpointing.errors import OutlastError, PreflightError
from outlast.checkpointing.run_store.attempt_history import settings_digest
from outlast.checkpointing.run_store.events import PlanEvent, StoppingEvent, parse_event
from outlast.checkpointing.storage.retry import call_with_retries, constant_pauses
from outlast.cluster.config.run_config import RunConfig, ScaleSettings
from outlast.cluster.driver.elastic_resize import Resizer, scaling
from outlast.cluster.driver.in_place.worker_group import InPlaceController, InPlaceGroup
from outlast.cluster.driver.loopback_group import TorchGroup
from outlast.cluster.driver.signals import StopFlag, stop_flag
from outlast.cluster.driver.warm_standby import worker_environment
from outlast.cluster.driver.worker import train_worker
from outlast.cluster.fault_tolerance.coordinator import CoordinatorHandle, start_coordinator
from outlast.cluster.fault_tolerance.failure_callback import FailureRecorder
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.cluster.formatting import counted
from outlast.cluster.ray_internals import (
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    NODE_LABEL,
    DatasetsCallback,
    get_env_vars_to_propagate,
)
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Exactness

NODES_WAIT_S = 60.0
#: Set where nodes start only on request, as with the autoscaler of a rendered RayJob: how many seconds to wait.
WAIT_VARIABLE = "OUTLAST_WAIT_FOR_NODES_S"
#: Makes the event that a stop request sets.
Stops = Callable[[], contextlib.AbstractContextManager[StopFlag]]
POLL_S = 0.5  # Ray Train polls its workers every 2 s by default; with more than 64 of them, less often


class Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """TorchTrainer with our controller, without `DatasetsCallback`, which starts an actor for each attempt in vain."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        """Run Ray Train's controller, or the one of a group that goes on in memory, to its end on this node."""
        if not isinstance(self.backend_config, InPlaceGroup):
            return super()._initialize_and_run_controller(**settings)
        here, environment = {NODE_LABEL: ray.get_runtime_context().get_node_id()}, get_env_vars_to_propagate()
        make = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})(InPlaceController)
        controller = make.remote(**settings)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def cpus_per_worker(scale: ScaleSettings, *, is_joined: bool) -> float:
    """Return the CPUs of a worker.

    On an existing cluster, waits for nodes that are still starting, as after a restart of the whole cluster, and
    requests them where they start only on request.

    Raises:
        PreflightError: There is no room for the workers.
    """
    limit = os.environ.get(WAIT_VARIABLE)
    limit_s = float(limit or NODES_WAIT_S) if is_joined else 0.0
    if limit:
        bundle = {"CPU": scale.cpus_per_worker or 1.0, "GPU": scale.gpus_per_worker}
        least = scale.min_workers + scale.spares
        request_resources(bundles=[{key: need for key, need in bundle.items() if need}] * least)
    return call_with_retries(
        lambda: _fit_in(scale, ray.cluster_resources(), is_joined),
        constant_pauses(1.0, limit_s),
        lambda error: isinstance(error, PreflightError),
    )


def _fit_in(scale: ScaleSettings, available: Mapping[str, float], is_joined: bool) -> float:
    cpus = scale.cpus_per_worker
    if cpus is None and is_joined:
        cpus = 1.0
    elif cpus is None:
        fitting = available.get("CPU", 1.0) / (scale.max_workers + scale.spares)
        cpus = min(fitting, 1.0) if fitting < 1 else float(int(fitting))
    least = scale.min_workers + scale.spares
    required = {"CPU": cpus * least, "GPU": scale.gpus_per_worker * least}
    short = [
        f"{need:g} {key}s needed, the cluster has {available.get(key, 0):g}"
        for key, need in required.items()
        if need > available.get(key, 0) + 1e-6
    ]
    if short:
        raise PreflightError(
            f"no room for {counted(least, 'worker')}{', spares included' if scale.spares else ''} ({'; '.join(short)})",
            hint="use fewer scale.workers, or smaller scale.cpus_per_worker or scale.gpus_per_worker",
        )
    return cpus


def run_workers(
    config: RunConfig,
    assignment: Assignment,
    cpus: float,
    listener: Callable[[dict[str, Any]], None],
    stops: Stops = stop_flag,
) -> dict[str, Any]:
    """Run the worker group to its end, restarts included. Returns the result of `train_worker`.

    `stops` gives the event of a stop request; the default is the first SIGINT or SIGTERM.

    Raises:
        OutlastError: The run is given up, or the group ended without a result.
        KeyboardInterrupt: The launch was interrupted before training began, or twice.
    """
    coordinator = start_coordinator(assignment.launch)
    trainer = _make_trainer(config, assignment, cpus)
    end: dict[str, Any] = {}

    def fit() -> None:
        try:
            end["result"] = trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            end["failure"] = error

    # In a side thread, because Ray Train handles SIGINT itself in the main one.
    _follow(threading.Thread(target=fit, daemon=True), coordinator, listener, stops)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(coordinator)
    if "failure" in end:
        raise _as_outlast_error(end["failure"], config) from end["failure"]
    result: dict[str, Any] | None = end["result"]
    if result is None:
        raise RunFailed("the workers ended without a result", hint="run the same command again")
    return result


def _make_trainer(config: RunConfig, assignment: Assignment, cpus: float) -> Trainer:
    scale, launch, store = config.scale, assignment.launch, config.store
    os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, f"{max(POLL_S, scale.max_workers * POLL_S / 64):g}")
    resources = {"CPU": cpus} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
    location, digest = (store.storage.url, config.name, launch), settings_digest(assignment.declared)
    recorder = FailureRecorder(*location, config.failure.limits, digest)
    resizers = [Resizer(*location)] if scale.is_elastic else []
    backend = "nccl" if scale.gpus_per_worker else "gloo"
    group = TorchGroup(backend=backend)
    if config.goes_on_in_place:
        limits = {"min_workers": scale.min_workers, "max_workers": scale.max_workers}
        is_elastic = config.exactness is Exactness.ELASTIC
        group = InPlaceGroup(backend=backend, num_spares=scale.spares, is_elastic=is_elastic, **limits)
    return Trainer(
        train_worker,
        train_loop_config={"assignment": assignment, "hang_after_s": config.failure.hang_after_s},
        torch_config=group,
        scaling_config=scaling(scale, resources),
        run_config=ray.train.RunConfig(
            name=launch,
            storage_path=f"{store.url}/launches",
            failure_config=ray.train.FailureConfig(max_failures=-1, max_preemption_failures=-1),  # see failure_cause.py
            callbacks=[recorder, *resizers],
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )


def _follow(
    thread: threading.Thread, coordinator: Any, listener: Callable[[dict[str, Any]], None], stops: Stops
) -> None:
    """Start the thread that runs the workers. Until it ends, forward their events, and a stop request to them."""
    with stops() as stopping:
        thread.start()
        is_stopping = has_begun = False
        while thread.is_alive():
            thread.join(0.25)
            for event in CoordinatorHandle(coordinator).drain() or []:
                has_begun |= isinstance(parse_event(event), PlanEvent)
                listener(event)
            if stopping.is_set():
                if not has_begun:  # there is nothing to commit yet
                    raise KeyboardInterrupt
                coordinator.stop.remote()  # repeated, because a restarted actor has lost it
                if not is_stopping:
                    is_stopping = True
                    listener(StoppingEvent().to_json())


def _as_outlast_error(error: BaseException, config: RunConfig) -> OutlastError:
    """Turn Ray's failure into one message: the first rank's cause, not a hundred tracebacks."""
    if isinstance(error, OutlastError):
        return error
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    if isinstance(error, TrainingFailedError) and failures:
        rank = min(failures)
        reason = (str(failures[rank]).strip().splitlines() or [repr(failures[rank])])[-1]
        message = f"rank {rank} of {config.scale.max_workers} failed: {reason}"
    else:
        lines = [line.strip() for line in str(getattr(error, "controller_failure", error)).splitlines() if line.strip()]
        message = f"Ray Train failed: {type(error).__name__}: {(lines or [''])[-1]}"
    return RunFailed(message, hint="run the same command again to resume from the newest intact checkpoint")
