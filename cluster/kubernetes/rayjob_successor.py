"""The sequence of a run's RayJobs: the phase of each, and the next one.

A RayJob that has ended never runs again; `resume` creates the next, which resumes where the newest ended. Its spec is
that of the RayJob that was applied last, which need not be the newest: `apply` always writes to the first. Pure.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from outlast.cluster.kubernetes.accessors import mapping, mappings, pod_templates
from outlast.cluster.kubernetes.ownership import KINDS, run_of
from outlast.cluster.kubernetes.settings import MAX_NAME

#: Field manager of `apply`.
MANAGER = "outlast"
RESUMES = "outlast/resumes"
RAY = KINDS["RayJob"]
#: Manager and operation of applied manifests: this command, kubectl's server-side and its client-side apply.
_APPLIES = ((MANAGER, "Apply"), ("kubectl", "Apply"), ("kubectl-client-side-apply", "Update"))


class JobPhase(Enum):
    """Phase of a RayJob, as far as resuming is concerned."""

    LIVE = "live"
    SUSPENDED = "suspended"
    DONE = "done"
    ENDED = "ended"  #: it failed, was stopped, or was refused: only another RayJob can resume the run
    LEAVING = "leaving"  #: it is being deleted


def phase(job: Mapping[str, Any]) -> JobPhase:
    """Return a RayJob's phase by its status."""
    status = mapping(job, "status")
    if mapping(job, "metadata").get("deletionTimestamp"):
        return JobPhase.LEAVING
    if status.get("jobDeploymentStatus") in ("Complete", "Failed", "ValidationFailed"):
        return JobPhase.DONE if status.get("jobStatus") == "SUCCEEDED" else JobPhase.ENDED
    return JobPhase.SUSPENDED if mapping(job, "spec").get("suspend") else JobPhase.LIVE


def next_name(name: str, taken: Sequence[str], *, is_counted: bool = True) -> str:
    """Return the name of the RayJob after `name`, short enough for KubeRay, and not one of `taken`.

    A number at the end counts RayJobs if `is_counted`; else it is part of the run's own name.
    """
    match = re.fullmatch(r"(.+)-(\d+)", name) if is_counted else None
    stem, number = (match[1], int(match[2])) if match else (name, 1)
    suffixes = (f"-{following}" for following in itertools.count(number + 1))
    candidates = (f"{stem[: MAX_NAME - len(suffix)].rstrip('-')}{suffix}" for suffix in suffixes)
    return next(candidate for candidate in candidates if candidate not in taken)


def last_applied(jobs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the RayJob whose manifest was applied last; `jobs` is ordered oldest first.

    A RayJob that `resume` created counts as applied at that time; in a tie its predecessor wins.
    """

    def applied_at(job: Mapping[str, Any]) -> tuple[str, bool]:
        entries = mappings(mapping(job, "metadata"), "managedFields")
        times = [str(item.get("time")) for item in entries if (item.get("manager"), item.get("operation")) in _APPLIES]
        return max(times, default=""), RESUMES not in mapping(job, "metadata", "annotations")

    return max(jobs, key=applied_at)


def successor(
    job: Mapping[str, Any], taken: Sequence[str], *, spec_of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the RayJob that resumes where `job`, the run's newest, ended, under the next name that is not `taken`.

    It has the spec, labels and annotations of `spec_of`; default: `job`.
    """
    meta, source = mapping(job, "metadata"), spec_of or job
    dropped = ("kubectl.kubernetes.io/last-applied-configuration", RESUMES)
    source_meta = mapping(source, "metadata")
    annotations = {key: value for key, value in mapping(source_meta, "annotations").items() if key not in dropped}
    spec = {key: value for key, value in mapping(source, "spec").items() if key not in ("suspend", "jobId")}
    return {
        "apiVersion": RAY,
        "kind": "RayJob",
        "metadata": {
            "name": next_name(str(meta["name"]), taken, is_counted=RESUMES in mapping(meta, "annotations")),
            "labels": dict(mapping(source_meta, "labels")),
            "annotations": {**annotations, RESUMES: str(meta["name"])},
        },
        "spec": spec,
    }


def event_sources(job: Mapping[str, Any]) -> set[str]:
    """Return the names of the objects whose events concern a RayJob, other than its pods.

    A pod that a quota, a webhook or Pod Security refuses does not exist: KubeRay then emits events of the RayCluster
    and of the submitter's Job, which has the RayJob's name; an unbound claim has events of its own.
    """
    names = {mapping(job, "metadata").get("name"), mapping(job, "status").get("rayClusterName")}
    for _, pod in pod_templates(job):
        for volume in mappings(mapping(pod, "spec"), "volumes"):
            names.add(mapping(volume, "persistentVolumeClaim").get("claimName"))
    return {name for name in names if isinstance(name, str) and name}


def apply_notes(job: Mapping[str, Any], newest: Mapping[str, Any], *, changed: bool) -> list[str]:
    """Return notes on what an apply did not change, given the RayJob after it, and the run's newest, perhaps the same.

    `changed` is whether the spec of `job` changed.
    """
    run, name = run_of(job), newest["metadata"]["name"]
    if phase(newest) in (JobPhase.DONE, JobPhase.ENDED):
        return [f"  rayjob/{name} is {phase(newest).value} and never runs again; to resume: outlast k8s resume {run}"]
    if name != job["metadata"]["name"] and phase(newest) is not JobPhase.LEAVING:
        return [
            f"  rayjob/{name} succeeds it and keeps its old spec ({phase(newest).value}); to use the new spec: "
            f"kubectl delete rayjob {name}, which commits first, then outlast k8s resume {run}"
        ]
    if changed and phase(newest) is JobPhase.LIVE:
        return [f"  rayjob/{name} is running: pods change only after suspend and resume (outlast k8s suspend {run})"]
    return []
