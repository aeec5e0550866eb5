"""What works until a machine is lost: settings that Kubernetes and KubeRay take, and that a run on spot nodes regrets.

`k8s/README.md` gives the reasons at length. Pure; no rule trusts the shape of what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import (
    LintComplaint,
    autoscales,
    containers,
    first_container,
    mapping,
    pod_templates,
    ray_groups,
    rows,
    variables,
    words,
)
from outlast.cluster.kubernetes.render import QUEUE_LABEL, SPOT
from outlast.cluster.kubernetes.settings import is_pinned

_LOST = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
_KARPENTER_KEEPS = "karpenter.sh/do-not-disrupt"
_OUTAGE_S = 300
_FEW_RETRIES = 3
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_DRAIN_DEFAULT_S = 30
_GRACE_DEFAULT_S = 30


def risks(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """What costs a run more than it needs to, or its life."""
    spec = mapping(job, "spec")
    cluster = mapping(spec, "rayClusterSpec")
    yield from _giving_up(spec)
    yield from _head(cluster)
    yield from _queue(job, cluster)
    for role, pod in pod_templates(job):
        yield from _pod(role, pod)
    for where, _, container in containers(job):
        yield from _container(where, container)
    for role, group in ray_groups(cluster):
        yield from _leaving(role, group)
        if role == "worker" and mapping(group, "template", "metadata", "annotations").get(_KARPENTER_KEEPS) == "true":
            yield role, f"{_KARPENTER_KEEPS}: Karpenter then evicts no pod from a spot node that is called back"
    if not mapping(cluster, "authOptions") and cluster:
        yield (
            "spec.rayClusterSpec.authOptions",
            "without mode: token, whoever reaches the pods runs code in them",
        )


def _giving_up(spec: Mapping[str, Any]) -> Iterator[LintComplaint]:
    retries = spec.get("backoffLimit", 0)
    if isinstance(retries, int) and retries < _FEW_RETRIES:
        yield "spec.backoffLimit", f"{retries} lost clusters end the run; outlast gives up by itself where it must"
    if "activeDeadlineSeconds" in spec:
        yield "spec.activeDeadlineSeconds", "ends the run for good, retries or not; suspend it instead"
    if "gcsFaultToleranceOptions" in mapping(spec, "rayClusterSpec"):
        yield (
            "spec.rayClusterSpec.gcsFaultToleranceOptions",
            "a new head then still knows the job, as failed; without it the job is submitted again and resumes",
        )
    entrypoint = str(spec.get("entrypoint", ""))
    if "outlast" in entrypoint and not entrypoint.startswith("exec "):
        yield "spec.entrypoint", "without `exec` each stop takes all of RAY_JOB_STOP_WAIT_TIME_S"
    if "outlast" in entrypoint and "--take-over" not in entrypoint:
        yield "spec.entrypoint", "without --take-over a retry waits to see whether the try before still lives"


def _head(cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    head, where = mapping(cluster, "headGroupSpec"), "spec.rayClusterSpec.headGroupSpec"
    if not head:
        return
    if str(mapping(head, "rayStartParams").get("num-cpus")) != "0":
        yield where, 'rayStartParams num-cpus is not "0": a worker may land on the head, whose loss restarts everything'
    placed = mapping(head, "template", "spec", "nodeSelector")
    if any(placed.get(key) == value for key, value in SPOT.items()):
        yield where, "runs on spot nodes: losing the head restarts everything"
    if "livenessProbe" not in first_container(head):
        yield where, "a head that hangs is restarted after 10 minutes, and KubeRay gives the run up after 5"


def _queue(job: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if QUEUE_LABEL in mapping(job, "metadata", "labels") and autoscales(cluster):
        yield "metadata.labels", f"Kueue admits no RayJob whose pods change in number, and {QUEUE_LABEL} asks for it"
    for number, group in enumerate(rows(cluster, "workerGroupSpecs")):
        wanted, least = group.get("replicas"), group.get("minReplicas")
        if not autoscales(cluster) and isinstance(wanted, int) and isinstance(least, int) and wanted > least:
            yield (
                f"spec.rayClusterSpec.workerGroupSpecs[{number}]",
                f"the job is submitted once all {wanted} pods run; {least} do with enableInTreeAutoscaling",
            )


def _pod(role: str, pod: Mapping[str, Any]) -> Iterator[LintComplaint]:
    spec = mapping(pod, "spec")
    if "app.kubernetes.io/name" in mapping(pod, "metadata", "labels"):
        yield role, "label app.kubernetes.io/name: KubeRay's head service selects by its own value, and finds no head"
    seconds = {str(item.get("key")): item.get("tolerationSeconds") for item in rows(spec, "tolerations")}
    slow = [key for key in _LOST if not isinstance(wait := seconds.get(key), int) or wait >= _OUTAGE_S]
    if slow:
        yield role, f"waits {_OUTAGE_S} s for a lost node ({', '.join(slow)}), as long as KubeRay waits for a head"
    if role != "submitter" and not any(mapping(volume, "emptyDir") for volume in rows(spec, "volumes")):
        yield role, "has no /dev/shm of its own size (emptyDir, medium Memory): 64 MiB, or all of the pod's memory"


def _container(where: str, container: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if "image" in container and not is_pinned(str(container["image"])):
        yield where, f"image {container['image']!r} may be another program tomorrow: give it a tag of its own"
    resources = mapping(container, "resources")
    asked, limit = mapping(resources, "requests").get("memory"), mapping(resources, "limits").get("memory")
    if where in ("head", "worker") and (limit is None or asked != limit):
        yield where, f"memory is {asked} asked for and {limit} allowed: make them equal, so that no neighbour kills it"


def _leaving(role: str, group: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """The two times that a pod has after SIGTERM."""
    grace = mapping(group, "template", "spec").get("terminationGracePeriodSeconds", _GRACE_DEFAULT_S)
    given = variables(first_container(group)).get(_DRAIN)
    drain = float(given) if given and re.fullmatch(r"\d+(\.\d+)?", str(given)) else _DRAIN_DEFAULT_S
    if isinstance(grace, int) and drain >= grace:
        yield (
            role,
            f"{_DRAIN} is {drain:g} s and terminationGracePeriodSeconds {grace}: the save in a node's last seconds "
            "never comes",
        )


def claim_complaints(claim: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if "ReadWriteMany" not in words(mapping(claim, "spec"), "accessModes"):
        yield "spec.accessModes", "head and workers write from several nodes: ReadWriteMany"


def budget_complaints(budget: Mapping[str, Any]) -> Iterator[LintComplaint]:
    spec = mapping(budget, "spec")
    chosen = mapping(spec, "selector", "matchLabels")
    if "maxUnavailable" in spec and any(str(key).startswith("ray.io/") for key in chosen):
        yield "spec.maxUnavailable", "cannot be counted for pods of a RayCluster, which has no scale: use minAvailable"
