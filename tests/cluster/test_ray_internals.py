"""Private parts of Ray: the release they were tried on, and of each the shape that the code relies on."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import ray
from ray.runtime_env import RuntimeEnv

from outlast.cluster import ray_internals
from outlast.cluster.driver.elastic_resize import Resizer
from outlast.cluster.driver.in_place.worker_group import InPlaceWorkerGroup
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.fault_tolerance.failure_callback import FailureRecorder
from outlast.cluster.fault_tolerance.failure_cause import OWN_RAY


def test_they_were_tried_on_the_ray_that_is_installed() -> None:
    """On another: run `make test` and `make test-lab`, then add it to `TRIED_ON`."""
    assert ray.__version__.rpartition(".")[0] in ray_internals.TRIED_ON


@pytest.mark.parametrize("name", ray_internals._HOME)
def test_each_is_where_the_table_says(name: str) -> None:
    assert getattr(ray_internals, name) is not None


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ray_internals.Nothing


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FailureRecorder, [ray_internals.WorkerGroupCallback]),
        (Resizer, [ray_internals.ControllerCallback, ray_internals.WorkerGroupCallback]),
    ],
)
def test_callbacks_are_called_by_the_names_and_arguments_that_ours_have(ours: type, theirs: list[type]) -> None:
    hooks = [name for name in vars(ours) if not name.startswith("_") and name != "worker_lost"]
    assert hooks
    for name in hooks:
        [hook] = [getattr(base, name) for base in theirs if hasattr(base, name)]
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(inspect.signature(hook).parameters)


def test_states_of_the_controller() -> None:
    from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

    decision = ResizeDecision(num_workers=3, resources_per_worker={})
    assert ray_internals.ResizingState(decision).scaling_decision.num_workers == 3
    states = [ray_internals.ResizingState, ray_internals.RestartingState, ray_internals.ReschedulingState]
    assert all(issubclass(state, ray_internals.TrainControllerState) for state in states)
    assert len(set(states)) == 3


def test_environment_variables() -> None:
    names = [name for name in ray_internals._HOME if name.endswith("ENV_VAR")]
    assert {name: getattr(ray_internals, name) for name in names} == {
        "HEALTH_CHECK_INTERVAL_S_ENV_VAR": "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR": "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
        "WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR",
    }


def test_messages_to_a_raylet() -> None:
    raylet = ray_internals.node_manager_pb2_grpc.NodeManagerServiceStub(ray_internals.init_grpc_channel("127.0.0.1:1"))
    assert raylet.PrestartWorkers
    assert raylet.GetNodeStats
    info = ray_internals.get_runtime_env_info(RuntimeEnv(env_vars={"A": "1"}))
    info.serialized_runtime_env = "{}"
    request = ray_internals.node_manager_pb2.PrestartWorkersRequest(
        language=ray_internals.Language.PYTHON,
        job_id=b"job",
        runtime_env_info=info,
        keep_alive_duration_secs=9,
        num_workers=2,
    )
    assert request.runtime_env_info.serialized_runtime_env == "{}"
    assert ray_internals.node_manager_pb2.GetNodeStatsRequest() is not None
    worker = ray_internals.node_manager_pb2.GetNodeStatsReply().core_workers_stats.add()
    worker.worker_type = ray_internals.WorkerType.WORKER
    assert (worker.job_id, worker.actor_id, worker.num_executed_tasks) == (b"", b"", 0)


def test_without_a_connection_there_is_no_directory() -> None:
    code = "from outlast.cluster.ray_internals import temp_dir\nassert temp_dir() is None"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.ray
def test_what_a_running_ray_answers() -> None:
    class Actor:
        def look(self) -> tuple[int, str, str | None]:
            return os.getpid(), ray.get_runtime_context().get_actor_id(), ray_internals.temp_dir()

    ray.shutdown()  # another test's may have been started by a look for an actor
    with ray_session():
        folder = ray_internals.temp_dir()
        assert folder is not None
        assert OWN_RAY in folder
        assert ray_internals.dashboard_address() in (None, "")
        assert ray_internals.draining_nodes() == {}
        coordinator = ray_internals.get_or_create_autoscaling_coordinator()
        assert ray.get(coordinator.get_reserved_resources.remote("train-none", recompute=True), timeout=30) is not None
        actor = ray.remote(num_cpus=0)(Actor).remote()
        pid, actor_id, its_folder = ray.get(actor.look.remote())
        assert its_folder == folder
        assert ray_internals.actors(actor_id)["StartTime"] / 1000 == pytest.approx(time.time(), abs=60)
        ray.kill(actor)
        with suppress(ray.exceptions.RayActorError):
            while ray_internals.actors(actor_id)["State"] != "DEAD":  # Ray kills it meanwhile
                ray.get(actor.look.remote())
        dead = ray_internals.actors()[actor_id]
        assert (dead["Pid"], dead["State"], dead["Address"]["NodeID"]) == (pid, "DEAD", ray.nodes()[0]["NodeID"])
        assert "ray.kill" in str(dead["DeathCause"])


def test_ours_replaces_only_what_it_means_to_of_rays_worker_group() -> None:
    """A method of the same name would be called by Ray in place of its own."""
    ours = {name for name in vars(InPlaceWorkerGroup) if not name.startswith("__")}
    theirs = {name for base in InPlaceWorkerGroup.__mro__[1:] for name in vars(base)}
    meant = {"_init_train_context", "_poll_workers_and_collect_errors", "shutdown", "abort"}
    assert ours & theirs - {"_abc_impl"} == meant
    for name in meant:
        mine, base = getattr(InPlaceWorkerGroup, name), getattr(ray_internals.WorkerGroup, name)
        assert list(inspect.signature(mine).parameters) == list(inspect.signature(base).parameters)
