"""A run's objects in a cluster, through Kubernetes' official client: apply, status, suspend, resume, delete.

A thin layer without state: `render.py` builds the objects, `rayjob_successor.py` decides the phase of a RayJob and its
successor, KubeRay does the rest. Objects of a run are found by its label; nothing else may be touched.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.cluster.kubernetes.accessors import mapping, mappings
from outlast.cluster.kubernetes.rayjob_successor import (
    MANAGER,
    RAY,
    RESUMES,
    JobPhase,
    apply_notes,
    event_sources,
    last_applied,
    phase,
    successor,
)
from outlast.cluster.kubernetes.render import QUEUE_LABEL, RUN_LABEL

#: Kinds of a run's objects, in the order to delete them: first those that create pods.
KINDS = {
    "RayJob": RAY,
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "ConfigMap": "v1",
    "ServiceAccount": "v1",
}
_CLAIM = "PersistentVolumeClaim"
_MAX_EVENTS = 10


class _NotFound(PreflightError):
    """The object or the namespace does not exist."""


def _check_owner(name: str, existing: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ConfigError if an object of this name belongs to another run."""
    run, owner = (mapping(meta, "labels").get(RUN_LABEL) for meta in (ours, existing))
    if run and owner and run != owner:
        raise ConfigError(f"{name} already exists and belongs to run {owner}", hint="render with another --name")


def _check_queue(job: Mapping[str, Any], verb: str) -> None:
    """Raise PreflightError if Kueue schedules the RayJob: Kueue owns `suspend` and would set it back."""
    meta = mapping(job, "metadata")
    if QUEUE_LABEL in mapping(meta, "labels"):
        active = str(verb == "resume").lower()
        raise PreflightError(
            f"rayjob/{meta['name']} is in a Kueue queue, and Kueue would undo this change",
            hint=f"kubectl get workloads -l kueue.x-k8s.io/job-uid={meta.get('uid')} names its workload W; then "
            f"`kubectl kueue {verb} workload W`, or set spec.active: {active} of it",
        )


