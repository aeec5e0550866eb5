"""Where a RayJob is not what the run file in its ConfigMap asks for. Pure; no rule trusts what shape it has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from outlast.cluster.kubernetes.accessors import (
    LintComplaint,
    first_container,
    mapping,
    pod_templates,
    ray_groups,
    rows,
)


def disagreements(job: Mapping[str, Any], config_maps: Mapping[str, Mapping[str, Any]]) -> Iterator[LintComplaint]:
    """Where the RayJob is not what the run file in its ConfigMap asks for.

    Args:
        job: The RayJob.
        config_maps: The data of every ConfigMap at hand, by name.
    """
    cluster = mapping(job, "spec", "rayClusterSpec")
    pod = mapping(cluster, "headGroupSpec", "template", "spec")
    names = [str(mapping(volume, "configMap").get("name")) for volume in rows(pod, "volumes")]
    texts = [config_maps[name].get("run.yaml") for name in names if name in config_maps]
    try:
        [run] = [yaml.safe_load(text) for text in texts if isinstance(text, str)]
    except (ValueError, yaml.YAMLError):
        return
    groups, scale = rows(cluster, "workerGroupSpecs"), mapping(run, "scale")
    wanted = scale.get("workers", 1)
    most = max((n for n in wanted if isinstance(n, int)), default=None) if isinstance(wanted, list) else wanted
    room = sum(number for group in groups if isinstance(number := group.get("maxReplicas"), int))
    if isinstance(most, int) and room < most:
        yield "spec.rayClusterSpec.workerGroupSpecs", f"room for {room} workers, and the run file has {most}"
    gpus, cpus = scale.get("gpus_per_worker", 0), scale.get("cpus_per_worker")
    for number, group in enumerate(groups):
        has = _cpus(group)
        if isinstance(cpus, int | float) and has is not None and has < cpus:
            yield (
                f"spec.rayClusterSpec.workerGroupSpecs[{number}]",
                f"{has} CPUs for each worker, and scale.cpus_per_worker is {cpus:g}: no worker ever fits",
            )
        there = mapping(first_container(group), "resources", "limits").get("nvidia.com/gpu", 0)
        if isinstance(gpus, int) and str(there) != str(gpus):
            yield (
                f"spec.rayClusterSpec.workerGroupSpecs[{number}]",
                f"{there} GPUs for each worker, and scale.gpus_per_worker is {gpus}",
            )
    storage = str(mapping(run, "checkpoint").get("storage", "./runs"))
    if storage.startswith("/"):
        for role, group in ray_groups(cluster):
            paths = [str(mount.get("mountPath")) for mount in rows(first_container(group), "volumeMounts")]
            if not any(f"{storage}/".startswith(f"{path.rstrip('/')}/") for path in paths):
                yield role, f"nothing is mounted at checkpoint.storage {storage}: checkpoints would go with the pod"


def missing_config_maps(job: Mapping[str, Any], config_maps: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """ConfigMaps that a pod mounts and that are not at hand: without one the pod waits for it, and says so nowhere."""
    for role, pod in pod_templates(job):
        for volume in rows(mapping(pod, "spec"), "volumes"):
            source = mapping(volume, "configMap")
            name = source.get("name")
            if isinstance(name, str) and name and name not in config_maps and not source.get("optional"):
                yield role, f"mounts ConfigMap {name}, which is not among these objects: the pod waits for it"


def _cpus(group: Mapping[str, Any]) -> int | None:
    """CPUs that Ray counts in a worker's pod, as KubeRay tells it; None where the node says how many."""
    resources = mapping(first_container(group), "resources")
    for value in (
        mapping(group, "rayStartParams").get("num-cpus"),
        mapping(group, "resources").get("CPU"),
        mapping(resources, "limits").get("cpu"),
        mapping(resources, "requests").get("cpu"),
    ):
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(value)):
            return math.ceil(float(found[1]) / (1000 if found[2] else 1))
    return None
