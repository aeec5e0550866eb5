"""A run's objects in a cluster, through Kubernetes' official client: apply, status, suspend, resume, delete.

Thin: what an object should be is decided in `manifests.py`, what becomes of it by KubeRay. Everything of a run is found
by its label, so that nothing has to be remembered here. What a RayJob is and which comes next, `k8s_chain.py` decides.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError, PreflightError, first_line
from outlast.cluster.kubernetes.accessors import mapping, rows
from outlast.cluster.kubernetes.rayjob_sequence import (
    MANAGER,
    RAY,
    RESUMES,
    JobPhase,
    applied_last,
    consequences,
    describe_state,
    phase,
    successor,
)
from outlast.cluster.kubernetes.render import QUEUE_LABEL, RUN_LABEL

#: What belongs to a run, in the order in which to delete it: first what makes pods.
KINDS = {
    "RayJob": RAY,
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "ConfigMap": "v1",
    "ServiceAccount": "v1",
}
_CLAIM = "PersistentVolumeClaim"
_MAX_EVENTS = 10


class _Missing(PreflightError):
    """There is no such object, or no such namespace."""


def _check_owner(name: str, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ConfigError if an object of this name belongs to another run."""
    run, other = (mapping(meta, "labels").get(RUN_LABEL) for meta in (ours, there))
    if run and other and run != other:
        raise ConfigError(f"{name} is there already, and belongs to run {other}", hint="render with another --name")


def _check_queue(job: Mapping[str, Any], verb: str) -> None:
    """Raises PreflightError if Kueue says when a RayJob runs: it sets `suspend` itself, and sets it back."""
    meta = mapping(job, "metadata")
    if QUEUE_LABEL in mapping(meta, "labels"):
        active = str(verb == "resume").lower()
        raise PreflightError(
            f"rayjob/{meta['name']} is in a queue of Kueue, which would undo this",
            hint=f"kubectl get workloads -l kueue.x-k8s.io/job-uid={meta.get('uid')} names its workload W; then "
            f"`kubectl kueue {verb} workload W`, or set spec.active: {active} of it",
        )


