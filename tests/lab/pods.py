"""The pods of a rendered RayJob as hosts of the lab, with what a kubelet, the operator and a Job would do for them.

Not here: the API server's checks, the scheduler, the operator's own waits and retries. Commands, environment, start
parameters, files and grace periods are those of the manifest; CPUs, memory and the object store are scaled down.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.lab.hosts import BIN, HEAD, Lab
from tests.support.kubernetes.manifests import pods as templates

TOKEN = {"RAY_AUTH_TOKEN": "a-token-of-the-test-that-the-operator-would-make"}
#: How long a Job waits before it makes another pod for one that failed; twice as long after each.
JOB_BACKOFF_S = 10.0
_SCALED = {"object-store-memory": "80000000"}


class Pods:
    """The cluster of one RayJob. A container that ends is started again by whatever waits here.

    Args:
        lab: Its hosts: the head, and a worker for each replica.
        job: The RayJob, as it stands in the API server.
        files: What its ConfigMap holds, by name.
        folder: Where to put these files.
        cluster: What the operator adds to the RayJob's name; another for each cluster that it makes.
    """

    def __init__(self, lab: Lab, job: Mapping[str, Any], files: Mapping[str, str], folder: Path, cluster: str) -> None:
        self._lab, self._spec = lab, job["spec"]
        self._pods = {role: template["spec"] for role, template in templates(dict(job)).items()}
        self._job_id = self._name = f"{job['metadata']['name']}-{cluster}"
        self._config_map = Path(tempfile.mkdtemp(prefix="config-map-", dir=folder))
        for name, text in files.items():
            (self._config_map / name).write_text(text)
        self._log = folder / f"{self._name}.log"
        self._wanted: set[int] = set()
        self._submitters: list[subprocess.Popen[bytes]] = []

    @property
    def log(self) -> str:
        """What the submitters printed."""
        return self._log.read_text()

    @property
    def _groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        cluster = self._spec["rayClusterSpec"]
        [workers] = cluster["workerGroupSpecs"]
        return cluster["headGroupSpec"], workers

    def start(self) -> None:
        """All pods, until the cluster is what the operator calls ready."""
        replicas = self._groups[1]["replicas"]
        for host in range(1 + replicas):
            self.add(host)
            if host == HEAD:  # the init container of a worker waits for it
                self._lab.wait_for_nodes(1)
        self._lab.wait_for_nodes(1 + replicas)

    def add(self, host: int) -> None:
        """A pod on a host: the head on host 0, workers on others."""
        self._wanted.add(host)
        self._start(host)

    def _start(self, host: int) -> None:
        head, workers = self._groups
        group, pod = (head, self._pods["head"]) if host == HEAD else (workers, self._pods["worker"])
        [container] = pod["containers"]
        of_config_map = {volume["name"] for volume in pod["volumes"] if "configMap" in volume}
        mounted = [item["mountPath"] for item in container["volumeMounts"] if item["name"] in of_config_map]
        claimed = {item["mountPath"] for item in container["volumeMounts"] if item["name"] == "storage"}
        by_operator = {
            "RAY_CLUSTER_NAME": self._name,
            "RAY_PORT": "6379",
            "RAY_ADDRESS": f"{self._lab.ip(HEAD)}:6379",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        }
        self._lab.start(
            host,
            parameters={"num-cpus": container["resources"]["requests"]["cpu"], **group["rayStartParams"], **_SCALED},
            environment=_environment(container) | by_operator,
            mounts=dict.fromkeys(mounted, self._config_map) | {path: Path(path) for path in claimed},
            read_only=container["securityContext"]["readOnlyRootFilesystem"],
        )

    def until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        """Waits, and starts each container again that has ended, as a kubelet does."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}\n{self.log}"
            for host in sorted(self._wanted):
                if not self._lab.is_up(host):
                    self.crash(host)
            time.sleep(0.2)

    def lose(self, host: int) -> None:
        """The node is gone, and its pod with it."""
        self._wanted.discard(host)
        self._lab.kill(host)

    def crash(self, host: int) -> None:
        """The container ends at once; whatever waits next starts it again, at the same address."""
        self._lab.kill(host)
        self._start(host)

    def evict(self, *hosts: int) -> None:
        """Deletes pods as a kubelet does: SIGTERM to all of them, the grace period, SIGKILL to what is left."""
        self._wanted -= set(hosts)
        for host in hosts:
            self._lab.evict(host)
        left, began = set(hosts), time.monotonic()
        while left:
            for host in sorted(left):
                pod = self._pods["head" if host == HEAD else "worker"]
                overdue = time.monotonic() - began > pod["terminationGracePeriodSeconds"]
                if overdue or not self._lab.is_up(host):
                    self._lab.kill(host)
                    left.discard(host)
            time.sleep(0.1)

    def end(self) -> None:
        """The operator deletes the cluster."""
        self.evict(*sorted(self._wanted))

    def submit(self) -> subprocess.Popen[bytes]:
        """A pod of the submitter's Job, with the command that KubeRay gives it."""
        [container] = self._pods["submitter"]["containers"]
        environment = {
            **os.environ,
            **_environment(container),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "RAY_DASHBOARD_ADDRESS": self._lab.address.removeprefix("http://"),
            "RAY_JOB_SUBMISSION_ID": self._job_id,
        }
        command = ["bash", "-ce", "--", self._command()]
        with self._log.open("ab") as log:
            made = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._submitters.append(made)
        return made

    def _command(self) -> str:
        """Wait for the dashboard, submit the job unless it is known, follow its log."""
        at, known = shlex.quote(self._lab.address), self._job_id
        asked = f"import urllib.request as u; u.urlopen('{self._lab.address}/api/gcs_healthz', timeout=5)"
        return (
            f"until python3 -c {shlex.quote(asked)} >/dev/null 2>&1 ; do sleep 2 ; done ; "
            f"if ! ray job status --address {at} {known} >/dev/null 2>&1 ; "
            f"then ray job submit --address {at} --no-wait --submission-id {known} -- {self._spec['entrypoint']} ; "
            f"fi ; ray job logs --address {at} --follow {known}"
        )

    def see_through(self, submitter: subprocess.Popen[bytes], limit_s: float = 300) -> int:
        """The submitter's Job: another pod for each that fails. Returns how many failed."""
        for failed in range(self._spec["submitterConfig"]["backoffLimit"] + 1):
            self._until_ended(submitter, limit_s)
            if submitter.returncode == 0:
                return failed
            again = time.monotonic() + JOB_BACKOFF_S * 2**failed
            self._until_past(again)
            submitter = self.submit()
        raise AssertionError(f"the submitter's Job has failed\n{self.log}")

    def _until_ended(self, submitter: subprocess.Popen[bytes], limit_s: float) -> None:
        self.until(lambda: submitter.poll() is not None, limit_s, "the submitter ends")

    def _until_past(self, moment: float) -> None:
        self.until(lambda: time.monotonic() > moment, 600, "the next pod of the Job")

    def lose_submitter(self) -> None:
        """The submitter's pod is gone at once."""
        for submitter in self._submitters:
            if submitter.poll() is None:
                os.killpg(submitter.pid, signal.SIGKILL)
                submitter.wait()


def _environment(container: Mapping[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"] if "value" in item} | TOKEN
