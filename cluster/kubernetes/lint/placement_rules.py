"""Groups of a RayCluster: whether pods can be created, how many there may be, and on which nodes they run.

Pure; no rule trusts the shape of what it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import (
    CLUSTER,
    LintComplaint,
    mapping,
    mappings,
    pod_templates,
    strings,
    worker_groups,
)
from outlast.cluster.kubernetes.render import SPOT

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
#: Clouds that taint spot nodes with their label's key: GKE if the pool is created so, AKS always.
_TAINTED = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def invalid_groups(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield groups that the operator accepts but cannot create pods for, or cannot distinguish."""
    for role, pod in pod_templates(job):
        for key in ("initContainers", "containers"):
            for container in mappings(mapping(pod, "spec"), key):
                if not container.get("image"):
                    yield role, f"container {container.get('name')} has no image, so no pod can be created"
    names = Counter(str(group["groupName"]) for _, group in worker_groups(job) if group.get("groupName"))
    for name in (name for name, count in names.items() if count > 1):
        yield f"{CLUSTER}.workerGroupSpecs", f"several groups are named {name}, but KubeRay counts pods by group name"


def placement_risks(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield pods that may run on the wrong nodes, or on none."""
    head = mapping(job, "spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
    is_placed = mapping(head, "nodeSelector") or _terms(head)
    if head and not is_placed and any(_spot_labels(_pod(group)) for _, group in worker_groups(job)):
        yield "head", "may run on a spot node, as workers do, and losing it restarts the run: give it an affinity"
    for where, group in worker_groups(job):
        replicas, limit = group.get("replicas"), group.get("maxReplicas")
        if isinstance(replicas, int) and isinstance(limit, int) and replicas > limit:
            yield where, f"replicas ({replicas}) exceeds maxReplicas ({limit}), and KubeRay creates that many"
        pod = _pod(group)
        taints = [key for key in _TAINTED if key in _spot_labels(pod) and not _tolerates(pod, key)]
        if taints:
            yield where, f"selects spot nodes but does not tolerate their taint: {', '.join(taints)}"


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(group, "template", "spec")


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