class Cluster:
    """One namespace of a cluster.

    Args:
        context: A context of the kubeconfig; default: the current one. In a pod: its service account.
        namespace: Default: the context's.

    Raises:
        PreflightError: There is no client, no configuration, or no cluster that answers.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        try:
            from kubernetes import client, config, dynamic
        except ImportError as error:
            raise PreflightError(
                "Kubernetes' Python client is not installed", hint='pip install "outlast[k8s]"'
            ) from error
        settings = client.Configuration()
        settings.retries = 2
        try:
            here = _configure(settings, context, config)
        except (config.ConfigException, OSError) as error:
            raise PreflightError(
                f"no cluster is configured: {first_line(error)}", hint="set KUBECONFIG, or give --context"
            ) from error
        self.namespace = namespace or here
        self._asked = namespace
        # By default the client keeps what it finds out in a file that anybody may write.
        with _explained(), tempfile.TemporaryDirectory(prefix="outlast-k8s-") as folder:
            cache = str(Path(folder, "resources.json"))
            self._client = dynamic.DynamicClient(client.ApiClient(settings), cache_file=cache)

    def apply(self, objects: Sequence[Mapping[str, Any]], *, force: bool = False) -> list[str]:
        """Server-side apply, in the order given. Unknown fields are refused.

        Args:
            objects: What to apply.
            force: Take fields over that somebody else has set since.

        Returns:
            One line for each object, and what else there is to say.

        Raises:
            ConfigError: The cluster refuses an object, or somebody else owns a field of it.
            PreflightError: The cluster cannot be asked.
        """
        for item in objects:
            if not mapping(item, "metadata").get("name"):
                raise ConfigError(
                    f"an object of kind {item['kind']} has no metadata.name, and apply finds what is there by it",
                    hint="give it a name; generateName is for `kubectl create`",
                )
            theirs = mapping(item, "metadata").get("namespace")
            if self._asked and theirs and theirs != self._asked:
                raise ConfigError(
                    f"{item['kind']}/{item['metadata']['name']} goes to namespace {theirs}, not {self._asked}".lower(),
                    hint=f"leave out --namespace, or render with --namespace {self._asked}",
                )
        said = []
        for item in objects:
            before = self._find(item)
            name = f"{item['kind']}/{item['metadata']['name']}".lower()
            if before is not None:
                _check_owner(name, mapping(before, "metadata"), mapping(item, "metadata"))
            with _explained(name):
                after = self._apply(item, force=force)
            changed = before is None or before["metadata"].get("generation") != after["metadata"].get("generation")
            said.append(f"{name} {'created' if before is None else 'applied'}")
            if item["kind"] == "RayJob" and before is not None:
                run = mapping(item, "metadata", "labels").get(RUN_LABEL)
                newest = self.jobs(run)[-1:] if run else []
                said += consequences(after, newest[0] if newest else after, changed=changed)
        return said

    def jobs(self, run: str) -> list[dict[str, Any]]:
        """The run's RayJobs, oldest first."""
        return sorted(self._list("RayJob", RAY, run), key=lambda job: str(job["metadata"].get("creationTimestamp")))

    def newest(self, run: str) -> dict[str, Any]:
        """The run's newest RayJob.

        Raises:
            PreflightError: There is none.
        """
        found = self.jobs(run)
        if not found:
            raise PreflightError(
                f"namespace {self.namespace} has no RayJob of run {run}",
                hint="outlast k8s render RUN.yaml --image IMAGE | outlast k8s apply -",
            )
        return found[-1]

    def status(self, run: str) -> dict[str, Any]:
        """The run's RayJobs, pods and warnings, as plain values."""
        self.newest(run)
        jobs = self.jobs(run)
        pods = [_pod_row(pod) for pod in self._list("Pod", "v1", run)]
        names = {row["name"] for row in pods}.union(*(describe_state(job) for job in jobs))
        with _explained():
            told = self._resource("Event", "v1").get(namespace=self.namespace).to_dict()["items"]
        warnings = [
            {"t": event.get("lastTimestamp") or event.get("eventTime"), "of": event["involvedObject"].get("name")}
            | {key: event.get(key) for key in ("reason", "message", "count")}
            for event in told
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
        """Frees the run's nodes; the workers commit first. Says what was done.

        Raises:
            PreflightError: There is no such run, or Kueue suspends it.
        """
        job = self.newest(run)
        name = job["metadata"]["name"]
        if phase(job) is not JobPhase.LIVE:
            return f"rayjob/{name} is {phase(job).value}; nothing to suspend"
        _check_queue(job, "stop")
        self._set_suspend(name, True)
        return f"rayjob/{name} suspended; go on with: outlast k8s resume {run}"

    def resume(self, run: str) -> str:
        """Goes on with a run that was suspended or has ended. Says what was done.

        Raises:
            PreflightError: There is no such run, it is being deleted, or Kueue lets it go on.
        """
        job = self.newest(run)
        name = job["metadata"]["name"]
        match phase(job):
            case JobPhase.LIVE:
                return f"rayjob/{name} is at work"
            case JobPhase.DONE:
                return f"rayjob/{name} is done"
            case JobPhase.LEAVING:
                raise PreflightError(f"rayjob/{name} is being deleted", hint="try again in a moment")
            case JobPhase.SUSPENDED:
                _check_queue(job, "resume")
                self._set_suspend(name, False)
                return f"rayjob/{name} goes on"
        taken = [item["metadata"]["name"] for item in self._list("RayJob", RAY)]
        made = successor(job, taken, spec_of=applied_last(self.jobs(run)))
        with _explained(f"rayjob/{made['metadata']['name']}"):
            self._apply(made)
        return f"rayjob/{made['metadata']['name']} created; it goes on where {name} ended"

    def delete(self, run: str, *, storage: bool = False) -> list[str]:
        """Deletes the run's objects; the driver commits first. Says what went.

        Args:
            run: Name of the run.
            storage: The claim too, and with it the checkpoints.

        Raises:
            PreflightError: There is nothing of this run.
        """
        kinds = KINDS | ({_CLAIM: "v1"} if storage else {})
        gone = []
        for kind, version in kinds.items():
            for item in self._list(kind, version, run, "app.kubernetes.io/name=outlast"):
                name = item["metadata"]["name"]
                with _explained(f"{kind}/{name}".lower()):
                    self._resource(kind, version).delete(name=name, namespace=self.namespace)
                gone.append(f"{kind}/{name} deleted".lower())
        kept = [] if storage else self._list(_CLAIM, "v1", run)
        if not gone and not kept:
            raise PreflightError(
                f"namespace {self.namespace} has no objects of run {run}",
                hint="kubectl get rayjobs --all-namespaces --show-labels; --namespace says where",
            )
        names = [item["metadata"]["name"] for item in kept]
        return gone + [f"claim {name} stays, with the checkpoints; --storage deletes it too" for name in names]

    def _set_suspend(self, name: str, value: bool) -> None:
        with _explained(f"rayjob/{name}"):
            self._resource("RayJob", RAY).patch(
                name=name,
                namespace=self.namespace,
                body={"spec": {"suspend": value}},
                content_type="application/merge-patch+json",
                field_manager=MANAGER,
            )

    def _apply(self, item: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
        answer = self._resource(item["kind"], item["apiVersion"]).server_side_apply(
            body=dict(item),
            namespace=mapping(item, "metadata").get("namespace") or self.namespace,
            field_manager=MANAGER,
            force_conflicts=force,
            query_params=[("fieldValidation", "Strict")],
        )
        body: dict[str, Any] = answer.to_dict()
        return body

    def _find(self, item: Mapping[str, Any]) -> dict[str, Any] | None:
        meta = mapping(item, "metadata")
        try:
            with _explained(f"{item['kind']}/{meta['name']}".lower()):
                found = self._resource(item["kind"], item["apiVersion"]).get(
                    name=meta["name"], namespace=meta.get("namespace") or self.namespace
                )
        except _Missing:
            return None
        body: dict[str, Any] = found.to_dict()
        return body

    def _list(self, kind: str, version: str, run: str | None = None, *more: str) -> list[dict[str, Any]]:
        labels = ",".join((f"{RUN_LABEL}={run}", *more)) if run else ""
        with _explained(kind.lower()):
            found = self._resource(kind, version).get(namespace=self.namespace, label_selector=labels)
        items: list[dict[str, Any]] = found.to_dict()["items"]
        return items

    def _resource(self, kind: str, version: str) -> Any:
        return self._client.resources.get(kind=kind, api_version=version)


def _configure(settings: Any, context: str | None, config: Any) -> str:
    """Fills in the client's settings, by the kubeconfig or by what a pod is given. Returns the namespace."""
    file = os.environ.get("KUBECONFIG") or "~/.kube/config"  # the client looks at it once, when it is imported
    if not any(Path(part).expanduser().is_file() for part in file.split(os.pathsep)):
        config.load_incluster_config(client_configuration=settings)
        return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8").strip()
    config.load_kube_config(config_file=file, context=context, client_configuration=settings)
    contexts, current = config.list_kube_config_contexts(file)
    chosen = next((item for item in contexts if item["name"] == context), current)
    return str(mapping(chosen, "context").get("namespace") or "default")


@contextmanager
def _explained(name: str = "") -> Iterator[None]:
    """Turns what the API server answers into outlast's errors."""
    from kubernetes.client.exceptions import ApiException
    from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except NotFoundError as error:
        said = f"{name}: {_message(error)}".removeprefix(": ")
        raise _Missing(said, hint="kubectl get namespaces; --namespace takes one that is there") from error
    except ResourceNotFoundError as error:
        raise PreflightError(
            f"the cluster does not know this kind of object: {first_line(error)}",
            hint="install KubeRay 1.7 (or the operator whose kind it is); see k8s/README.md",
        ) from error
    except ApiException as error:
        said = f"{name}: {_message(error)}".removeprefix(": ")
        if error.status == 409:
            raise ConfigError(said, hint="somebody else has set these fields; --force takes them over") from error
        if error.status in (400, 422):
            raise ConfigError(said, hint="outlast k8s lint FILE") from error
        raise PreflightError(said, hint="kubectl auth can-i --list says what you may do") from error
    except HTTPError as error:
        raise PreflightError(
            f"the cluster does not answer: {first_line(error)}", hint="kubectl cluster-info"
        ) from error


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
    states = rows(mapping(pod, "status"), "containerStatuses")
    ended = [mapping(state, where, "terminated") for state in states for where in ("state", "lastState")]
    waits = [
        str(mapping(state, "state", "waiting").get("reason")) for state in states if mapping(state, "state", "waiting")
    ]
    return {
        "name": pod["metadata"]["name"],
        "role": mapping(pod, "metadata", "labels").get("ray.io/node-type", "submitter"),
        "phase": mapping(pod, "status").get("phase"),
        "node": mapping(pod, "spec").get("nodeName"),
        "restarts": sum(int(state.get("restartCount", 0)) for state in states),
        "waits_for": waits[0] if waits else None,
        "last_end": next((str(item.get("reason")) for item in ended if item), None),
    }
