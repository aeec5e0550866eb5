"""Where a RayJob is not what the run file in its ConfigMap asks for. Pure; no rule trusts what shape it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from outlast.cluster.k8s_shapes import Complaint, first_container, mapping, ray_groups, rows


def disagreements(job: Mapping[str, Any], config_maps: Mapping[str, Mapping[str, Any]]) -> Iterator[Complaint]:
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
        [run] = [yaml.safe_load(text) for text in texts if text]
    except (ValueError, yaml.YAMLError):
        return
    groups, scale = rows(cluster, "workerGroupSpecs"), mapping(run, "scale")
    wanted = scale.get("workers", 1)
    most = max(wanted) if isinstance(wanted, list) and wanted else wanted
    room = sum(number for group in groups if isinstance(number := group.get("maxReplicas"), int))
    if isinstance(most, int) and room < most:
        yield "spec.rayClusterSpec.workerGroupSpecs", f"room for {room} workers, and the run file has {most}"
    gpus = scale.get("gpus_per_worker", 0)
    for number, group in enumerate(groups):
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
