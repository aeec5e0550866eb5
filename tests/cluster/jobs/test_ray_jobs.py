"""submit, list, status, logs, stop and resume against a real Ray cluster's job server, storage on a real S3 server.

About 90 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.jobs.ray_jobs import check_reachable, resume_command
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import digests, run_group, tiny_config
from tests.support.s3_server import s3_server

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent
NUM_STEPS = 400


def outlast(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(BIN / "outlast"), *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


class Cluster:
    """A head with two CPUs and a job server, started as an operator would.

    Args:
        environment: Additional environment variables.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.folder = tempfile.mkdtemp(prefix="outlast-ray-")
        self.ports = free_ports(3)
        self.address = f"http://127.0.0.1:{self.ports[1]}"
        self.ray_address = f"127.0.0.1:{self.ports[0]}"
        self._more = environment or {}
        self.token = {**os.environ, **self._more}["RAY_AUTH_TOKEN"]
        self.start()

    def start(self) -> None:
        """Start a head; after `kill` a new one at the same address, without any state."""
        port, dashboard, agent = self.ports
        options = {
            "port": port,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "node-name": "head",
            "num-cpus": 2,
            "object-store-memory": 100 * 2**20,
            "temp-dir": self.folder,
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--include-dashboard=true", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        self.log = open(Path(self.folder) / "head.log", "w")  # noqa: SIM115 - lives as long as the cluster
        self.environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **self._more}
        self.environment["OUTLAST_CACHE"] = f"{self.folder}/cache"
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=self.environment)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.process.poll() is None, Path(self.folder, "head.log").read_text()
            try:
                headers = {"Authorization": f"Bearer {self.token}"}
                request = urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)
                urllib.request.urlopen(request, timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the cluster did not come up")

    def kill(self) -> None:
        """Kill the head and all its descendants with SIGKILL."""
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
        descendants = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in descendants} - descendants:
            descendants |= more
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def shut_down(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.shut_down()


@pytest.mark.faults  # four minutes
@pytest.mark.slice
@pytest.mark.timeout(500)
def test_submit_attach_stop_resume(
    cluster: Cluster,
    bucket: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    text_file: str,
    tmp_path: Path,
) -> None:
    undisturbed = assign("here", steps=NUM_STEPS, eval_every=200, sections={"checkpoint": {"every": 200}})
    assert run_group(undisturbed, storage, 2)[0].outcome is Outcome.DONE
    url = f"{bucket}/runs"
    body = tiny_config("far", url, text_file, steps=NUM_STEPS, eval_every=200).model_dump(
        mode="json", exclude_defaults=True
    )
    body["scale"] = {"workers": 2}
    body["checkpoint"]["every"] = 20
    run_file = tmp_path / "far.yaml"
    run_file.write_text(yaml.safe_dump(body))
    at = ("--address", cluster.address)
    remote = open_storage(url)

    assert outlast("submit", str(run_file), *at).stdout.strip() == "far-1"
    deadline = time.monotonic() + 120
    while not read_catalog(remote, "far").accepted and time.monotonic() < deadline:
        time.sleep(0.1)
    stopped = outlast("stop", "far", *at, code=75).stderr
    assert f"to resume: outlast resume {url}/far --address {at[-1]}" in stopped.replace("'", "")
    seen = json.loads(outlast("status", f"{url}/far", *at, "--json").stdout)
    assert seen["state"] == "stopped"
    assert [job["status"] for job in seen["jobs"]] == ["STOPPED"]
    assert seen["newest_checkpoint"]["step"] == seen["step"] > 0
    log = outlast("logs", "far", *at).stdout
    assert "stop requested" in log
    assert "to resume: outlast resume " in log, "the client's command, not that of the run file in the job"
    assert "outlast train run.yaml" not in log

    assert outlast("resume", f"{url}/far", *at).stdout.strip() == "far-2"
    again = outlast("submit", str(run_file), *at, "--follow")
    assert again.stdout.strip() == "far-2"
    assert "attached" in again.stderr
    assert "resumed from" in again.stderr
    final = read_catalog(remote, "far").accepted[0]
    assert final.ref.step == NUM_STEPS
    assert tensor_digests(remote, checkpoint_dir("far", final.ref), final) == digests(storage, "here")
    rows = json.loads(outlast("list", *at, "--json").stdout)
    assert [(row["id"], row["status"]) for row in rows] == [("far-1", "STOPPED"), ("far-2", "SUCCEEDED")]

    cluster.shut_down()
    assert json.loads(outlast("status", f"{url}/far", "--json").stdout)["state"] == "done"
    assert "no job server answers" in outlast("logs", "far", *at, code=3).stderr


@pytest.mark.parametrize(
    ("train", "key"), [(["/shared/*.jsonl", "here.csv"], r"data\.train\[1\]"), ("parts/*.jsonl", r"data\.train")]
)
def test_paths_that_other_machines_cannot_resolve(train: str | list[str], key: str) -> None:
    body = tiny_config("far", "/shared/runs", "/shared/*.jsonl").model_dump(mode="json", exclude_defaults=True)
    check_reachable(RunConfig.model_validate(body))
    with pytest.raises(ConfigError, match=f"{key} is '.*', which each machine of the cluster resolves"):
        check_reachable(RunConfig.model_validate({**body, "data": {**body["data"], "train": train}}))


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("/shared/my runs", "outlast resume '/shared/my runs/far'"),
        ("s3://bucket/runs/", "outlast resume s3://bucket/runs/far"),
        ("${env:STORE}/runs", "outlast resume far"),  # the variable is the client's
        (None, "outlast resume far"),
    ],
)
def test_the_command_that_resumes_a_submitted_run_is_the_clients(storage: str | None, expected: str) -> None:
    assert resume_command("far", {"checkpoint": {"storage": storage} if storage else None}) == expected
