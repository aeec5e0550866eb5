"""A small API server for the tests of the Kubernetes client, which speaks enough.

It knows discovery, server-side apply with owners of fields and its typed patch's refusals, merge patches, label
selectors, the status, finalizers, preconditions of a delete, and kinds that appear late.
"""

from __future__ import annotations

import copy
import json
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

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
    "ray.io/v1": {"RayJob": "rayjobs", "RayCronJob": "raycronjobs"},
}
#: A part of the schemas: the fields of RayJob's spec in KubeRay 1.7, by type.
_RAYJOB: dict[type, str] = {
    int: "activeDeadlineSeconds backoffLimit preRunningDeadlineSeconds ttlSecondsAfterFinished",
    float: "entrypointNumCpus entrypointNumGpus",
    str: "entrypoint entrypointResources jobId managedBy runtimeEnvYAML submissionMode",
    bool: "shutdownAfterJobFinishes suspend",
    dict: "clusterSelector deletionStrategy metadata rayClusterSpec submitterConfig submitterPodTemplate",
}
_FIELDS = {name: kind for kind, names in _RAYJOB.items() for name in names.split()}
#: What the typed patch calls the type that a schema wants, and that of a value.
_WANTED = {int: "numeric (int or float)", float: "numeric (int or float)", str: "string", bool: "boolean", dict: "map"}
_GOT = {int: "int64", float: "float64", str: "string", bool: "boolean", dict: "map", list: "list", type(None): "null"}
_PATH = re.compile(
    r"/(?:api|apis)/(?P<version>.+?)/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?P<status>/status)?"
)


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

    def clear(self) -> None:
        """Deletes every object that a test may have made, finalizers or not."""
        for version, plural in ((v, p) for v, rows in KINDS.items() for p in rows.values()):
            root = "api" if "/" not in version else "apis"
            for name in self.names(version, plural) if self.knows(version) else ():
                if name in ("kube-root-ca.crt", "default"):
                    continue
                path = f"/{root}/{version}/namespaces/ml/{plural}/{name}"
                with suppress(urllib.error.HTTPError):
                    self.call("PATCH", path, {"metadata": {"finalizers": None}}, "application/merge-patch+json")
                    self.call("DELETE", f"{path}?gracePeriodSeconds=0")

    def set_metadata(self, version: str, plural: str, name: str, **metadata: Any) -> None:
        """Sets metadata of an object, as another tool does."""
        root = "api" if "/" not in version else "apis"
        path = f"/{root}/{version}/namespaces/ml/{plural}/{name}"
        self.call("PATCH", path, {"metadata": metadata}, "application/merge-patch+json")

    def make(self, version: str, plural: str, body: dict[str, Any]) -> None:
        root = "api" if "/" not in version else "apis"
        self.call("POST", f"/{root}/{version}/namespaces/ml/{plural}", body)


# -- the server -------------------------------------------------------------------------------------------------------


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
        self.refusals: dict[str, tuple[int, str]] = {}  #: what is answered to each write of a kind, by its plural

    def write(
        self, key: tuple[str, str, str, str], body: dict[str, Any], manager: str, *, force: bool, is_apply: bool
    ) -> dict[str, Any]:
        """Creates or changes an object.

        Raises:
            Refused: 409 where another manager owns a field, 422 for what the schema does not know.
        """
        with self._lock:
            old = self.objects.get(key)
            if is_apply:
                _check_types(key, body)
            self._check(key, body, old)
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
            meta.setdefault("uid", f"uid-{self._count}")
            meta.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._count)))
            _sign(meta, manager, "Apply" if is_apply else "Update", self._count)
            self.objects[key] = new
            return new

    def _check(self, key: tuple[str, str, str, str], body: dict[str, Any], old: dict[str, Any] | None) -> None:
        if self.refusals and key[1] in self.refusals:
            raise Refused(*self.refusals[key[1]])
        if key[1] == "persistentvolumeclaims" and old and old["spec"] != body.get("spec", old["spec"]):
            text = "spec: Forbidden: spec is immutable after creation except resources.requests for bound claims"
            raise Refused(422, f'PersistentVolumeClaim "{key[3]}" is invalid: {text}')

    def delete(self, key: tuple[str, str, str, str], uid: str | None) -> dict[str, Any]:
        """Deletes an object, or marks it if it has finalizers.

        Raises:
            Refused: 409 if it has not the uid that the request asks for.
        """
        with self._lock:
            body = self.objects[key]
            meta = body["metadata"]
            if uid not in (None, meta["uid"]):
                raise Refused(
                    409,
                    f"Operation cannot be fulfilled on {key[1]} {json.dumps(key[3])}: the UID in the precondition "
                    f"({uid}) does not match the UID in record ({meta['uid']}). The object might have been deleted "
                    "and then recreated",
                )
            if meta.get("finalizers"):
                meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                return body
            return self.objects.pop(key)


