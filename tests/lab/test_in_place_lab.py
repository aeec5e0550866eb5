"""Hosts of the lab are lost or leave, and the other workers go on in memory: no step is lost or done twice."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import Cause
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
STEPS = 4000  # longer than a node takes to come back


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with lab(3) as made:
        yield made


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> tuple[Any, Any]:
    return elastic_reference(assign, storage, "lab-in-place", STEPS)


@pytest.fixture
def make(tmp_path: Path, text_file: str) -> Callable[..., Run]:
    def make_run(name: str, **scale: Any) -> Run:
        scale = {"cpus_per_worker": 1, "resize_every": "5s", **scale}
        sections = {"exactness": "elastic", "train": {"micro_batch": 2}, "failure": {"in_place": True}}
        return Run(tmp_path, name, text_file, STEPS, 2, {**sections, "scale": scale})

    return make_run


def finish(run: Run, follower: Any, expected: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Waits for the end. Returns the regroupings."""
    out, err = follower.communicate(timeout=400)
    assert follower.returncode == 0, out + err
    assert (digests(run.storage, run.name), losses(run.storage, run.name)) == expected
    found = [event for _, event in run_events(run.store)]
    assert not [event for event in found if event["event"] == "resume"], "nobody read a checkpoint"
    steps = Counter(event["step"] for event in found if event["event"] == "step")
    assert set(steps.values()) == {1}
    return [event for event in found if event["event"] == "regrouped"]


def longest_pause(run: Run, since: float) -> float:
    ends = sorted(event["ended_at"] for _, event in run_events(run.store) if event["event"] == "step")
    return max(later - before for before, later in pairwise(ends) if later > since)


def test_a_worker_is_killed(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    run = make("killed", workers=2, spares=1)
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    host, pid, began = run.host_of(0), run.workers()[0]["pid"], time.time()
    cluster.signal_inside(host, pid, signal.SIGKILL)
    recovered("in memory: a worker killed, one spare", "worker died", run.wait_for_steps(follower, 1, 2, began))
    assert len(finish(run, follower, reference)) == 1
    run.assert_cause(Cause.WORKER_DIED)


def test_a_node_vanishes(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    run = make("vanishes", workers=2, spares=1)
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    lost, began = run.host_of(1), time.time()
    cluster.kill(lost)
    recovered("in memory: a node lost, one spare", "node lost", run.wait_for_steps(follower, 1, 2, began))
    assert len(finish(run, follower, reference)) == 1
    run.assert_cause(Cause.NODE_LOST)
    come_back(cluster, lost)


def test_it_shrinks_without_a_spare_and_grows_again(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    run = make("shrinks", workers=[1, 3])
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    lost, began = run.host_of(1), time.time()
    cluster.kill(lost)
    recovered("in memory: a node lost, elastic", "node lost", run.wait_for_steps(follower, 1, 2, began))
    began = time.time()
    come_back(cluster, lost)
    recovered("in memory: a node joins, from its start", "", run.wait_for_steps(follower, 2, 3, began))
    assert [event["world_size"] for event in finish(run, follower, reference)] == [2, 3]
    run.assert_cause(Cause.NODE_LOST)


def test_a_node_is_drained(
    cluster: Lab, make: Callable[..., Run], reference: tuple[Any, Any], recovered: Recovered
) -> None:
    run = make("drained", workers=2)
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    leaving, began = run.host_of(1), time.time()
    cluster.evict(leaving)
    recovered("in memory: a node drained", "preempted", run.wait_for_steps(follower, 1, 2, began))
    assert len(finish(run, follower, reference)) == 1
    run.assert_cause(Cause.PREEMPTED)
    recovered("in memory: a node drained, the longest pause", "preempted", longest_pause(run, began))
    cluster.wait_until_gone(leaving)
    come_back(cluster, leaving)
