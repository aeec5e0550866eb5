"""Settings that Kubernetes and KubeRay accept but that delay or end a run once a machine is lost, or misplace pods.

`k8s/README.md` gives the reasons. Pure; no rule trusts the shape of what it reads.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import (
    CLUSTER,
    LintComplaint,
    autoscales,
    containers,
    env_variables,
    first_container,
    mapping,
    mappings,
    pod_templates,
    ray_groups,
    strings,
    worker_groups,
)
from outlast.cluster.kubernetes.render import QUEUE_LABEL, SPOT
from outlast.cluster.kubernetes.settings import hides_programs, is_pinned
from outlast.cluster.kubernetes.variants import ELASTIC_ANNOTATION

_LOST_NODE_TAINTS = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
_DO_NOT_DISRUPT = "karpenter.sh/do-not-disrupt"
_OUTAGE_S = 300
_FEW_RETRIES = 3
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_DRAIN_DEFAULT_S = 30
_GRACE_DEFAULT_S = 30
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
#: Clouds that taint spot nodes with their label's key: GKE if the pool is created so, AKS always.
_TAINTED = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def reliability_risks(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield settings that make a failure expensive, or fatal."""
    spec = mapping(job, "spec")
    cluster = mapping(spec, "rayClusterSpec")
    yield from _retry_settings(spec)
    yield from _head(cluster)
    yield from _queue(job, cluster)
    for role, pod in pod_templates(job):
        yield from _pod(role, pod)
    for where, _, container in containers(job):
        yield from _container(where, container)
    for role, group in ray_groups(cluster):
        yield from _termination(role, group)
    if not mapping(cluster, "authOptions") and cluster:
        yield f"{CLUSTER}.authOptions", "without mode: token, any client that reaches the pods can run code in them"
    yield from _placement(job)


def _retry_settings(spec: Mapping[str, Any]) -> Iterator[LintComplaint]:
    retries = spec.get("backoffLimit", 0)
    if isinstance(retries, int) and retries < _FEW_RETRIES:
        text = f"allows {retries} retries, and each lost cluster takes one; outlast has a limit of its own"
        yield "spec.backoffLimit", text
    if "activeDeadlineSeconds" in spec:
        yield "spec.activeDeadlineSeconds", "ends the run for good, whatever backoffLimit is; suspend it instead"
    if "gcsFaultToleranceOptions" in mapping(spec, "rayClusterSpec"):
        text = "a new head keeps the job as failed; without this option the job is submitted again and resumes"
        yield f"{CLUSTER}.gcsFaultToleranceOptions", text
    entrypoint = str(spec.get("entrypoint", ""))
    if "outlast" in entrypoint and not entrypoint.startswith("exec "):
        yield "spec.entrypoint", "without `exec` each stop takes all of RAY_JOB_STOP_WAIT_TIME_S"
    if "outlast" in entrypoint and "--take-over" not in entrypoint:
        yield "spec.entrypoint", "without --take-over a retry first waits to see whether the previous launch is alive"


