"""Variants of a run's RayJob, rendered only where they are asked for; `k8s/README.md` gives the reasons. Pure."""

from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.settings import K8sSettings

#: An annotation that lets Kueue admit a RayJob whose number of workers changes (workload slices).
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"


def set_submission(spec: dict[str, Any], settings: K8sSettings) -> None:
    """Submit the job from a container in the head's pod, which KubeRay adds; it takes no template and no retries."""
    if settings.sidecar:
        spec["submissionMode"] = "SidecarMode"
        del spec["submitterPodTemplate"], spec["submitterConfig"]


def set_deletion(spec: dict[str, Any], settings: K8sSettings, *, autoscales: bool) -> None:
    """Keep the head of a failed run, with its logs, for a while; workers, which hold GPUs, go at once.

    Rules take the place of `shutdownAfterJobFinishes`. The autoscaler would create the workers again, so KubeRay
    refuses to delete them alone, and they go with the head.
    """
    if settings.keep_failed_s is None:
        return
    del spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]
    failures = ({"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"})
    stages = [("DeleteCluster", settings.keep_failed_s)]
    if not autoscales:
        stages.insert(0, ("DeleteWorkers", min(settings.ttl_s, settings.keep_failed_s)))
    rules = [("DeleteCluster", {"jobStatus": "SUCCEEDED"}, settings.ttl_s)]
    rules += [(policy, condition, seconds) for condition in failures for policy, seconds in stages]
    spec["deletionStrategy"] = {
        "deletionRules": [
            {"policy": policy, "condition": {**condition, "ttlSeconds": seconds}}
            for policy, condition, seconds in rules
        ]
    }


def set_elastic_queue(job: dict[str, Any], settings: K8sSettings, *, autoscales: bool) -> None:
    """Let Kueue admit workers as they are added, and take back the quota of those that are removed."""
    if not settings.elastic_queue:
        return
    if not autoscales:
        raise ConfigError(
            "--elastic-queue is for a run whose number of workers changes",
            hint="give scale.workers as [min, max], such as [2, 8], or omit --elastic-queue",
        )
    job["metadata"]["annotations"] = {**job["metadata"].get("annotations", {}), ELASTIC_ANNOTATION: "true"}


def scheduled(job: dict[str, Any], settings: K8sSettings) -> dict[str, Any]:
    """Return the RayJob as it is, or a RayCronJob that makes one at each time of the schedule."""
    if settings.schedule is None:
        return job
    spec = {"schedule": settings.schedule, **({"timeZone": settings.time_zone} if settings.time_zone else {})}
    return {**job, "kind": "RayCronJob", "spec": {**spec, "jobTemplate": job["spec"]}}