def _check_types(key: tuple[str, str, str, str], body: dict[str, Any]) -> None:
    """Refuses wrong types and unknown fields as the typed patch of server-side apply does: with status 500."""
    spec = body.get("spec", {})
    if key[1] != "rayjobs":
        return
    wrong = []
    for name, value in spec.items():
        kind = _FIELDS.get(name)
        if kind is None:
            wrong.append(f".spec.{name}: field not declared in schema")
        elif type(value) not in ((int, float) if kind in (int, float) else (kind,)):
            wrong.append(f".spec.{name}: expected {_WANTED[kind]}, got {_GOT[type(value)]}")
    if wrong:
        listed = wrong[0] if len(wrong) == 1 else "".join(f"\n  {line}" for line in ("errors:", *wrong)).strip()
        raise Refused(
            500, f"failed to create typed patch object ({key[2]}/{key[3]}; {key[0]}, Kind={body['kind']}): {listed}"
        )


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
    late: dict[str, int]  #: how often a version is still answered with 404, as for a new CRD

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
            scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
            if (scheme.lower(), token) != ("bearer", TOKEN):
                raise Refused(401, "Unauthorized")
            self._answer(200, self._found(url.path, {key: row[0] for key, row in parse_qs(url.query).items()}, body))
        except Refused as error:
            self._answer(error.code, {"kind": "Status", "code": error.code, "message": str(error), "status": "Failure"})

    do_GET = do_POST = do_PATCH = do_DELETE = _handle

    def _found(self, path: str, query: dict[str, str], body: Any) -> Any:
        match = _PATH.fullmatch(path)
        for version in self.late:
            if path.startswith(f"/apis/{version}") and self.late[version] > 0:
                self.late[version] -= 1
                raise Refused(404, "the server could not find the requested resource")
        if match is None:
            return self._discovery(path)
        version, plural, namespace = match["version"], match["plural"], match["namespace"]
        if plural not in self.kinds.get(version, {}).values():
            raise Refused(404, "the server could not find the requested resource")
        if match["name"] is None and self.command == "GET":
            if refused := self.store.refusals.get(f"list {plural}"):
                raise Refused(*refused)
            return self._list(version, plural, namespace, query)
        name = match["name"] or body["metadata"]["name"]
        key = (version, plural, namespace, name)
        if self.command in ("GET", "DELETE") and key not in self.store.objects:
            raise Refused(404, f'{plural} "{name}" not found')
        if self.command == "GET":
            kind = next(kind for kind, its_plural in self.kinds[version].items() if its_plural == plural)
            return {"kind": kind, "apiVersion": version, **self.store.objects[key]}
        if self.command == "DELETE":
            return self.store.delete(key, ((body or {}).get("preconditions") or {}).get("uid"))
        is_apply = self.headers["Content-Type"] == "application/apply-patch+yaml"
        manager = query.get("fieldManager", "unknown")
        if query.get("dryRun") == "All":
            return body
        return self.store.write(key, body, manager, force=query.get("force") == "true", is_apply=is_apply)

    def _list(self, version: str, plural: str, namespace: str, query: dict[str, str]) -> dict[str, Any]:
        wanted = dict(term.split("=") for term in query.get("labelSelector", "").split(",") if term)
        rows = [
            body
            for (v, p, n, _), body in self.store.objects.items()
            if (v, p, n) == (version, plural, namespace)
            and wanted.items() <= body["metadata"].get("labels", {}).items()
        ]
        bare = [{key: item for key, item in body.items() if key not in ("kind", "apiVersion")} for body in rows]
        return {"kind": "List", "apiVersion": version, "metadata": {}, "items": bare}

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
def small_api(
    folder: Path,
    *,
    without: str = "",
    late: Mapping[str, int] | None = None,
    refusals: Mapping[str, tuple[int, str]] | None = None,
    tls: ssl.SSLContext | None = None,
    certificate: Path | None = None,
) -> Iterator[Api]:
    """The small one.

    `without` names a group and version, or a kind, that it does not know, `late` those that it knows only after some
    requests; `refusals` are its answers to writes, by plural, and to lists, by `list` and the plural. With `tls` it has
    the `certificate`.
    """
    kinds = {
        version: {kind: plural for kind, plural in rows.items() if kind != without}
        for version, rows in KINDS.items()
        if version != without
    }
    store = Store()
    store.refusals.update(refusals or {})
    handler = type("Bound", (Handler,), {"store": store, "kinds": kinds, "late": dict(late or {})})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Api(f"http{'s' * bool(tls)}://127.0.0.1:{server.server_address[1]}", folder, certificate)
        server.shutdown()
        thread.join()
