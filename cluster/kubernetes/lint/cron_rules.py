"""What KubeRay's operator refuses in a RayCronJob, and the RayJob that it makes from one. Pure."""

import re
import zoneinfo
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import LintComplaint, mapping
from outlast.cluster.kubernetes.settings import LABEL, MAX_CRON_NAME, is_schedule


def cron_complaints(cron_job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield what the operator refuses, other than in the RayJob."""
    spec, name = mapping(cron_job, "spec"), str(mapping(cron_job, "metadata").get("name"))
    if not re.fullmatch(LABEL, name) or len(name) > MAX_CRON_NAME:
        yield "metadata.name", f"{name!r} is not a DNS-1035 label of at most {MAX_CRON_NAME} characters"
    if not is_schedule(str(spec.get("schedule", ""))):
        yield "spec.schedule", f"{spec.get('schedule')!r} is not a schedule of cron, such as `0 3 * * *` or @daily"
    if "timeZone" in spec and str(spec["timeZone"]) not in zoneinfo.available_timezones():
        yield "spec.timeZone", f"{spec['timeZone']!r} is not a time zone, such as Europe/Berlin"


def cron_risks(cron_job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield what lets a RayCronJob do nothing, or do it twice."""
    yield "kind", "needs the operator's feature gate RayCronJob, which is off by default"
    if "kueue.x-k8s.io/queue-name" in mapping(cron_job, "metadata", "labels"):
        yield "metadata.labels", "KubeRay does not copy the queue's label to the RayJobs, so Kueue does not see them"


def job_of(cron_job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RayJob that a RayCronJob makes; its name is the shortest that it may have."""
    return {"metadata": {"name": "made-by-a-schedule"}, "spec": mapping(cron_job, "spec", "jobTemplate")}
