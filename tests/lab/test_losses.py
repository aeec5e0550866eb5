"""Several things at once, and machines that hang: hosts of the lab are lost together, during recovery, or for a while.

Every case ends with the digests of a run that nothing happened to, and the journal names the causes. A minute each.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import Cause
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.attempt import Assignment
from tests.lab.hosts import Lab, lab
from tests.lab.runs import Recovered, Run, come_back, elastic_reference
from tests.lab.test_lab import reason
from tests.support.groups.worker_group import digests, losses

pytestmark = [
    pytest.mark.lab,
    pytest.mark.faults,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(600),
]
STEPS = 1000
ELASTIC = {"exactness": "elastic", "train": {"micro_batch": 2}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with lab(3) as made:
        yield made


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> tuple[Any, Any]:
    return elastic_reference(assign, storage, "lab-losses", STEPS)


@pytest.fixture
def make(tmp_path: Path, text_file: str) -> Callable[..., Run]:
    def make_run(name: str, workers: Any = 2, hang_after: str = "2m") -> Run:
        failure = {"max_failures": 3, "hang_after": hang_after}
        scale = {"workers": workers, "cpus_per_worker": 1, "resize_every": "5s"}
        return Run(tmp_path, name, text_file, STEPS, 2, {**ELASTIC, "scale": scale, "failure": failure})

    return make_run


def finish(run: Run, follower: subprocess.Popen[str], expected: tuple[Any, Any]) -> None:
    out, err = follower.communicate(timeout=400)
    assert follower.returncode == 0, out + err
    assert (digests(run.storage, run.name), losses(run.storage, run.name)) == expected


def test_shrinks_without_a_spare_and_grows_again(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    run = make("shrinks", [1, 3])
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    lost, began = run.host_of(1), time.time()
    cluster.kill(lost)
    recovered("a node lost, no spare", Cause.NODE_LOST.value, run.wait_for_steps(follower, 1, 2, began))
    began = time.time()
    come_back(cluster, lost)
    recovered("a node joins, from its start", "resized", run.wait_for_steps(follower, 2, 3, began))
    finish(run, follower, reference)
    run.assert_cause(Cause.NODE_LOST)
    sizes = [(item["before"], item["now"], item["cause"]) for item in read_status(run.store)["sizes"]]
    assert sizes == [(3, 2, "node lost"), (2, 3, "resized")]
    told = [event for _, event in run_events(run.store)]
    [asked] = [event for event in told if event["event"] == "save-requested"]
    resumed = [event for event in told if event["event"] == "resume"][-1]
    assert resumed["step"] >= asked["step"], "the larger group begins with the checkpoint before the resize"


def test_two_nodes_are_lost_at_once(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    run = make("two", [1, 3])
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    lost, began = [run.host_of(1), run.host_of(2)], time.time()
    for host in lost:
        cluster.kill(host)
    recovered("two nodes of three lost at once", Cause.NODE_LOST.value, run.wait_for_steps(follower, 1, 1, began))
    finish(run, follower, reference)
    run.assert_cause(Cause.NODE_LOST)
    come_back(cluster, *lost)


def test_a_node_is_lost_during_recovery(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    """The second goes as soon as the attempt after the first loss has claimed, before it trains."""
    run = make("again", [1, 3])
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    lost, began = [run.host_of(2)], time.time()
    cluster.kill(lost[0])
    while len(list_attempts(run.store)) < 2 and time.time() < began + 120:
        time.sleep(0.02)
    lost.append(run.host_of(1))
    cluster.kill(lost[1])
    recovered("a node lost, another during recovery", Cause.NODE_LOST.value, run.wait_for_steps(follower, 2, 1, began))
    finish(run, follower, reference)
    run.assert_cause(Cause.NODE_LOST, Cause.NODE_LOST)
    come_back(cluster, *lost)


def test_a_raylet_is_killed(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    """Ray's own process on a host dies; its workers go with it, and the host is as good as lost."""
    run = make("raylet")
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    host, began = run.host_of(1), time.time()
    [raylet] = cluster.processes(host, "raylet/raylet")
    cluster.signal_inside(host, raylet, signal.SIGKILL)
    recovered("a raylet killed", Cause.NODE_LOST.value, run.wait_for_steps(follower, 1, 2, began))
    finish(run, follower, reference)
    run.assert_cause(Cause.NODE_LOST)
    cluster.wait_until_gone(host)
    come_back(cluster, host)


def test_a_worker_is_stopped_for_longer_than_it_takes_to_notice(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    """Ray calls the job RUNNING, and no step is made: the other rank's watchdog finds out."""
    run = make("stopped", hang_after="5s")
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    host, pid, began = run.host_of(1), run.workers()[1]["pid"], time.time()
    cluster.signal_inside(host, pid, signal.SIGSTOP)
    recovered("a worker stopped (SIGSTOP)", Cause.HANG.value, run.wait_for_steps(follower, 1, 2, began))
    with contextlib.suppress(AssertionError):  # Ray may have ended it
        cluster.signal_inside(host, pid, signal.SIGCONT)
    finish(run, follower, reference)
    run.assert_cause(Cause.HANG)
    [failure] = read_status(run.store)["failures"]
    assert failure["rank"] == 1
    [hang] = [event for _, event in run_events(run.store) if event["event"] == "hang"]
    assert (hang["rank"], hang["missing"]) == (0, [1])
    assert any("loop.py" in line for stack in hang["threads"].values() for line in stack)


def test_a_machine_hangs_for_longer_than_it_takes_to_notice(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    """All of a host is stopped until the group goes on elsewhere; then it comes back, and is no longer wanted."""
    run = make("paused")
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    host, began = run.host_of(1), time.time()
    cluster.pause(host, on=True)
    recovered("a machine stopped, then back", Cause.NODE_LOST.value, run.wait_for_steps(follower, 1, 2, began))
    cluster.pause(host, on=False)
    finish(run, follower, reference)
    run.assert_cause(Cause.NODE_LOST)
    cluster.wait_until_gone(host)
    come_back(cluster, host)
