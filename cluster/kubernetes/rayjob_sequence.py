"""The RayJobs of a run, one after the other: what each is, and what the next one should be.

A RayJob that has ended stays so; `resume` makes the next, which goes on where the newest ended. What it is to do says
the one that was applied last, which need not be the newest: `apply` always writes to the first. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from outlast.cluster.kubernetes.accessors import mapping, pod_templates, rows
from outlast.cluster.kubernetes.render import RUN_LABEL
from outlast.cluster.kubernetes.settings import MAX_NAME

#: Who owns the fields that apply sets.
MANAGER = "outlast"
RESUMES = "outlast/resumes"
RAY = "ray.io/v1"
#: How whole manifests are applied: by this command, and by kubectl on the server's side and on its own.
_APPLIES = ((MANAGER, "Apply"), ("kubectl", "Apply"), ("kubectl-client-side-apply", "Update"))


class JobPhase(Enum):
    """What a RayJob is, as far as going on with it matters."""

    LIVE = "live"
    SUSPENDED = "suspended"
    DONE = "done"
    ENDED = "ended"  #: it failed, was stopped, or was refused: only another RayJob goes on
    LEAVING = "leaving"  #: it is being deleted

    @property
    def is_over(self) -> bool:
        return self in (JobPhase.DONE, JobPhase.ENDED)


def phase(job: Mapping[str, Any]) -> JobPhase:
    """What a RayJob is by its status."""
    status = mapping(job, "status")
    if mapping(job, "metadata").get("deletionTimestamp"):
        return JobPhase.LEAVING
    if status.get("jobDeploymentStatus") in ("Complete", "Failed", "ValidationFailed"):
        return JobPhase.DONE if status.get("jobStatus") == "SUCCEEDED" else JobPhase.ENDED
    return JobPhase.SUSPENDED if mapping(job, "spec").get("suspend") else JobPhase.LIVE


def next_name(name: str, taken: Sequence[str], *, is_counted: bool = True) -> str:
    """The name of the RayJob that goes on after `name`, short enough for KubeRay.

    Args:
        name: Its name.
        taken: Names that others have.
        is_counted: Whether a number at its end counts how often it went on, or is a part of the run's own name.
    """
    found = re.fullmatch(r"(.+)-(\d+)", name) if is_counted else None
    stem, number = (found[1], int(found[2])) if found else (name, 1)
    while True:
        number += 1
        tail = f"-{number}"
        made = f"{stem[: MAX_NAME - len(tail)].rstrip('-')}{tail}"
        if made not in taken:
            return made


def applied_last(jobs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of a run's RayJobs, oldest first, the one whose manifest was applied last.

    One that `resume` made counts too, as of then; in the same second the one that it was made of comes before it.
    """

    def moment(job: Mapping[str, Any]) -> tuple[str, bool]:
        entries = rows(mapping(job, "metadata"), "managedFields")
        times = [str(item.get("time")) for item in entries if (item.get("manager"), item.get("operation")) in _APPLIES]
        return max(times, default=""), RESUMES not in mapping(job, "metadata", "annotations")

    return max(jobs, key=moment)


def successor(
    job: Mapping[str, Any], taken: Sequence[str], *, spec_of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The RayJob that goes on where `job` ended, under the next name.

    Args:
        job: The run's newest.
        taken: Names that others have.
        spec_of: The one that says what the next should do; default: `job`.
    """
    meta, source = mapping(job, "metadata"), spec_of or job
    kept = ("kubectl.kubernetes.io/last-applied-configuration", RESUMES)
    given = mapping(source, "metadata")
    notes = {key: value for key, value in mapping(given, "annotations").items() if key not in kept}
    spec = {key: value for key, value in mapping(source, "spec").items() if key not in ("suspend", "jobId")}
    return {
        "apiVersion": RAY,
        "kind": "RayJob",
        "metadata": {
            "name": next_name(str(meta["name"]), taken, is_counted=RESUMES in mapping(meta, "annotations")),
            "labels": dict(mapping(given, "labels")),
            "annotations": {**notes, RESUMES: str(meta["name"])},
        },
        "spec": spec,
    }


def describe_state(job: Mapping[str, Any]) -> set[str]:
    """Names of the objects whose events tell of a RayJob, besides its pods.

    Where a quota, a webhook or Pod Security refuses a pod there is none: KubeRay tells of the RayCluster, and of the
    submitter's Job, which has the RayJob's name; a claim that cannot be met tells of itself.
    """
    names = {mapping(job, "metadata").get("name"), mapping(job, "status").get("rayClusterName")}
    for _, pod in pod_templates(job):
        for volume in rows(mapping(pod, "spec"), "volumes"):
            names.add(mapping(volume, "persistentVolumeClaim").get("claimName"))
    return {name for name in names if isinstance(name, str) and name}


def consequences(job: Mapping[str, Any], newest: Mapping[str, Any], *, changed: bool) -> list[str]:
    """What applying a RayJob that was there does not do.

    Args:
        job: As it is now.
        newest: The run's newest, which may be `job`.
        changed: Whether its spec is another than before.
    """
    run, name = mapping(job, "metadata", "labels").get(RUN_LABEL), newest["metadata"]["name"]
    if phase(newest).is_over:
        return [f"  rayjob/{name} is {phase(newest).value}, and stays so; go on with: outlast k8s resume {run}"]
    if name != job["metadata"]["name"] and phase(newest) is not JobPhase.LEAVING:
        return [
            f"  rayjob/{name} goes on for it, and is {phase(newest).value} as it was made; for this one instead: "
            f"kubectl delete rayjob {name}, which commits first, and then outlast k8s resume {run}"
        ]
    if changed and phase(newest) is JobPhase.LIVE:
        return [
            f"  rayjob/{name} is at work: its pods change when it is suspended and resumed (outlast k8s suspend {run})"
        ]
    return []
