"""The pods of a rendered RayJob as hosts of the lab, submitted as KubeRay submits, and lost one way after the other.

Every case ends with the digests and losses of a run that nothing happened to. One to two minutes each.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import load_run
from outlast.cluster.fault_tolerance.failure_cause import Cause
from outlast.cluster.kubernetes.client import KubernetesNamespace
from outlast.cluster.kubernetes.render import render
from outlast.cluster.kubernetes.settings import k8s_settings
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.lab.hosts import HEAD, Lab
from tests.lab.pods import TOKEN, Pods
from tests.lab.runs import Run
from tests.lab.test_lab import reason
from tests.support.groups.worker_group import digests, losses, run_group
from tests.support.kubernetes.api_server import Api, small_api

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(600),
]
STEPS = 800
LONG = 2000  # longer than a grace period
Recovered = Callable[[str, str, float], None]


@pytest.fixture(scope="module")
def expected(assign: Callable[..., Assignment], storage: LocalStorage) -> Callable[[int], tuple[Any, Any]]:
    """Digests and losses of the undisturbed run of so many steps, on plain processes."""

    @cache
    def of(steps: int) -> tuple[Any, Any]:
        name = f"pods-{steps}"
        assignment = assign(name, sections={"checkpoint": {"every": 500}}, steps=steps, eval_every=200)
        assert run_group(assignment, storage, 2, limit_s=240)[0].outcome is Outcome.DONE
        return digests(storage, name), losses(storage, name)

    return of


@pytest.fixture
def volume() -> Iterator[Path]:
    """A directory at a place where a pod may have a volume."""
    folder = Path(f"/outlast-lab-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


class Rehearsal:
    """A run that was applied to an API server, and the pods that an operator would make of it."""

    def __init__(
        self, api: Api, lab: Lab, volume: Path, text_file: str, recovered: Recovered, steps: int, expected: Any
    ) -> None:
        self.lab, self._api, self._volume, self._recovered = lab, api, volume, recovered
        self._expected = expected
        self.run = Run(volume, "my-run", text_file, steps, 2)
        settings = k8s_settings(image="outlast:test", mount=str(volume), grace_s=30)
        objects = render(*load_run(str(self.run.file)), settings)
        self.cluster = KubernetesNamespace()
        self.cluster.apply(objects)
        self._files = next(item["data"] for item in objects if item["kind"] == "ConfigMap")
        self._clusters: list[Pods] = []
        self._seconds: dict[str, float] = {}

    def pods(self, job: str = "my-run") -> Pods:
        """A new cluster for a RayJob."""
        made = Pods(self.lab, self._api.get(job), self._files, self._volume, f"c{len(self._clusters) + 1}")
        self._clusters.append(made)
        made.start()
        return made

    def close(self) -> None:
        for pods in self._clusters:
            pods.lose_submitter()

    def job(self, job: str = "my-run") -> dict[str, Any]:
        return self._api.get(job)

    def give_up(self) -> None:
        """What the operator writes when the head has not answered for five minutes."""
        status = {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "JobStatusCheckTimeoutExceeded"}
        self._api.set_status("my-run", **status)

    def until_steps(self, pods: Pods, case: str, began: float, attempts: int = 1) -> None:
        """Waits for the first step of an attempt after so many others, and notes how long it took."""
        pods.until(lambda: self.run.first_step(attempts) is not None, 200, "a new step")
        first = self.run.first_step(attempts)
        assert first is not None
        self._seconds[case] = first - began

    def check(self, *causes: Cause) -> None:
        """The run has ended with the same bits, and so many failures."""
        assert read_status(self.run.store)["state"] == "done"
        assert (digests(self.run.storage, self.run.name), losses(self.run.storage, self.run.name)) == self._expected
        self.run.assert_cause(*causes)
        lost = read_status(self.run.store)["lost_steps"]
        for case, seconds in self._seconds.items():
            self._recovered(case, f"{lost} steps done again", seconds)


@pytest.fixture
def rehearsal(
    request: pytest.FixtureRequest,
    expected: Callable[[int], tuple[Any, Any]],
    volume: Path,
    tmp_path: Path,
    text_file: str,
    recovered: Recovered,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Rehearsal]:
    steps = getattr(request, "param", STEPS)
    undisturbed = expected(steps)
    with small_api(tmp_path) as api, Lab(TOKEN) as lab:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with closing(Rehearsal(api, lab, volume, text_file, recovered, steps, undisturbed)) as made:
            yield made


@pytest.mark.faults
@pytest.mark.parametrize("rehearsal", [LONG], indirect=True)
def test_a_worker_is_evicted(rehearsal: Rehearsal) -> None:
    run, pods = rehearsal.run, rehearsal.pods()
    submitter = pods.submit()
    run.wait_for_commit(submitter)
    evicted, began = run.host_of(1), time.time()
    pods.add(3)  # the operator makes another pod as soon as this one is being deleted
    pods.evict(evicted)
    rehearsal.until_steps(pods, "a worker evicted, from its SIGTERM (grace 30 s)", began)
    assert pods.see_through(submitter) == 0
    rehearsal.check(Cause.PREEMPTED)


@pytest.mark.faults
def test_a_node_is_lost(rehearsal: Rehearsal) -> None:
    run, pods = rehearsal.run, rehearsal.pods()
    submitter = pods.submit()
    run.wait_for_commit(submitter)
    lost, began = run.host_of(1), time.time()
    pods.lose(lost)
    pods.add(3)
    rehearsal.until_steps(pods, "a worker's node lost, another pod at once", began)
    assert pods.see_through(submitter) == 0
    rehearsal.check(Cause.NODE_LOST)


@pytest.mark.faults
def test_the_head_crashes(rehearsal: Rehearsal) -> None:
    """The job is unknown to the new head, so the next pod of the submitter's Job submits it again."""
    run, pods = rehearsal.run, rehearsal.pods()
    submitter = pods.submit()
    run.wait_for_commit(submitter)
    began = time.time()
    pods.crash(HEAD)
    failed = pods.see_through(submitter)
    rehearsal.until_steps(pods, f"the head crashed, {failed} submitters failed", began)
    assert failed >= 1
    assert len(list_attempts(run.store)) == 2
    rehearsal.check()


