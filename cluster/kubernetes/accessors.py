"""Ways into a RayJob that may have any shape: what is not there, or is something else, counts as empty. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Where, and what is wrong there.
LintComplaint = tuple[str, str]


def mapping(value: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at the end of a path of keys; an empty one where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def rows(value: Any, key: str) -> list[Mapping[str, Any]]:
    """The mappings in the list at `key`; none where there is no list."""
    found = mapping(value).get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def words(value: Any, key: str) -> list[str]:
    """The strings in the list at `key`."""
    found = mapping(value).get(key)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def variables(container: Mapping[str, Any]) -> dict[str, Any]:
    """A container's environment as written, None for what comes from elsewhere."""
    return {str(item.get("name")): item.get("value") for item in rows(container, "env")}


def first_container(group: Any) -> Mapping[str, Any]:
    """The container of a head or worker group in which Ray runs."""
    found = rows(mapping(group, "template", "spec"), "containers")
    return found[0] if found else {}


def autoscales(cluster: Mapping[str, Any]) -> bool:
    return cluster.get("enableInTreeAutoscaling") is True


def ray_groups(cluster: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if head := mapping(cluster, "headGroupSpec"):
        yield "head", head
    for group in rows(cluster, "workerGroupSpecs"):
        yield "worker", group


def pod_templates(job: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every pod template, by role; the submitter too, which KubeRay makes for itself where none is given."""
    spec = mapping(job, "spec")
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        yield "submitter", mapping(spec, "submitterPodTemplate")
    for role, group in ray_groups(mapping(spec, "rayClusterSpec")):
        yield role, mapping(group, "template")


def containers(job: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every container with the pod that it is in, by role; those that KubeRay adds only as far as the manifest says
    something of them."""
    for role, pod in pod_templates(job):
        spec = mapping(pod, "spec")
        yield from ((role, spec, item) for key in ("initContainers", "containers") for item in rows(spec, key))
        if role == "submitter" and not rows(spec, "containers"):
            yield role, spec, {}
    cluster = mapping(job, "spec", "rayClusterSpec")
    head = mapping(cluster, "headGroupSpec", "template", "spec")
    if autoscales(cluster):
        yield "autoscaler", head, mapping(cluster, "autoscalerOptions")
    if mapping(job, "spec").get("submissionMode") == "SidecarMode":
        yield "submitter", head, {}
