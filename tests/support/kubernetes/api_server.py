"""API servers for the tests of `k8s_client`: a real one where it is at hand, and a small one that speaks enough.

The real one is taken from `KUBEBUILDER_ASSETS`, as controllers' own tests do: a folder with `etcd` and
`kube-apiserver`. No package has it, so elsewhere only the small one is there. It knows discovery, server-side apply
with owners of fields, merge patches, label selectors, the status, and two things of KubeRay's schema.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.kubernetes.manifests import CRDS

TOKEN = "a-token-of-the-test"
KINDS = {
    "v1": {
        "ConfigMap": "configmaps",
        "ServiceAccount": "serviceaccounts",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
        "Event": "events",
    },
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "ray.io/v1": {"RayJob": "rayjobs"},
}
_PATH = re.compile(
    r"/(?:api|apis)/(?P<version>.+?)/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?P<status>/status)?"
)


def assets() -> Path | None:
    """The folder with a real etcd and kube-apiserver, or None."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    found = Path(folder) if folder else None
    return found if found and (found / "kube-apiserver").is_file() and (found / "etcd").is_file() else None


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Api:
    """An API server, for the test's own hands: what the operator and the kubelet would write."""

    def __init__(self, url: str, folder: Path, certificate: Path | None = None) -> None:
        self.url = url
        self.kubeconfig = folder / "kubeconfig"
        self._certificate = certificate
        trusted = {"certificate-authority": str(certificate)} if certificate else {}
        body = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url, **trusted}}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "ml"}}],
            "current-context": "test",
        }
        self.kubeconfig.write_text(yaml.safe_dump(body))

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """One request as JSON.

        Raises:
            urllib.error.HTTPError: The server refuses it.
        """
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        trusted = ssl.create_default_context(cafile=self._certificate) if self._certificate else None
        with urllib.request.urlopen(request, timeout=30, context=trusted) as answer:
            return json.load(answer)

    def knows(self, version: str) -> bool:
        """Whether the server has a group and version, such as `policy/v1`."""
        try:
            self.call("GET", f"/apis/{version}" if "/" in version else f"/api/{version}")
        except urllib.error.HTTPError:
            return False
        return True

    def set_status(self, job: str, **status: Any) -> None:
        """What the operator writes of a RayJob."""
        path = f"/apis/ray.io/v1/namespaces/ml/rayjobs/{job}/status"
        self.call("PATCH", path, {"status": status}, "application/merge-patch+json")

    def patch(self, job: str, manager: str, **spec: Any) -> None:
        """What somebody else sets of a RayJob."""
        path = f"/apis/ray.io/v1/namespaces/ml/rayjobs/{job}?fieldManager={manager}"
        self.call("PATCH", path, {"spec": spec}, "application/merge-patch+json")

    def get(self, job: str) -> dict[str, Any]:
        body: dict[str, Any] = self.call("GET", f"/apis/ray.io/v1/namespaces/ml/rayjobs/{job}")
        return body

    def names(self, version: str, plural: str) -> list[str]:
        """What there is of a kind, by name."""
        root = "api" if "/" not in version else "apis"
        rows = self.call("GET", f"/{root}/{version}/namespaces/ml/{plural}")["items"]
        return sorted(row["metadata"]["name"] for row in rows)

    def make(self, version: str, plural: str, body: dict[str, Any]) -> None:
        root = "api" if "/" not in version else "apis"
        self.call("POST", f"/{root}/{version}/namespaces/ml/{plural}", body)


# -- the small one -----------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The fields of an object; a list is one, as it is in a CRD without list types."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def merge(old: Any, new: Any) -> Any:
    """JSON merge patch."""
    if not isinstance(new, dict):
        return new
    old = dict(old) if isinstance(old, dict) else {}
    for key, item in new.items():
        if item is None:
            old.pop(key, None)
        else:
            old[key] = merge(old.get(key), item)
    return old