def _head(cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    head, where = mapping(cluster, "headGroupSpec"), f"{CLUSTER}.headGroupSpec"
    if not head:
        return
    if str(mapping(head, "rayStartParams").get("num-cpus")) != "0":
        yield where, 'rayStartParams num-cpus is not "0": a worker may run on the head, whose loss restarts the run'
    node_selector = mapping(head, "template", "spec", "nodeSelector")
    if any(node_selector.get(key) == value for key, value in SPOT.items()):
        yield where, "runs on spot nodes: losing the head restarts the run"
    if "livenessProbe" not in first_container(head):
        yield where, "has no livenessProbe: a hung head restarts after 10 minutes, but KubeRay gives up after 5"


def _queue(job: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    is_elastic = mapping(job, "metadata", "annotations").get(ELASTIC_ANNOTATION) == "true"
    if QUEUE_LABEL in mapping(job, "metadata", "labels") and autoscales(cluster) and not is_elastic:
        yield "metadata.labels", f"{QUEUE_LABEL} is set, but Kueue admits only RayJobs with a fixed number of pods"
    for where, group in worker_groups(job):
        replicas, low = group.get("replicas"), group.get("minReplicas")
        if not autoscales(cluster) and isinstance(replicas, int) and isinstance(low, int) and replicas > low:
            text = f"the job starts only once all {replicas} pods run; with enableInTreeAutoscaling {low} are enough"
            yield where, text


def _pod(role: str, pod: Mapping[str, Any]) -> Iterator[LintComplaint]:
    spec = mapping(pod, "spec")
    if "app.kubernetes.io/name" in mapping(pod, "metadata", "labels"):
        text = "label app.kubernetes.io/name: KubeRay's head service selects by its own value of it and finds no head"
        yield role, text
    seconds = {str(item.get("key")): item.get("tolerationSeconds") for item in mappings(spec, "tolerations")}
    slow = [key for key in _LOST_NODE_TAINTS if not isinstance(wait := seconds.get(key), int) or wait >= _OUTAGE_S]
    if slow:
        text = f"stays {_OUTAGE_S} s or more on a lost node ({', '.join(slow)}), as long as KubeRay waits for a head"
        yield role, text
    if role != "submitter" and not any(mapping(volume, "emptyDir") for volume in mappings(spec, "volumes")):
        yield role, "has no volume for /dev/shm (emptyDir, medium Memory): it has 64 MiB, or all of the pod's memory"


def _container(where: str, container: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if "image" in container and not is_pinned(str(container["image"])):
        yield where, f"image {container['image']!r} can change between pods: give it a tag other than latest"
    for path in (str(mount.get("mountPath")) for mount in mappings(container, "volumeMounts")):
        if hides_programs(f"/{posixpath.normpath(path).lstrip('/')}"):
            yield where, f"a volume at {path} hides programs of the image"
    resources = mapping(container, "resources")
    request, limit = mapping(resources, "requests").get("memory"), mapping(resources, "limits").get("memory")
    if where in ("head", "worker") and (limit is None or request != limit):
        yield (where, f"memory request ({request}) and limit ({limit}) must be set and equal, else OOM kills")


def _termination(role: str, group: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Check the drain timeout against the grace period, and whether a worker can be evicted."""
    grace = mapping(group, "template", "spec").get("terminationGracePeriodSeconds", _GRACE_DEFAULT_S)
    value = env_variables(first_container(group)).get(_DRAIN)
    drain = float(str(value)) if value and re.fullmatch(r"\d+(\.\d+)?", str(value)) else _DRAIN_DEFAULT_S
    if isinstance(grace, int) and drain >= grace:
        limit = f"{_DRAIN} ({drain:g} s) must be less than terminationGracePeriodSeconds ({grace})"
        yield role, f"{limit}, or the save in a node's last seconds never runs"
    annotations = mapping(group, "template", "metadata", "annotations")
    if role == "worker" and annotations.get(_DO_NOT_DISRUPT) == "true":
        yield role, f"{_DO_NOT_DISRUPT}: Karpenter evicts no pod from a spot node that is reclaimed"


def _placement(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield pods that may run on the wrong nodes, or on none."""
    head = mapping(job, "spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
    is_placed = mapping(head, "nodeSelector") or _terms(head)
    selects_spot = any(_spot_labels(mapping(group, "template", "spec")) for _, group in worker_groups(job))
    if head and selects_spot and not is_placed:
        yield "head", "may run on a spot node, as workers do, and losing it restarts the run: give it an affinity"
    for where, group in worker_groups(job):
        replicas, limit = group.get("replicas"), group.get("maxReplicas")
        if isinstance(replicas, int) and isinstance(limit, int) and replicas > limit:
            yield where, f"replicas ({replicas}) exceeds maxReplicas ({limit}), and KubeRay creates that many"
        pod = mapping(group, "template", "spec")
        if taints := [key for key in _TAINTED if key in _spot_labels(pod) and not _tolerates(pod, key)]:
            yield where, f"selects spot nodes but does not tolerate their taint: {', '.join(taints)}"


def _terms(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return mappings(mapping(pod, "affinity", "nodeAffinity", _REQUIRED), "nodeSelectorTerms")


def _spot_labels(pod: Mapping[str, Any]) -> set[str]:
    """Return the spot node labels that a pod selects; of several clouds if terms are alternatives."""
    selected: list[tuple[Any, Any]] = [*mapping(pod, "nodeSelector").items()]
    for item in (item for term in _terms(pod) for item in mappings(term, "matchExpressions")):
        if item.get("operator") == "In":
            selected += [(item.get("key"), value) for value in strings(item, "values")]
    return {key for key, value in SPOT.items() if (key, value) in selected}


def _tolerates(pod: Mapping[str, Any], taint: str) -> bool:
    """Return whether a pod tolerates a taint of this key, or every taint (`operator: Exists` without a key)."""
    tolerations = mappings(pod, "tolerations")
    return any(
        item.get("key") == taint or (not item.get("key") and item.get("operator") == "Exists") for item in tolerations
    )


def claim_complaints(claim: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if "ReadWriteMany" not in strings(mapping(claim, "spec"), "accessModes"):
        yield "spec.accessModes", "must include ReadWriteMany: head and workers write from several nodes"


def budget_complaints(budget: Mapping[str, Any]) -> Iterator[LintComplaint]:
    spec = mapping(budget, "spec")
    labels = mapping(spec, "selector", "matchLabels")
    if "maxUnavailable" in spec and any(str(key).startswith("ray.io/") for key in labels):
        yield "spec.maxUnavailable", "needs a scale subresource, which a RayCluster does not have: use minAvailable"
