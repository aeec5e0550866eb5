"""The groups of a RayCluster: what no pod can be made of, how many pods there may be, and on which nodes they land.

Pure; no rule trusts the shape of what it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import LintComplaint, mapping, pod_templates, rows, words
from outlast.cluster.kubernetes.render import SPOT

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
#: Clouds that keep other pods away from spot nodes: GKE where a pool is made so, AKS always. The key is the label's.
_TAINTED = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def unworkable(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """What the operator takes, and can make no pods of, or cannot tell apart."""
    for role, pod in pod_templates(job):
        for key in ("initContainers", "containers"):
            for container in rows(mapping(pod, "spec"), key):
                if not container.get("image"):
                    yield role, f"container {container.get('name')} has no image, so no pod can be made"
    names = Counter(str(group["groupName"]) for group in _groups(job) if group.get("groupName"))
    for name in (name for name, count in names.items() if count > 1):
        yield "spec.rayClusterSpec.workerGroupSpecs", f"several groups are named {name}, and pods are counted by it"


def placement_risks(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Pods that land where they should not, or nowhere."""
    groups = _groups(job)
    head = mapping(job, "spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
    if head and any(_spot_marks(_pod(group)) for group in groups) and not _is_placed(head):
        yield "head", "may land on a spot node, as workers do, and its loss restarts everything: give it an affinity"
    for number, group in enumerate(groups):
        where = f"spec.rayClusterSpec.workerGroupSpecs[{number}]"
        wanted, most = group.get("replicas"), group.get("maxReplicas")
        if isinstance(wanted, int) and isinstance(most, int) and wanted > most:
            yield where, f"replicas {wanted} is above maxReplicas {most}, and so many there will be"
        pod = _pod(group)
        lacks = [key for key in _TAINTED if key in _spot_marks(pod) and not _tolerates(pod, key)]
        if lacks:
            yield where, f"goes to spot nodes and does not tolerate their taint: {', '.join(lacks)}"


def _groups(job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return rows(mapping(job, "spec", "rayClusterSpec"), "workerGroupSpecs")


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(group, "template", "spec")


def _terms(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return rows(mapping(pod, "affinity", "nodeAffinity", _REQUIRED), "nodeSelectorTerms")


def _is_placed(pod: Mapping[str, Any]) -> bool:
    """Whether the manifest says at all on which nodes a pod may land."""
    return bool(mapping(pod, "nodeSelector") or _terms(pod))


def _spot_marks(pod: Mapping[str, Any]) -> set[str]:
    """Labels of spot nodes that a pod asks for; of several clouds where terms are alternatives."""
    chosen = {key for key, value in SPOT.items() if mapping(pod, "nodeSelector").get(key) == value}
    asked = [item for term in _terms(pod) for item in rows(term, "matchExpressions") if item.get("operator") == "In"]
    return chosen | {key for key, value in SPOT.items() for item in asked if _asks(item, key, value)}


def _asks(expression: Mapping[str, Any], key: str, value: str) -> bool:
    return expression.get("key") == key and value in words(expression, "values")


def _tolerates(pod: Mapping[str, Any], taint: str) -> bool:
    """Whether a pod tolerates a taint of this key, or every one (`operator: Exists` without a key)."""
    found = rows(pod, "tolerations")
    return any(item.get("key") == taint or (not item.get("key") and item.get("operator") == "Exists") for item in found)