class Store:
    """The objects, and who owns which field of them."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self._owners: dict[tuple[tuple[str, str, str, str], tuple[str, ...]], str] = {}
        self._lock = threading.Lock()
        self._count = 0

    def write(
        self, key: tuple[str, str, str, str], body: dict[str, Any], manager: str, *, force: bool, is_apply: bool
    ) -> dict[str, Any]:
        """Creates or changes an object.

        Raises:
            Refused: 409 where another manager owns a field, 422 for what the schema does not know.
        """
        with self._lock:
            old = self.objects.get(key)
            self._check(key, body)
            fields = {path: value for path, value in leaves(body) if path[:1] in (("spec",), ("data",))}
            mine = {path for (at, path), owner in self._owners.items() if at == key and owner == manager}
            known = dict(leaves(old or {}))
            for path, value in fields.items() if is_apply else ():
                owner = self._owners.get((key, path))
                if owner not in (None, manager) and known.get(path) != value and not force:
                    raise Refused(409, f'Apply failed with 1 conflict: conflict with "{owner}": .{".".join(path)}')
            new = copy.deepcopy(old) if old else {}
            for path in mine - fields.keys() if is_apply else ():
                _drop(new, path)
                del self._owners[key, path]
            new = merge(new, body)
            self._owners.update({(key, path): manager for path in fields})
            self._count += 1
            meta = new.setdefault("metadata", {})
            changed = old is None or old.get("spec") != new.get("spec")
            meta["generation"] = (meta.get("generation") or 0) + int(changed)
            meta.update(name=key[3], namespace=key[2], resourceVersion=str(self._count))
            meta.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._count)))
            _sign(meta, manager, "Apply" if is_apply else "Update", self._count)
            self.objects[key] = new
            return new

    def _check(self, key: tuple[str, str, str, str], body: dict[str, Any]) -> None:
        spec = body.get("spec", {})
        if key[1] == "rayjobs" and not isinstance(spec.get("backoffLimit", 0), int):
            raise Refused(422, f'RayJob.ray.io "{key[3]}" is invalid: spec.backoffLimit: Invalid value: "string"')
        if key[1] == "rayjobs" and "backOffLimit" in spec:
            raise Refused(400, 'strict decoding error: unknown field "spec.backOffLimit"')


def _sign(meta: dict[str, Any], manager: str, operation: str, moment: int) -> None:
    """Notes who has written last, and how."""
    entries = [
        row for row in meta.get("managedFields", []) if (row["manager"], row["operation"]) != (manager, operation)
    ]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    meta["managedFields"] = [*entries, {"manager": manager, "operation": operation, "time": at}]


def _drop(body: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        body = body.get(key, {})
    body.pop(path[-1], None)


class Handler(BaseHTTPRequestHandler):
    """The small API server."""

    store: Store
    kinds: dict[str, dict[str, str]]

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self) -> None:
        url, length = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Unauthorized")
            self._answer(200, self._found(url.path, {key: row[0] for key, row in parse_qs(url.query).items()}, body))
        except Refused as error:
            self._answer(error.code, {"kind": "Status", "code": error.code, "message": str(error)})

    do_GET = do_POST = do_PATCH = do_DELETE = _handle

    def _found(self, path: str, query: dict[str, str], body: Any) -> Any:
        match = _PATH.fullmatch(path)
        if match is None:
            return self._discovery(path)
        version, plural, namespace = match["version"], match["plural"], match["namespace"]
        if plural not in self.kinds.get(version, {}).values():
            raise Refused(404, "the server could not find the requested resource")
        if match["name"] is None and self.command == "GET":
            return self._list(version, plural, namespace, query)
        name = match["name"] or body["metadata"]["name"]
        key = (version, plural, namespace, name)
        if self.command in ("GET", "DELETE") and key not in self.store.objects:
            raise Refused(404, f'{plural} "{name}" not found')
        if self.command == "GET":
            return self.store.objects[key]
        if self.command == "DELETE":
            return self.store.objects.pop(key)
        is_apply = self.headers["Content-Type"] == "application/apply-patch+yaml"
        manager = query.get("fieldManager", "unknown")
        return self.store.write(key, body, manager, force=query.get("force") == "true", is_apply=is_apply)

    def _list(self, version: str, plural: str, namespace: str, query: dict[str, str]) -> dict[str, Any]:
        wanted = dict(term.split("=") for term in query.get("labelSelector", "").split(",") if term)
        rows = [
            body
            for (v, p, n, _), body in self.store.objects.items()
            if (v, p, n) == (version, plural, namespace)
            and wanted.items() <= body["metadata"].get("labels", {}).items()
        ]
        return {"kind": "List", "apiVersion": version, "metadata": {}, "items": rows}

    def _discovery(self, path: str) -> Any:
        groups = [version for version in self.kinds if "/" in version]
        if path == "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            rows = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
            named = [
                {"name": row["groupVersion"].split("/")[0], "versions": [row], "preferredVersion": row} for row in rows
            ]
            return {"kind": "APIGroupList", "groups": named}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version not in self.kinds:
            raise Refused(404, "the server could not find the requested resource")
        verbs = ["create", "delete", "get", "list", "patch"]
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
            for kind, plural in self.kinds[version].items()
        ]
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


@contextmanager
def small_api(folder: Path, *, without: str = "") -> Iterator[Api]:
    """The small one. `without` names a group and version that it does not know."""
    kinds = {version: rows for version, rows in KINDS.items() if version != without}
    handler = type("Bound", (Handler,), {"store": Store(), "kinds": kinds})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Api(f"http://127.0.0.1:{server.server_address[1]}", folder)
        server.shutdown()
        thread.join()


# -- the real one ------------------------------------------------------------------------------------------------------


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
    with (CRDS / "ray.io_rayjobs.yaml").open() as file:
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
    while True:
        try:
            api.names(version, crd["spec"]["names"]["plural"])
            return
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.3)
