"""A run's objects in a cluster, through Kubernetes' official client: apply, status, suspend, resume, delete.

A thin layer without state: `render.py` builds the objects, `rayjob_successor.py` decides the phase of a RayJob and its
successor, `ownership.py` decides which objects are a run's, KubeRay does the rest. Nothing else may be touched.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError
from outlast.checkpointing.format.layout import check_run_name
from outlast.cluster.kubernetes.accessors import mapping, mappings
from outlast.cluster.kubernetes.api_errors import (
    AccessForbidden,
    KindUnknown,
    ObjectChanged,
    ObjectNotFound,
    api_errors,
)
from outlast.cluster.kubernetes.kubeconfig import configure
from outlast.cluster.kubernetes.ownership import (
    CRON_JOB,
    KINDS,
    RUN_LABEL,
    Deletion,
    RunIdentity,
    check_owner,
    object_name,
    of_run,
    owner,
    plan_deletion,
    run_of,
)
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
from outlast.cluster.kubernetes.render import QUEUE_LABEL

_MAX_EVENTS = 10


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
            from kubernetes import client, dynamic
        except ImportError as error:
            hint = 'pip install "outlast[k8s]"'
            raise PreflightError("Kubernetes' Python client is not installed", hint=hint) from error
        settings = client.Configuration()
        settings.retries = 2
        default_namespace = configure(settings, context)
        self.namespace = namespace or default_namespace
        self._given_namespace = namespace
        # By default the client caches the API's resources in a file that every user may write.
        with api_errors(), tempfile.TemporaryDirectory(prefix="outlast-k8s-") as folder:
            cache = str(Path(folder, "resources.json"))
            self._client = dynamic.DynamicClient(client.ApiClient(settings), cache_file=cache)

    def apply(self, objects: Sequence[Mapping[str, Any]], *, force: bool = False) -> list[str]:
        """Apply objects on the server's side, in the given order. `force` takes over fields of other field managers.

        Return one line for each object, and notes on what applying a RayJob does not change.

        Raises:
            ConfigError: The cluster refuses an object or an unknown field, another field manager owns a field, or an
                object of this name is not this run's. The hint names what was applied before it.
        """
        for item in objects:
            self._check_target(item)
        lines: list[str] = []
        done: list[str] = []
        for item in objects:
            try:
                line, *notes = self._apply_one(item, force=force)
            except OutlastError as error:
                if not done:
                    raise
                hint = (
                    f"{error.hint}\nstays from this apply: {', '.join(done)}; the corrected file can be applied again"
                )
                raise type(error)(error.message, hint=hint) from error
            done.append(line)
            lines += [line, *notes]
        return lines

    def jobs(self, run: str | RunIdentity) -> list[Mapping[str, Any]]:
        """Return the run's RayJobs, oldest first. Raises ConfigError if they are of several runs of this name."""
        found = of_run(self._list("RayJob"), _identity(run))
        return sorted(found, key=lambda job: str(job["metadata"].get("creationTimestamp")))

    def newest(self, run: str | RunIdentity) -> Mapping[str, Any]:
        """Return the run's newest RayJob. Raises PreflightError if the run has none."""
        jobs = self.jobs(run)
        if not jobs:
            schedules = [object_name(item) for item in of_run(self._cron_jobs(), _identity(run))]
            if schedules:
                raise PreflightError(
                    f"{', '.join(schedules)} makes the RayJobs of run {_identity(run).name}, and this command is for "
                    "RayJobs that were applied",
                    hint=f"kubectl get rayjobs,raycronjobs --namespace {self.namespace}",
                )
            raise PreflightError(
                f"namespace {self.namespace} has no RayJob of run {_identity(run).name}",
                hint="outlast k8s render RUN.yaml --image IMAGE | outlast k8s apply -",
            )
        return jobs[-1]

    def status(self, run: str | RunIdentity) -> dict[str, Any]:
        """Return the run's RayJobs, pods and warnings, as plain values."""
        self.newest(run)
        jobs = self.jobs(run)
        pods = [_pod_row(pod) for pod in self._pods(run)]
        names = {row["name"] for row in pods}.union(*(event_sources(job) for job in jobs))
        warnings = [
            {"t": event.get("lastTimestamp") or event.get("eventTime"), "of": event["involvedObject"].get("name")}
            | {key: event.get(key) for key in ("reason", "message", "count")}
            for event in self._list("Event", "v1")
            if event.get("type") == "Warning" and event["involvedObject"].get("name") in names
        ]
        return {
            "run": _identity(run).name,
            "namespace": self.namespace,
            "jobs": [_job_row(job) for job in jobs],
            "pods": pods,
            "warnings": sorted(warnings, key=lambda row: str(row["t"]))[-_MAX_EVENTS:],
        }

    def suspend(self, run: str | RunIdentity) -> str:
        """Suspend the run, which frees its nodes; the workers commit first. Return a line that states what was done."""
        job = self.newest(run)
        name = job["metadata"]["name"]
        if phase(job) is not JobPhase.LIVE:
            return f"rayjob/{name} is {phase(job).value}; nothing to suspend"
        _check_queue(job, "stop")
        self._set_suspend(name, True)
        return f"rayjob/{name} suspended; to resume it: outlast k8s resume {_identity(run).name}"

    def resume(self, run: str | RunIdentity) -> str:
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
        taken = [item["metadata"]["name"] for item in self._list("RayJob")]
        new_job = successor(job, taken, spec_of=last_applied(self.jobs(run)))
        self._apply(new_job)
        return f"{object_name(new_job)} created; it resumes where {name} ended"

    def plan_deletion(self, run: str | RunIdentity, *, storage: bool = False) -> Deletion:
        """Return what deleting the run deletes and leaves; with `storage` the volume claim and checkpoints too.

        Raises PreflightError if there is nothing of the run, ConfigError if there are several runs of this name.
        """
        identity = _identity(run)
        items = [item for kind in KINDS for item in (self._cron_jobs() if kind == CRON_JOB else self._list(kind))]
        plan = plan_deletion(items, identity, self.namespace, storage=storage, num_pods=len(self._pods(identity)))
        if plan.is_empty:
            raise PreflightError(
                f"namespace {self.namespace} has no objects of run {identity.name}",
                hint="find it with kubectl get rayjobs --all-namespaces --show-labels, then give --namespace",
            )
        return plan

    def delete(self, plan: Deletion) -> Iterator[str]:
        """Delete what `plan` names, and only that: not an object that replaced it. A running run commits first.

        Yield one line for each object.
        """
        for item in plan.to_delete:
            meta = item["metadata"]
            only_this = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": meta["uid"]}}
            try:
                self._call("delete", item["kind"], KINDS[item["kind"]], name=meta["name"], body=only_this)
            except ObjectNotFound:
                yield f"{object_name(item)} is gone already"
            except ObjectChanged:
                yield f"{object_name(item)} kept: it was replaced in the meantime; run the command again to look at it"
            else:
                yield f"{object_name(item)} deleted"

    def _check_target(self, item: Mapping[str, Any]) -> None:
        """Raise ConfigError if an object has no name, another namespace than was asked for, or what JSON has not."""
        if not mapping(item, "metadata").get("name"):
            raise ConfigError(
                f"an object of kind {item['kind']} has no metadata.name, which apply needs",
                hint="give it a name; generateName is for `kubectl create`",
            )
        try:
            json.dumps(item, default=lambda value: value.isoformat(), allow_nan=False)  # YAML has dates
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{object_name(item)} cannot be sent as JSON: it has a binary value, a set, NaN, or contains itself",
                hint="write binary data as base64 text",
            ) from error
        target = mapping(item, "metadata").get("namespace")
        if self._given_namespace and target and target != self._given_namespace:
            raise ConfigError(
                f"{object_name(item)} has namespace {target}, but --namespace is {self._given_namespace}",
                hint=f"omit --namespace, or render with --namespace {self._given_namespace}",
            )

    def _apply_one(self, item: Mapping[str, Any], *, force: bool) -> list[str]:
        """Apply an object. Return a line that states what was done, and notes."""
        before = self._find(item)
        if before is not None:
            check_owner(before, item)
        after = self._apply(item, force=force)
        lines = [f"{object_name(item)} {'created' if before is None else 'applied'}"]
        if item["kind"] != "RayJob" or before is None:
            return lines
        changed = before["metadata"].get("generation") != after["metadata"].get("generation")
        run = owner(item) or run_of(item)
        newest = self.jobs(run)[-1:] if run else []
        return lines + apply_notes(after, newest[0] if newest else after, changed=changed)

    def _set_suspend(self, name: str, value: bool) -> None:
        patch = {"body": {"spec": {"suspend": value}}, "content_type": "application/merge-patch+json"}
        self._call("patch", "RayJob", RAY, name=name, field_manager=MANAGER, **patch)

    def _apply(self, item: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
        options = {"force_conflicts": force, "query_params": [("fieldValidation", "Strict")]}
        return self._call_on(item, "server_side_apply", body=dict(item), field_manager=MANAGER, **options)

    def _find(self, item: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return self._call_on(item, "get")
        except ObjectNotFound:
            return None

    def _pods(self, run: str | RunIdentity) -> list[dict[str, Any]]:
        return self._list("Pod", "v1", label_selector=f"{RUN_LABEL}={_identity(run).name}")

    def _list(self, kind: str, version: str = "", **options: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self._call("get", kind, version or KINDS[kind], **options)["items"]
        return [{**item, "kind": kind} for item in items]  # a list's items may omit it

    def _cron_jobs(self) -> list[dict[str, Any]]:
        """Return the RayCronJobs; none if KubeRay has none, or a role for RayJobs only hides them."""
        try:
            return self._list(CRON_JOB)
        except (KindUnknown, AccessForbidden):
            return []

    def _call_on(self, item: Mapping[str, Any], verb: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the official client on an object, in its own namespace if it names one."""
        meta = item["metadata"]
        arguments |= {"name": meta["name"], "namespace": meta.get("namespace") or self.namespace}
        return self._call(verb, item["kind"], item["apiVersion"], **arguments)

    def _call(self, verb: str, kind: str, version: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the official client on a kind's objects, in this namespace by default."""
        arguments = {"namespace": self.namespace, **arguments}
        with api_errors("/".join(filter(None, (kind, arguments.get("name")))).lower(), arguments["namespace"]):
            resource = self._client.resources.get(kind=kind, api_version=version)
            body: dict[str, Any] = getattr(resource, verb)(**arguments).to_dict()
        return body


def _identity(run: str | RunIdentity) -> RunIdentity:
    """Return the identity of a run given by name. Raises ConfigError for a name that no run can have."""
    identity = RunIdentity(run) if isinstance(run, str) else run
    check_run_name(identity.name)
    return identity


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
