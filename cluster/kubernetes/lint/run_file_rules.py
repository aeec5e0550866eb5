"""Mismatches between a RayJob and the run file in its ConfigMap. Pure; no rule trusts the shape of what it reads."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.accessors import (
    CLUSTER,
    LintComplaint,
    first_container,
    mapping,
    mappings,
    pod_templates,
    ray_groups,
    worker_groups,
)
from outlast.cluster.kubernetes.pod_paths import is_under, pod_path
from outlast.cluster.kubernetes.quantity import quantity_value


def run_file_mismatches(
    job: Mapping[str, Any], config_maps: Mapping[str, Mapping[str, Any]]
) -> Iterator[LintComplaint]:
    """Yield mismatches between a RayJob and the run file in its ConfigMap, given every ConfigMap's data by name."""
    cluster = mapping(job, "spec", "rayClusterSpec")
    pod = mapping(cluster, "headGroupSpec", "template", "spec")
    names = [str(mapping(volume, "configMap").get("name")) for volume in mappings(pod, "volumes")]
    texts = [config_maps[name].get("run.yaml") for name in names if name in config_maps]
    try:
        [run] = [yaml.safe_load(text) for text in texts if isinstance(text, str)]
    except (ValueError, yaml.YAMLError):
        return
    yield from _worker_mismatches(job, mapping(run, "scale"))
    present = {key for name in names for key in config_maps.get(name, ())}
    for key, location in _locations(run):
        if not location.startswith("$") and (key == "checkpoint.storage" or location not in present):
            yield from _location_mismatches(cluster, key, location)


def _worker_mismatches(job: Mapping[str, Any], scale: Mapping[str, Any]) -> Iterator[LintComplaint]:
    workers = scale.get("workers", 1)
    counts = [number for number in (workers if isinstance(workers, list) else [workers]) if isinstance(number, int)]
    limits = [group.get("maxReplicas") for _, group in worker_groups(job)]  # the CRD's default is no limit
    capacity = sum(number for number in limits if isinstance(number, int))
    if counts and None not in limits and capacity < max(counts):
        yield f"{CLUSTER}.workerGroupSpecs", f"maxReplicas allows {capacity} workers of {max(counts)}"
    gpus, cpus = scale.get("gpus_per_worker", 0), scale.get("cpus_per_worker")
    for where, group in worker_groups(job):
        pod_cpus = _cpus(group)
        if isinstance(cpus, int | float) and pod_cpus is not None and pod_cpus < cpus:
            yield where, f"{pod_cpus} CPUs in each pod, but scale.cpus_per_worker is {cpus:g}: no worker fits"
        pod_gpus = mapping(first_container(group), "resources", "limits").get("nvidia.com/gpu", 0)
        if isinstance(gpus, int) and str(pod_gpus) != str(gpus):
            yield where, f"{pod_gpus} GPUs in each pod, but scale.gpus_per_worker is {gpus}"


def _location_mismatches(cluster: Mapping[str, Any], key: str, location: str) -> Iterator[LintComplaint]:
    try:
        path = pod_path(key, location)
    except ConfigError as error:
        text = error.message if key in error.message else f"{key}: {error.message}"
        yield "run.yaml", f"{text}; {error.hint}"
        return
    if key == "checkpoint.storage" and path:
        yield from _unmounted(cluster, path)


def _locations(run: Any) -> Iterator[tuple[str, str]]:
    """Yield storage and data of a run file by key, as written."""
    yield "checkpoint.storage", str(mapping(run, "checkpoint").get("storage", "./runs"))
    for key, value in mapping(run, "data").items():
        for item in value if isinstance(value, list) else [value]:
            if key in ("train", "eval") and isinstance(item, str) and not item.endswith("%"):
                yield f"data.{key}", item


def _unmounted(cluster: Mapping[str, Any], storage: str) -> Iterator[LintComplaint]:
    for role, group in ray_groups(cluster):
        paths = [str(mount.get("mountPath")) for mount in mappings(first_container(group), "volumeMounts")]
        if not any(is_under(storage, path) for path in paths):
            yield role, f"nothing is mounted at checkpoint.storage {storage}: checkpoints are lost with the pod"


def missing_config_maps(job: Mapping[str, Any], config_maps: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield ConfigMaps that a pod mounts and that are not given: the pod would wait for one without any error."""
    for role, pod in pod_templates(job):
        for volume in mappings(mapping(pod, "spec"), "volumes"):
            source = mapping(volume, "configMap")
            name = source.get("name")
            if isinstance(name, str) and name and name not in config_maps and not source.get("optional"):
                yield role, f"mounts ConfigMap {name}, which is not among these objects: the pod waits until it exists"


def _cpus(group: Mapping[str, Any]) -> int | None:
    """Return the CPUs of a worker's pod as KubeRay passes them to Ray; None if they are the node's."""
    resources = mapping(first_container(group), "resources")
    for value in (
        mapping(group, "rayStartParams").get("num-cpus"),
        mapping(group, "resources").get("CPU"),
        mapping(resources, "limits").get("cpu"),
        mapping(resources, "requests").get("cpu"),
    ):
        if (number := quantity_value(value)) is not None and math.isfinite(number):
            return math.ceil(number)
    return None