class KubernetesNamespace:
    """One namespace of a cluster.

    Args:
        context: A context of the kubeconfig; default: the current one. In a pod, its service account is used.
        namespace: Default: the context's.

    Raises:
        PreflightError: The client is not installed, nothing is configured, or the cluster does not answer.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        try:
            from kubernetes import client, config, dynamic
        except ImportError as error:
            hint = 'pip install "outlast[k8s]"'
            raise PreflightError("Kubernetes' Python client is not installed", hint=hint) from error
        settings = client.Configuration()
        settings.retries = 2
        try:
            default_namespace = _configure(settings, context, config)
        except (config.ConfigException, OSError) as error:
            hint = "set KUBECONFIG, or give --context"
            raise PreflightError(f"no cluster is configured: {first_line(error)}", hint=hint) from error
        self.namespace = namespace or default_namespace
        self._given_namespace = namespace
        # By default the client caches the API's resources in a file that every user may write.
        with _api_errors(), tempfile.TemporaryDirectory(prefix="outlast-k8s-") as folder:
            cache = str(Path(folder, "resources.json"))
            self._client = dynamic.DynamicClient(client.ApiClient(settings), cache_file=cache)

    def apply(self, objects: Sequence[Mapping[str, Any]], *, force: bool = False) -> list[str]:
        """Apply objects on the server's side, in the given order. `force` takes over fields of other field managers.

        Return one line for each object, and notes on what applying a RayJob does not change.

        Raises:
            ConfigError: The cluster refuses an object or an unknown field, or another field manager owns a field.
        """
        for item in objects:
            if not mapping(item, "metadata").get("name"):
                raise ConfigError(
                    f"an object of kind {item['kind']} has no metadata.name, which apply needs",
                    hint="give it a name; generateName is for `kubectl create`",
                )
            target = mapping(item, "metadata").get("namespace")
            if self._given_namespace and target and target != self._given_namespace:
                raise ConfigError(
                    f"{_name(item)} has namespace {target}, but --namespace is {self._given_namespace}",
                    hint=f"omit --namespace, or render with --namespace {self._given_namespace}",
                )
        lines = []
        for item in objects:
            before = self._find(item)
            name = _name(item)
            if before is not None:
                _check_owner(name, mapping(before, "metadata"), mapping(item, "metadata"))
            after = self._apply(item, force=force)
            changed = before is None or before["metadata"].get("generation") != after["metadata"].get("generation")
            lines.append(f"{name} {'created' if before is None else 'applied'}")
            if item["kind"] == "RayJob" and before is not None:
                run = mapping(item, "metadata", "labels").get(RUN_LABEL)
                newest = self.jobs(run)[-1:] if run else []
                lines += apply_notes(after, newest[0] if newest else after, changed=changed)
        return lines

    def jobs(self, run: str) -> list[dict[str, Any]]:
        """Return the run's RayJobs, oldest first."""
        return sorted(self._list("RayJob", RAY, run), key=lambda job: str(job["metadata"].get("creationTimestamp")))

    def newest(self, run: str) -> dict[str, Any]:
        """Return the run's newest RayJob. Raises PreflightError if the run has none."""
        jobs = self.jobs(run)
        if not jobs:
            raise PreflightError(
                f"namespace {self.namespace} has no RayJob of run {run}",
                hint="outlast k8s render RUN.yaml --image IMAGE | outlast k8s apply -",
            )
        return jobs[-1]

    def status(self, run: str) -> dict[str, Any]:
        """Return the run's RayJobs, pods and warnings, as plain values."""
        self.newest(run)
        jobs = self.jobs(run)
        pods = [_pod_row(pod) for pod in self._list("Pod", "v1", run)]
        names = {row["name"] for row in pods}.union(*(event_sources(job) for job in jobs))
        warnings = [
            {"t": event.get("lastTimestamp") or event.get("eventTime"), "of": event["involvedObject"].get("name")}
            | {key: event.get(key) for key in ("reason", "message", "count")}
            for event in self._list("Event", "v1")
            if event.get("type") == "Warning" and event["involvedObject"].get("name") in names
        ]
        return {
            "run": run,
            "namespace": self.namespace,
            "jobs": [_job_row(job) for job in jobs],
            "pods": pods,
            "warnings": sorted(warnings, key=lambda row: str(row["t"]))[-_MAX_EVENTS:],
        }

    def suspend(self, run: str) -> str:
        """Suspend the run, which frees its nodes; the workers commit first. Return a line that states what was done."""
        job = self.newest(run)
        name = job["metadata"]["name"]
        if phase(job) is not JobPhase.LIVE:
            return f"rayjob/{name} is {phase(job).value}; nothing to suspend"
        _check_queue(job, "stop")
        self._set_suspend(name, True)
        return f"rayjob/{name} suspended; to resume it: outlast k8s resume {run}"

    def resume(self, run: str) -> str:
        """Resume a run that was suspended or has ended. Return a line that states what was done."""
        job = self.newest(run)
        name = job["metadata"]["name"]
        match phase(job):
            case JobPhase.LIVE:
                return f"rayjob/{name} is running"
            case JobPhase.DONE:
                return f"rayjob/{name} is done"
            case JobPhase.LEAVING:
                raise PreflightError(f"rayjob/{name} is being deleted", hint="try again in a moment")
            case JobPhase.SUSPENDED:
                _check_queue(job, "resume")
                self._set_suspend(name, False)
                return f"rayjob/{name} resumed"
        taken = [item["metadata"]["name"] for item in self._list("RayJob", RAY)]
        new_job = successor(job, taken, spec_of=last_applied(self.jobs(run)))
        self._apply(new_job)
        return f"{_name(new_job)} created; it resumes where {name} ended"

    def delete(self, run: str, *, storage: bool = False) -> list[str]:
        """Delete the run's objects, after the driver's commit; with `storage` the volume claim and checkpoints too.

        Return one line for each object that was deleted or kept. Raises PreflightError if there are none.
        """
        kinds = KINDS | ({_CLAIM: "v1"} if storage else {})
        deleted = []
        for kind, version in kinds.items():
            for item in self._list(kind, version, run, "app.kubernetes.io/name=outlast"):
                name = item["metadata"]["name"]
                self._call("delete", kind, version, name=name)
                deleted.append(f"{kind}/{name} deleted".lower())
        kept = [] if storage else self._list(_CLAIM, "v1", run)
        if not deleted and not kept:
            raise PreflightError(
                f"namespace {self.namespace} has no objects of run {run}",
                hint="find it with kubectl get rayjobs --all-namespaces --show-labels, then give --namespace",
            )
        names = [item["metadata"]["name"] for item in kept]
        return deleted + [f"claim {name} kept, with the checkpoints; --storage deletes it too" for name in names]

    def _set_suspend(self, name: str, value: bool) -> None:
        patch = {"body": {"spec": {"suspend": value}}, "content_type": "application/merge-patch+json"}
        self._call("patch", "RayJob", RAY, name=name, field_manager=MANAGER, **patch)

    def _apply(self, item: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
        options = {"force_conflicts": force, "query_params": [("fieldValidation", "Strict")]}
        return self._call_on(item, "server_side_apply", body=dict(item), field_manager=MANAGER, **options)

    def _find(self, item: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return self._call_on(item, "get")
        except _NotFound:
            return None

    def _list(self, kind: str, version: str, run: str | None = None, *more: str) -> list[dict[str, Any]]:
        labels = ",".join((f"{RUN_LABEL}={run}", *more)) if run else ""
        items: list[dict[str, Any]] = self._call("get", kind, version, label_selector=labels)["items"]
        return items

    def _call_on(self, item: Mapping[str, Any], verb: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the official client on an object, in its own namespace if it names one."""
        meta = item["metadata"]
        arguments |= {"name": meta["name"], "namespace": meta.get("namespace") or self.namespace}
        return self._call(verb, item["kind"], item["apiVersion"], **arguments)

    def _call(self, verb: str, kind: str, version: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the official client on a kind's objects, in this namespace by default."""
        with _api_errors("/".join(filter(None, (kind, arguments.get("name")))).lower()):
            resource = self._client.resources.get(kind=kind, api_version=version)
            body: dict[str, Any] = getattr(resource, verb)(**{"namespace": self.namespace, **arguments}).to_dict()
        return body


def _configure(settings: Any, context: str | None, config: Any) -> str:
    """Fill in the client's settings, from the kubeconfig or a pod's service account. Return the namespace."""
    file = os.environ.get("KUBECONFIG") or "~/.kube/config"  # the client reads the variable once, at import
    if not any(Path(part).expanduser().is_file() for part in file.split(os.pathsep)):
        config.load_incluster_config(client_configuration=settings)
        return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8").strip()
    config.load_kube_config(config_file=file, context=context, client_configuration=settings)
    contexts, current = config.list_kube_config_contexts(file)
    chosen = next((item for item in contexts if item["name"] == context), current)
    return str(mapping(chosen, "context").get("namespace") or "default")


@contextmanager
def _api_errors(name: str = "") -> Iterator[None]:
    """Translate errors of the API server into outlast's."""
    from kubernetes.client.exceptions import ApiException
    from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ResourceNotFoundError as error:
        raise PreflightError(
            f"the cluster has no such kind of object: {first_line(error)}",
            hint="install KubeRay 1.7 (or the operator that defines the kind); see k8s/README.md",
        ) from error
    except ApiException as error:
        message = f"{name}: {_message(error)}".removeprefix(": ")
        if isinstance(error, NotFoundError):
            raise _NotFound(message, hint="kubectl get namespaces; give an existing one with --namespace") from error
        if error.status == 409:
            raise ConfigError(message, hint="another field manager set these fields; --force takes over") from error
        if error.status in (400, 422):
            raise ConfigError(message, hint="outlast k8s lint FILE") from error
        raise PreflightError(message, hint="kubectl auth can-i --list shows your permissions") from error
    except HTTPError as error:
        message = f"the cluster does not answer: {first_line(error)}"
        raise PreflightError(message, hint="kubectl cluster-info") from error


def _name(item: Mapping[str, Any]) -> str:
    return f"{item['kind']}/{item['metadata']['name']}".lower()


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def _job_row(job: Mapping[str, Any]) -> dict[str, Any]:
    status, ray = mapping(job, "status"), mapping(job, "status", "rayClusterStatus")
    return {
        "name": job["metadata"]["name"],
        "phase": phase(job).value,
        "deployment": status.get("jobDeploymentStatus") or "New",
        "job": status.get("jobStatus") or None,
        "reason": status.get("reason") or None,
        "message": status.get("message") or None,
        "tries_failed": status.get("failed") or 0,
        "backoff_limit": mapping(job, "spec").get("backoffLimit", 0),
        "cluster": ray.get("state") or None,
        "workers_ready": ray.get("readyWorkerReplicas") or 0,
        "workers_wanted": ray.get("desiredWorkerReplicas") or 0,
        "started": status.get("startTime"),
        "ended": status.get("endTime"),
        "resumes": mapping(job, "metadata", "annotations").get(RESUMES),
    }


def _pod_row(pod: Mapping[str, Any]) -> dict[str, Any]:
    states = mappings(mapping(pod, "status"), "containerStatuses")
    ended = [mapping(state, where, "terminated") for state in states for where in ("state", "lastState")]
    waiting = [mapping(state, "state", "waiting") for state in states]
    return {
        "name": pod["metadata"]["name"],
        "role": mapping(pod, "metadata", "labels").get("ray.io/node-type", "submitter"),
        "phase": mapping(pod, "status").get("phase"),
        "node": mapping(pod, "spec").get("nodeName"),
        "restarts": sum(int(state.get("restartCount", 0)) for state in states),
        "waits_for": next((str(item.get("reason")) for item in waiting if item), None),
        "last_end": next((str(item.get("reason")) for item in ended if item), None),
    }