@pytest.mark.faults
def test_the_submitter_is_lost(rehearsal: Rehearsal) -> None:
    """Its next pod finds the job and follows it."""
    run, pods = rehearsal.run, rehearsal.pods()
    submitter = pods.submit()
    run.wait_for_commit(submitter)
    pods.lose_submitter()
    assert pods.see_through(submitter) == 1
    assert len(list_attempts(run.store)) == 1
    rehearsal.check()


@pytest.mark.faults
@pytest.mark.parametrize("rehearsal", [LONG], indirect=True)
def test_suspended_and_resumed(rehearsal: Rehearsal) -> None:
    """KubeRay deletes the cluster without a word to the job: what saves is each node's own drain."""
    run, pods = rehearsal.run, rehearsal.pods()
    submitter = pods.submit()
    run.wait_for_commit(submitter)
    rehearsal.cluster.suspend(run.name)
    assert rehearsal.job()["spec"]["suspend"] is True
    pods.lose_submitter()
    pods.end()
    assert read_status(run.store)["state"] != "done"
    assert rehearsal.cluster.resume(run.name) == "rayjob/my-run resumed"
    assert rehearsal.job()["spec"]["suspend"] is False
    began, again = time.time(), rehearsal.pods()
    submitter = again.submit()
    rehearsal.until_steps(again, "suspended, and resumed: from the new pods", began)
    assert again.see_through(submitter) == 0
    rehearsal.check()


@pytest.mark.faults
def test_the_cluster_is_gone(rehearsal: Rehearsal) -> None:
    """All nodes are lost at once, and the operator gives the RayJob up: `resume` makes the next."""
    run, pods = rehearsal.run, rehearsal.pods()
    submitter = pods.submit()
    run.wait_for_commit(submitter)
    for host in (HEAD, 1, 2):
        pods.lose(host)
    pods.lose_submitter()
    rehearsal.give_up()
    assert rehearsal.cluster.resume(run.name) == "rayjob/my-run-2 created; it resumes where my-run ended"
    began, again = time.time(), rehearsal.pods("my-run-2")
    submitter = again.submit()
    rehearsal.until_steps(again, "all nodes lost, and resumed: from the new pods", began)
    assert again.see_through(submitter) == 0
    rehearsal.check()
