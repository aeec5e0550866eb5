"""What the pods of a rendered RayJob would run, as hosts of the lab, submitted as KubeRay submits. About two minutes.

Not here: the API server, the scheduler and the operator. The start parameters, the environment, the entrypoint, the run
file and the grace period are those of the manifests.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.cluster.config import load_run
from outlast.cluster.failures import Cause
from outlast.cluster.manifests import k8s_settings, render
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop import Outcome
from tests.group import digests, run_group
from tests.lab.hosts import BIN, HEAD, Lab
from tests.lab.runs import Run
from tests.lab.test_lab import reason

pytestmark = [
    pytest.mark.lab,
    pytest.mark.faults,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(500),
]
STEPS = 2000
TOKEN = {"RAY_AUTH_TOKEN": "a-token-of-the-test-that-the-operator-would-make"}


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"] if "value" in item} | TOKEN


class Submitter:
    """What KubeRay's submitter does: ask for the job's status, submit it if it is not known, follow its log."""

    def __init__(self, address: str, job_id: str, entrypoint: str, environment: dict[str, str]) -> None:
        self._environment = {**os.environ, **environment}
        self._at, self._id, self._entrypoint = ["--address", address], job_id, entrypoint
        self.num_submissions = 0

    def _ray_job(self, *arguments: str) -> list[str]:
        return [str(BIN / "ray"), "job", *arguments]

    def submit(self) -> subprocess.Popen[bytes]:
        known = subprocess.run(self._ray_job("status", *self._at, self._id), env=self._environment, capture_output=True)
        if known.returncode != 0:
            self.num_submissions += 1
            command = self._ray_job("submit", *self._at, "--no-wait", "--submission-id", self._id, "--")
            subprocess.run(
                [*command, *self._entrypoint.split()], env=self._environment, check=True, capture_output=True
            )
        command = self._ray_job("logs", *self._at, "--follow", self._id)
        return subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def volume() -> Iterator[Path]:
    """A directory at a place where a pod may have a volume."""
    folder = Path(f"/outlast-lab-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_a_worker_pod_is_evicted(assign: Callable[..., Assignment], volume: Path, text_file: str, storage: Any) -> None:
    assert run_group(assign("pods", steps=STEPS, eval_every=200), storage, 2, limit_s=240)[0].outcome is Outcome.DONE
    run = Run(volume, "evicted", text_file, STEPS, 2)
    config, declared = load_run(str(run.file))
    objects = render(config, declared, k8s_settings(image="outlast:test", mount=str(volume), grace_s=30))
    job = next(item for item in objects if item["kind"] == "RayJob")
    files = next(item for item in objects if item["kind"] == "ConfigMap")["data"]
    mounted = volume / "config-map"
    mounted.mkdir()
    for name, text in files.items():
        (mounted / name).write_text(text)
    assert yaml.safe_load(files["run.yaml"]) == declared

    cluster = job["spec"]["rayClusterSpec"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    pods = {True: head["template"]["spec"], False: workers["template"]["spec"]}
    grace_s = pods[False]["terminationGracePeriodSeconds"]
    scaled = {"object-store-memory": "80000000"}

    def start(lab: Lab, host: int) -> None:
        group, is_head = (head, True) if host == HEAD else (workers, False)
        container = pods[is_head]["containers"][0]
        cpus = {} if is_head else {"num-cpus": str(container["resources"]["requests"]["cpu"])}
        lab.start(
            host,
            parameters=cpus | group["rayStartParams"] | scaled,
            environment=environment_of(container),
            mounts={"/etc/outlast": mounted},
        )

    with Lab(TOKEN) as lab:
        start(lab, HEAD)
        lab.wait_for_nodes(1, TOKEN["RAY_AUTH_TOKEN"])
        for host in range(1, workers["replicas"] + 1):
            start(lab, host)
        lab.wait_for_nodes(1 + workers["replicas"], TOKEN["RAY_AUTH_TOKEN"])
        token = environment_of(pods[True]["containers"][0])
        submitter = Submitter(lab.address, f"{job['metadata']['name']}-x7k2p", job["spec"]["entrypoint"], token)
        following = submitter.submit()
        run.wait_for_commit(following)  # type: ignore[arg-type]

        evicted, deadline = run.host_of(1), time.monotonic() + grace_s
        lab.evict(evicted)
        start(lab, 1 + workers["replicas"])  # the operator makes another pod
        while lab.is_up(evicted) and time.monotonic() < deadline:
            time.sleep(0.2)
        if lab.is_up(evicted):
            os.kill(lab.first_process(evicted), signal.SIGKILL)
        out, _ = following.communicate(timeout=300)
        assert following.returncode == 0, out.decode()
        again = submitter.submit()  # a submitter that is tried again finds the job
        again.communicate(timeout=60)
        assert (again.returncode, submitter.num_submissions) == (0, 1)

    assert digests(run.storage, run.name) == digests(storage, "pods")
    run.assert_cause(Cause.PREEMPTED)
