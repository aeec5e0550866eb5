"""Ray Train on behalf of a launch: room for the workers, the group itself, and what its end comes to.

Ray's own checkpoint manager stays empty, its own failure counts are off, and each launch has a Ray run name of its own.
"""

from __future__ import annotations

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
from outlast.cluster.driver.elastic_resize import resizers, scaling
from outlast.cluster.driver.signals import _signals
from outlast.cluster.driver.warm_standby import environment
from outlast.cluster.driver.worker import train_worker
from outlast.cluster.fault_tolerance.coordinator import ask, start_coordinator
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.cluster.fault_tolerance.failure_recorder import FailureRecorder
from outlast.cluster.formatting import counted
from outlast.cluster.ray_internals import HEALTH_CHECK_INTERVAL_S_ENV_VAR, DatasetsCallback
from outlast.trainers.attempt import Assignment

NODES_WAIT_S = 60.0
#: Set where nodes come only when they are asked for, as with the autoscaler of a rendered RayJob: how long to wait.
WAIT_VARIABLE = "OUTLAST_WAIT_FOR_NODES_S"
POLL_S = 0.5  # Ray Train looks after its workers every 2 s by default; with more than 64 of them, less often


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Without `DatasetsCallback`, which starts an actor for each attempt: outlast passes no datasets."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


def cpus_per_worker(scale: ScaleSettings, *, is_joined: bool) -> float:
    """CPUs of a worker. On a cluster that was joined, waits a while for nodes that are on their way, as after a restart
    of the whole cluster, and asks for them where they only come then.

    Raises:
        PreflightError: There is no room for the workers.
    """
    limit = os.environ.get(WAIT_VARIABLE)
    limit_s = float(limit or NODES_WAIT_S) if is_joined else 0.0
    if limit:
        bundle = {"CPU": scale.cpus_per_worker or 1.0, "GPU": scale.gpus_per_worker}
        request_resources(bundles=[{key: need for key, need in bundle.items() if need}] * scale.min_workers)
    return call_with_retries(
        lambda: _fit_in(scale, ray.cluster_resources(), is_joined),
        constant_pauses(1.0, limit_s),
        lambda error: isinstance(error, PreflightError),
    )


def _fit_in(scale: ScaleSettings, there: Mapping[str, float], is_joined: bool) -> float:
    cpus = scale.cpus_per_worker
    if cpus is None and is_joined:
        cpus = 1.0
    elif cpus is None:
        fitting = there.get("CPU", 1.0) / scale.max_workers
        cpus = min(fitting, 1.0) if fitting < 1 else float(int(fitting))
    least = scale.min_workers
    wanted = {"CPU": cpus * least, "GPU": scale.gpus_per_worker * least}
    short = [
        f"{need:g} {key}s needed, the cluster has {there.get(key, 0):g}"
        for key, need in wanted.items()
        if need > there.get(key, 0) + 1e-6
    ]
    if short:
        raise PreflightError(
            f"no room for {counted(least, 'worker')} ({'; '.join(short)})",
            hint="use fewer scale.workers, or smaller scale.cpus_per_worker or scale.gpus_per_worker",
        )
    return cpus


def run_workers(
    config: RunConfig, assignment: Assignment, cpus: float, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs the worker group, restarts included, to its end; returns its answer, as `train_worker` does.

    Raises:
        OutlastError: The run is given up, or the group ended without an answer.
        KeyboardInterrupt: The launch was interrupted before training began, or twice.
    """
    coordinator = start_coordinator(assignment.launch)
    trainer = _make_trainer(config, assignment, cpus)
    result: dict[str, Any] = {}

    def fit() -> None:
        try:
            result["answer"] = trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            result["failure"] = error

    # In a side thread, because Ray Train takes SIGINT for itself in the main one.
    _follow(threading.Thread(target=fit, daemon=True), coordinator, tell)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(coordinator)
    if "failure" in result:
        raise _explained(result["failure"], config) from result["failure"]
    answer: dict[str, Any] | None = result["answer"]
    if answer is None:
        raise RunFailed("the workers ended without an answer", hint="run the same command again")
    return answer


def _make_trainer(config: RunConfig, assignment: Assignment, cpus: float) -> _Trainer:
    scale, launch, store = config.scale, assignment.launch, config.store
    os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, f"{max(POLL_S, scale.max_workers * POLL_S / 64):g}")
    resources = {"CPU": cpus} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
    recorder = FailureRecorder(
        store.storage.url, config.name, launch, config.failure.limits, settings_digest(assignment.declared)
    )
    return _Trainer(
        train_worker,
        train_loop_config={"assignment": assignment, "hang_after_s": config.failure.hang_after_s},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if scale.gpus_per_worker else "gloo"),
        scaling_config=scaling(scale, resources),
        run_config=ray.train.RunConfig(
            name=launch,
            storage_path=f"{store.url}/launches",
            failure_config=ray.train.FailureConfig(max_failures=-1, max_preemption_failures=-1),  # see failure_cause.py
            callbacks=[recorder, *resizers(config, launch)],
            worker_runtime_env={"env_vars": environment(config)},
        ),
    )


def _follow(thread: threading.Thread, coordinator: Any, tell: Callable[[dict[str, Any]], None]) -> None:
    """Starts the thread that runs the workers. Until it ends, passes their events on, and a stop request to them."""
    with _signals() as stopping:
        thread.start()
        is_stopping = has_begun = False
        while thread.is_alive():
            thread.join(0.25)
            for event in ask(coordinator.drain.remote(), []):
                has_begun |= isinstance(parse_event(event), PlanEvent)
                tell(event)
            if stopping.is_set():
                if not has_begun:  # there is nothing to commit, and nobody yet to do it
                    raise KeyboardInterrupt
                coordinator.stop.remote()  # each time, because one that was restarted has forgotten it
                if not is_stopping:
                    is_stopping = True
                    tell(StoppingEvent().to_json())


def _explained(error: BaseException, config: RunConfig) -> OutlastError:
    """Ray's failure as one message: the first rank's cause, not a hundred tracebacks."""
    if isinstance(error, OutlastError):
        return error
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    if isinstance(error, TrainingFailedError) and failures:
        rank = min(failures)
        said = (str(failures[rank]).strip().splitlines() or [repr(failures[rank])])[-1]
        message = f"rank {rank} of {config.scale.max_workers} failed: {said}"
    else:
        lines = [line.strip() for line in str(getattr(error, "controller_failure", error)).splitlines() if line.strip()]
        message = f"Ray Train failed: {type(error).__name__}: {(lines or [''])[-1]}"
    return RunFailed(message, hint="run the same command again to go on from the newest whole checkpoint")
