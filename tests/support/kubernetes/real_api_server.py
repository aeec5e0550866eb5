"""A real API server for the tests of the Kubernetes client, and the wait for a kind that appears late.

It is taken from `KUBEBUILDER_ASSETS`, as controllers' own tests do: a folder with `etcd` and `kube-apiserver`. No
package has it, so elsewhere only the small one of `api_server.py` is there.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.kubernetes.api_server import TOKEN, Api
from tests.support.kubernetes.manifests import CRDS


def assets() -> Path | None:
    """The folder with a real etcd and kube-apiserver, or None."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    found = Path(folder) if folder else None
    return found if found and (found / "kube-apiserver").is_file() and (found / "etcd").is_file() else None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def real_api(binaries: Path) -> Iterator[Api]:
    """etcd, kube-apiserver, KubeRay's CRDs and a namespace `ml`; no operator, no scheduler, no node."""
    folder = Path(tempfile.mkdtemp(prefix="outlast-apiserver-"))
    client, peer, port = _free_ports(3)
    subprocess.run(["openssl", "genrsa", "-out", str(folder / "sa.key"), "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f'{TOKEN},tester,1,"system:masters"\n')
    commands = [
        f"{binaries}/etcd --data-dir {folder}/etcd --listen-client-urls http://127.0.0.1:{client} "
        f"--advertise-client-urls http://127.0.0.1:{client} --listen-peer-urls http://127.0.0.1:{peer}",
        f"{binaries}/kube-apiserver --etcd-servers http://127.0.0.1:{client} --secure-port {port} "
        f"--bind-address 127.0.0.1 --cert-dir {folder}/certs --token-auth-file {folder}/tokens.csv "
        f"--service-account-key-file {folder}/sa.key --service-account-signing-key-file {folder}/sa.key "
        "--service-account-issuer https://kubernetes.default.svc --service-cluster-ip-range 10.99.0.0/24 "
        "--authorization-mode RBAC --disable-admission-plugins ServiceAccount",
    ]
    processes = []
    with (folder / "log").open("wb") as log:
        for command in commands:
            processes.append(subprocess.Popen(command.split(), stdout=log, stderr=log))
    try:
        api = Api(f"https://127.0.0.1:{port}", folder, folder / "certs" / "apiserver.crt")
        _wait(api, folder / "log")
        yield api
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(api: Api, log: Path) -> None:
    """Until the server answers, and knows what a cluster for RayJobs knows."""
    deadline = time.monotonic() + 120
    while True:
        try:
            api.call("POST", "/api/v1/namespaces", {"metadata": {"name": "ml"}})
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise AssertionError(f"no API server:\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)
    for kind in ("rayjobs", "raycronjobs"):
        with (CRDS / f"ray.io_{kind}.yaml").open() as file:
            add_kind(api, _without_empty_defaults(yaml.load(file, Loader=yaml.CSafeLoader)), deadline)


def _without_empty_defaults(value: Any) -> Any:
    """A schema whose defaults of "" are another text: servers before 1.21 take "" for null, and refuse it."""
    if isinstance(value, dict):
        return {
            key: "none" if (key, item) == ("default", "") else _without_empty_defaults(item)
            for key, item in value.items()
        }
    return [_without_empty_defaults(item) for item in value] if isinstance(value, list) else value


def add_kind(api: Api, crd: dict[str, Any], deadline: float) -> None:
    """Teaches the server a custom resource, and waits until it knows it."""
    api.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
    version = f"{crd['spec']['group']}/{crd['spec']['versions'][0]['name']}"
    names = crd["spec"]["names"]
    wait_for_kind(api, version, names["kind"], names["plural"], deadline)


def wait_for_kind(api: Api, version: str, kind: str, plural: str, deadline: float) -> None:
    """Until the server lists a kind and applies it: the schema of a new CRD reaches server-side apply last."""
    body = {"apiVersion": version, "kind": kind, "metadata": {"name": "probe"}, "spec": {}}
    path = f"/apis/{version}/namespaces/ml/{plural}/probe?fieldManager=probe&dryRun=All"
    while True:
        try:
            api.names(version, plural)
            api.call("PATCH", path, body, "application/apply-patch+yaml")
            return
        except urllib.error.HTTPError as error:
            if error.code == 422:  # its schema is known: it refuses the empty spec
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"{version} {kind}: {error}") from error
            time.sleep(0.05)
