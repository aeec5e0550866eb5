"""Machines that vanish, one after the other, in a Ray cluster of several hosts. Each case about a minute.

Every case ends with the digests of a run that nothing happened to, and the journal names the cause. The first one is
in `make test`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import Cause
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.lab.hosts import HEAD, Lab, lab, why_not
from tests.lab.runs import OUTLAST, Run
from tests.support.groups.worker_group import digests, losses, run_group

reason = why_not()
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(400),
]
STEPS = 1000
DRAIN_STEPS = 3000  # longer than a drain of 30 s


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with lab(3) as made:
        yield made


@pytest.fixture
def make(tmp_path: Path, text_file: str) -> Callable[..., Run]:
    def make_run(name: str, steps: int = STEPS, workers: int = 2) -> Run:
        return Run(tmp_path, name, text_file, steps, workers)

    return make_run


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> Callable[..., tuple[Any, Any]]:
    """Digests and losses of an undisturbed run on plain processes, by steps and ranks."""
    known: dict[tuple[int, int], tuple[Any, Any]] = {}

    def of(steps: int = STEPS, workers: int = 2) -> tuple[Any, Any]:
        if (steps, workers) not in known:
            name = f"lab-{steps}-{workers}"
            assignment = assign(name, sections={"checkpoint": {"every": 500}}, steps=steps, eval_every=200)
            assert run_group(assignment, storage, workers, limit_s=240)[0].outcome is Outcome.DONE
            known[steps, workers] = digests(storage, name), losses(storage, name)
        return known[steps, workers]

    return of


def finish(run: Run, follower: subprocess.Popen[str], expected: tuple[Any, Any], code: int = 0) -> str:
    out, err = follower.communicate(timeout=300)
    assert follower.returncode == code, out + err
    if code == 0:
        assert digests(run.storage, run.name) == expected[0]
        assert losses(run.storage, run.name) == expected[1]
    return err


def test_a_node_vanishes(cluster: Lab, make: Callable[..., Run], reference: Callable[..., Any]) -> None:
    run, expected = make("node"), reference()
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    assert cluster.processes(HEAD, "ray::Coordinator"), "elsewhere, what it knows could be lost with a worker's node"
    lost = run.host_of(1)
    cluster.kill(lost)
    finish(run, follower, expected)
    run.assert_cause(Cause.NODE_LOST)
    assert lost not in {run.host_of(0), run.host_of(1)}
    cluster.start(lost)
    cluster.wait_for_nodes(4)


@pytest.mark.lab
def test_a_worker_is_killed(cluster: Lab, make: Callable[..., Run], reference: Callable[..., Any]) -> None:
    run, expected = make("worker"), reference()
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    cluster.signal_inside(run.host_of(1), run.workers()[1]["pid"], signal.SIGKILL)
    finish(run, follower, expected)
    run.assert_cause(Cause.WORKER_DIED)


@pytest.mark.lab
@pytest.mark.faults
def test_a_node_is_drained(cluster: Lab, make: Callable[..., Run], reference: Callable[..., Any]) -> None:
    """A save when the notice comes, another near the deadline, and no failure counted."""
    run, expected = make("drain", DRAIN_STEPS), reference(DRAIN_STEPS)
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    leaving = run.host_of(1)
    cluster.evict(leaving)
    finish(run, follower, expected)
    cluster.wait_until_gone(leaving)
    reasons = [event["reason"] for _, event in run_events(run.store) if event["event"] == "save-requested"]
    assert reasons == ["a node is about to be lost", "a node's last seconds"]
    run.assert_cause(Cause.PREEMPTED)
    cluster.start(leaving)
    cluster.wait_for_nodes(4)


@pytest.mark.lab
@pytest.mark.faults
def test_a_zombie_comes_back(cluster: Lab, make: Callable[..., Run], reference: Callable[..., Any]) -> None:
    """A worker is cut off and goes on, alone. Its commits never count, and it ends by itself."""
    run, expected = make("zombie", DRAIN_STEPS, workers=1), reference(DRAIN_STEPS, 1)
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    first, cut_off = list_attempts(run.store)[0], run.host_of(0)
    cluster.link(cut_off, up=False)
    deadline = time.monotonic() + 90
    while len(list_attempts(run.store)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    ends = [event["event"] for attempt, event in run_events(run.store) if attempt == first]
    while "superseded" not in ends and time.monotonic() < deadline:
        time.sleep(0.5)
        ends = [event["event"] for attempt, event in run_events(run.store) if attempt == first]
    assert "superseded" in ends
    cluster.link(cut_off, up=True)
    finish(run, follower, expected)
    resumed = next(e for a, e in run_events(run.store) if e["event"] == "resume" and a != first)
    accepted = read_catalog(run.storage, run.name).accepted
    assert all(item.ref.attempt != first or item.ref.step <= resumed["step"] for item in accepted)
    run.assert_cause(Cause.NODE_LOST)
    cluster.wait_until_gone(cut_off)
    cluster.start(cut_off)
    cluster.wait_for_nodes(4)


@pytest.mark.lab
def test_the_driver_is_killed(cluster: Lab, make: Callable[..., Run], reference: Callable[..., Any]) -> None:
    run, expected = make("driver"), reference()
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    for pid in cluster.processes(HEAD, "outlast.cluster.cli train"):
        cluster.signal_inside(HEAD, pid, signal.SIGKILL)
    finish(run, follower, expected, code=1)
    again = run.submit(cluster)
    assert "resumed from" in finish(run, again, expected)
    assert json.loads(status(run))["state"] == "done"


@pytest.mark.lab
@pytest.mark.faults
def test_the_head_vanishes(cluster: Lab, make: Callable[..., Run], reference: Callable[..., Any]) -> None:
    """Everything goes with the head; a new cluster at the same address carries on from storage."""
    run, expected = make("head"), reference()
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    cluster.kill(HEAD)
    assert "submit the run on any cluster" in finish(run, follower, expected, code=3)
    for host in (1, 2, 3):  # an operator would not keep them either, and alone they would finish the run
        cluster.kill(host)
    cluster.start(HEAD, cpus=0)
    cluster.wait_for_nodes(1)
    for host in (1, 2, 3):
        cluster.start(host)
    cluster.wait_for_nodes(4)
    assert "resumed from" in finish(run, run.submit(cluster), expected)


def status(run: Run) -> str:
    command = [OUTLAST, "status", str(run.file), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
