"""Accessors for a RayJob of any shape: a missing value, or one of another type, reads as empty. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

#: Path of a problem, and its description.
LintComplaint = tuple[str, str]
CLUSTER = "spec.rayClusterSpec"


def mapping(value: Any, *keys: str) -> Mapping[str, Any]:
    """Return the mapping at a path of keys; an empty one if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any, key: str) -> list[Mapping[str, Any]]:
    """Return the mappings in the list at `key`; none if there is no list."""
    items = mapping(value).get(key)
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []


def strings(value: Any, key: str) -> list[str]:
    """Return the strings in the list at `key`."""
    items = mapping(value).get(key)
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []


def env_variables(container: Mapping[str, Any]) -> dict[str, Any]:
    """Return a container's environment as written; None for a value that is a reference."""
    return {str(item.get("name")): item.get("value") for item in mappings(container, "env")}


def first_container(group: Any) -> Mapping[str, Any]:
    """Return the container of a head or worker group that runs Ray."""
    items = mappings(mapping(group, "template", "spec"), "containers")
    return items[0] if items else {}


def autoscales(cluster: Mapping[str, Any]) -> bool:
    return cluster.get("enableInTreeAutoscaling") is True


def ray_groups(cluster: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if head := mapping(cluster, "headGroupSpec"):
        yield "head", head
    for group in mappings(cluster, "workerGroupSpecs"):
        yield "worker", group


def worker_groups(job: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every worker group of a RayJob with its path."""
    for number, group in enumerate(mappings(mapping(job, "spec", "rayClusterSpec"), "workerGroupSpecs")):
        yield f"{CLUSTER}.workerGroupSpecs[{number}]", group


def pod_templates(job: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every pod template with its role; the submitter too, for which KubeRay has a default template."""
    spec = mapping(job, "spec")
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        yield "submitter", mapping(spec, "submitterPodTemplate")
    for role, group in ray_groups(mapping(spec, "rayClusterSpec")):
        yield role, mapping(group, "template")


def containers(job: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield every container with its role and pod spec; containers that KubeRay adds have only what the manifest sets
    for them."""
    for role, pod in pod_templates(job):
        spec = mapping(pod, "spec")
        yield from ((role, spec, item) for key in ("initContainers", "containers") for item in mappings(spec, key))
        if role == "submitter" and not mappings(spec, "containers"):
            yield role, spec, {}
    cluster = mapping(job, "spec", "rayClusterSpec")
    head = mapping(cluster, "headGroupSpec", "template", "spec")
    if autoscales(cluster):
        yield "autoscaler", head, mapping(cluster, "autoscalerOptions")
    if mapping(job, "spec").get("submissionMode") == "SidecarMode":
        yield "submitter", head, {}
