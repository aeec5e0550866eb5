"""Settings of a Kubernetes cluster that a run file does not have: one for each option of `k8s render`.

Pure, and imports neither torch nor ray. An error message must not repeat a value that may be a secret.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any
from zoneinfo import available_timezones

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.quantity import quantity_value
from outlast.trainers.config.base import Settings
from outlast.trainers.config.validation_errors import SettingsFinding, findings

MAX_NAME = 47  # KubeRay appends to it
MAX_CRON_NAME = 36  # KubeRay appends the time
LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
DRAIN_BEFORE_GRACE_S = 5  # Ray's drain deadline must come before SIGKILL

_SYSTEM_DIRS = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "run", "sbin", "sys", "tmp", "usr"}
)
_IMAGE_DIRS = frozenset({"/", "/home", "/home/ray", "/opt", "/usr", "/usr/local", "/var", "/var/run"})
#: Programs of an image: of `k8s/Dockerfile`, of Ray's own images, and of others that are common.
_PROGRAM_DIRS = ("/opt/outlast", "/opt/conda", "/opt/venv", "/home/ray/anaconda3", "/home/ray/.local")
_PACKAGE_DIRS = frozenset({"site-packages", "dist-packages"})

#: Settings whose option is given once for each value, and named in the singular.
_REPEATED_OPTIONS = ("labels", "egress_ports", "head_nodes", "worker_nodes", "worker_taints")


def _name(max_length: int) -> AfterValidator:
    """Validates a Kubernetes name. The message leaves the value out: it may be a secret's."""

    def check(value: str) -> str:
        if len(value) > max_length or not re.fullmatch(LABEL, value):
            message = f"not a name: use lower-case letters, digits and dashes, at most {max_length}, a letter first"
            raise ValueError(f"{message}; give a secret's name, not its content" if "=" in value else message)
        return value

    return AfterValidator(check)


def _quantity(value: str) -> str:
    if (quantity_value(value) or 0) < 1:
        raise ValueError(f"{value!r} is not a Kubernetes quantity such as 16Gi or 500Mi")
    return value


def _taint(value: str) -> str:
    if not re.fullmatch(r"[\w./-]+(=[\w.-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?", value):
        raise ValueError(f"{value!r} is not a taint: write key=value:NoSchedule, key:NoSchedule or key")
    return value


Name = Annotated[str, _name(63)]
Quantity = Annotated[str, AfterValidator(_quantity)]
Taint = Annotated[str, AfterValidator(_taint)]
Port = Annotated[int, Field(ge=1, le=65535)]


class K8sSettings(Settings):
    """Settings of a Kubernetes cluster that a run file does not have."""

    image: str = Field(default_factory=lambda: f"outlast:{version('outlast')}", min_length=1)
    """Image of every container: outlast, and Ray of `ray_version`. It needs a tag other than `latest`, or a digest:
    every new pod must run the same program. Default: the tag that `k8s/README.md` builds."""
    ray_version: str = Field(default_factory=lambda: version("ray"), pattern=r"^\d+\.\d+\.\d+\S*$")
    """Version of Ray in the image; KubeRay's probes and authentication depend on it. Default: the installed one."""
    pull_secret: Name | None = None
    """A secret to pull the image from a private registry."""
    namespace: Name | None = None
    """Namespace of all objects. Default: kubectl's current one."""
    name: Annotated[str, _name(MAX_NAME)] | None = None
    """Name of the RayJob. Default: the run's, in lower case, with dashes for characters that Kubernetes forbids."""
    service_account: Name | None = None
    """An existing service account for the pods, such as one with a cloud role. Default: a new one, without rights."""
    labels: dict[str, str] = Field(default_factory=dict)
    """More labels for the RayJob, such as a queue of Volcano or YuniKorn; KubeRay copies them to the cluster."""
    queue: Name | None = None
    """A local queue of Kueue, which then starts the run and may suspend it for others."""
    elastic_queue: bool = False
    """With `queue` and `scale.workers: [min, max]`: Kueue admits each worker that is added, instead of a fixed number
    (its feature ElasticJobsViaWorkloadSlices). To make room for others it still suspends the whole run."""
    schedule: str | None = None
    """Times at which the run is started or resumed, in cron's format, such as `0 3 * * *`: a RayCronJob instead of a
    RayJob (the operator's feature RayCronJob). A run that is complete ends at once."""
    time_zone: str | None = None
    """Time zone of `schedule`, such as Europe/Berlin. Default: the operator's."""
    sidecar: bool = False
    """Submit the job from a container in the head's pod instead of a pod of its own: no traffic between the two, and no
    pod to place. KubeRay gives it no security context, so a namespace under the restricted standard refuses it."""
    keep_failed_s: int | None = Field(None, ge=0)
    """Seconds for which the head of a failed run is kept, with its logs; workers go at once. Such a run cannot be
    suspended. Default: `ttl_s`, for all pods."""

    claim: Name | None = None
    """An existing volume claim for checkpoints (ReadWriteMany). Default: a new one if storage is a path."""
    claim_size: Quantity = "100Gi"
    """Size of a new claim: `keep_last` checkpoints, the best ones and the model, with room for one more."""
    storage_class: str | None = None
    """Storage class of a new claim; it must offer ReadWriteMany. Default: the cluster's."""
    mount: str | None = None
    """Mount path of the claim. Default: `checkpoint.storage`; a parent of it also gives access to data beside it."""
    secret: Name | None = None
    """A secret whose keys become environment variables of head and workers: credentials, endpoint and region of an
    object store, and the variables of `${env:…}` in the run file. Only its name is ever written."""

    network_policy: bool = True
    """Limit the pods' traffic to each other, DNS, the operator's requests and the ports below."""
    operator_namespace: Name | None = None
    """Namespace of KubeRay's operator, whose requests are let through. Default: those in which it usually runs."""
    egress_ports: tuple[Port, ...] = ()
    """Further ports that the pods may reach at any address, such as 9000 of a store whose address is in the secret.
    Those of object stores in the run file and 443 for a model on the hub are open."""

    worker_cpus: int = Field(4, ge=1)
    """CPUs of a worker's pod if `scale.cpus_per_worker` is not set."""
    worker_memory: Quantity = "16Gi"
    """Memory of a worker's pod, request and limit; `shm` is part of it."""
    head_cpus: int = Field(2, ge=1)
    """CPUs of the head: the driver tokenizes the data there."""
    head_memory: Quantity = "8Gi"
    """Memory of the head, request and limit: Ray's own processes take about 2 GiB."""
    shm: Quantity = "1Gi"
    """Size of /dev/shm, which counts as memory: Ray's object store (256 MiB) and NCCL's buffers."""

    spot: bool = False
    """Run workers on spot nodes only (GKE, EKS, Karpenter, AKS by their own labels). Default: on any node."""
    fallback: bool = False
    """With `spot`: if no spot node is available, Ray's autoscaler takes other nodes."""
    fallback_after_s: int = Field(300, ge=30)
    """Seconds that a pod waits for a spot node before another kind is tried."""
    head_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for head and submitter, which never run on spot nodes: losing the head restarts the run."""
    worker_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for workers."""
    worker_taints: tuple[Taint, ...] = ()
    """Taints that workers tolerate, in kubectl's syntax: `key=value:NoSchedule`, `key:NoSchedule` or `key`. Those of
    spot nodes (GKE, AKS) and of GPUs are always tolerated."""

    backoff_limit: int = Field(20, ge=0)
    """How often a failed job is started again, each time on a new cluster. Bugs and lost machines count alike."""
    ttl_s: int = Field(60, ge=0)
    """Seconds until a finished job's cluster is deleted. Workers hold their GPUs until then; the log is kept."""
    grace_s: int = Field(120, ge=30)
    """Seconds from a pod's SIGTERM to its SIGKILL: time to save. Two minutes is the longest notice of a spot node."""
    notice_s: int | None = Field(None, ge=10)
    """Seconds after a worker's SIGTERM that are announced to Ray as its node's end: the last save comes just before.
    Must be shorter than the cloud's own notice: 12 on spot nodes of GKE, 25 on Azure's. Default: `grace_s` minus 5."""

    @field_validator("image")
    @classmethod
    def _check_image(cls, value: str) -> str:
        if not is_pinned(value):
            raise ValueError(f"{value!r} can change between pods: give it a tag other than latest, or a digest")
        return value

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: str | None) -> str | None:
        if value is not None and not is_schedule(value):
            raise ValueError(f"{value!r} is not a schedule of cron, such as `0 3 * * *` or @daily")
        return value

    @field_validator("time_zone")
    @classmethod
    def _check_time_zone(cls, value: str | None) -> str | None:
        if value is not None and value not in available_timezones():
            raise ValueError(f"{value!r} is not a time zone, such as Europe/Berlin")
        return value

    @field_validator("mount")
    @classmethod
    def _check_mount(cls, value: str | None) -> str | None:
        try:
            return value if value is None else checked_mount(value, "mount")
        except ConfigError as error:
            raise ValueError(error.message) from error

    @field_validator("head_nodes", "worker_nodes", "labels", mode="before")
    @classmethod
    def _parse_labels(cls, value: Any) -> Any:
        """Accepts a list of `key=value` too, as a command line gives it."""
        if isinstance(value, Mapping):
            value = [f"{key}={label}" for key, label in value.items()]
        for item in value:
            if not re.fullmatch(r"[\w./-]+=[\w.-]*", item):
                raise ValueError(f"{item!r} is not a label: write key=value")
        return dict(item.split("=", 1) for item in value)

    @model_validator(mode="after")
    def _check_combinations(self) -> K8sSettings:
        if self.fallback and not self.spot:
            raise ValueError("--fallback needs --spot: it is from spot nodes to others")
        if self.elastic_queue and not self.queue:
            raise ValueError("--elastic-queue needs --queue: it is how Kueue admits the workers")
        if self.queue and self.schedule:
            raise ValueError("--schedule excludes --queue: KubeRay gives the queue's label to none of the RayJobs")
        if self.queue and self.keep_failed_s is not None:
            raise ValueError("--keep-failed-s excludes --queue: Kueue needs shutdownAfterJobFinishes")
        if self.time_zone and not self.schedule:
            raise ValueError("--time-zone needs --schedule")
        if self.announced_s >= self.grace_s:
            raise ValueError(f"--notice-s ({self.notice_s}) must be less than --grace-s ({self.grace_s})")
        for option, memory in (("--worker-memory", self.worker_memory), ("--head-memory", self.head_memory)):
            if (quantity_value(self.shm) or 0) >= (quantity_value(memory) or 0):
                raise ValueError(f"--shm ({self.shm}) must be less than {option} ({memory}), which includes it")
        return self

    @property
    def announced_s(self) -> int:
        """Seconds from a worker's SIGTERM to its node's end as announced to Ray."""
        return self.grace_s - DRAIN_BEFORE_GRACE_S if self.notice_s is None else self.notice_s


def k8s_settings(**given: Any) -> K8sSettings:
    """Parse the settings as given on a command line. Raises ConfigError with every finding."""
    try:
        return K8sSettings.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        lines = "\n".join(f"  {_as_option(finding)}" for finding in findings(error, K8sSettings))
        raise ConfigError(
            f"Kubernetes settings are not valid:\n{lines}", hint="`outlast k8s render --help` explains each"
        ) from error


def _as_option(finding: SettingsFinding) -> str:
    """Format a finding under the option's name."""
    if not finding.path:
        return finding.message
    setting = str(finding.path[0])
    option = setting.removesuffix("s") if setting in _REPEATED_OPTIONS else setting
    line = f"--{option.replace('_', '-')}: {finding.message}"
    return f"{line}; {finding.suggestion}" if finding.suggestion else line


def is_schedule(text: str) -> bool:
    """Return whether KubeRay reads a text as a schedule of cron; names of months and days are not looked up."""
    if re.fullmatch(
        r"@(yearly|annually|monthly|weekly|daily|midnight|hourly|every (\d+(\.\d+)?(ns|us|ms|s|m|h))+)", text
    ):
        return True
    fields = text.split()
    limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
    return len(fields) == len(limits) and all(map(_is_cron_field, fields, limits))


def _is_cron_field(field: str, limits: tuple[int, int]) -> bool:
    for item in field.split(","):
        if not (match := re.fullmatch(r"(\*|\?|(\d+|[A-Za-z]{3})(-(\d+|[A-Za-z]{3}))?)(/[1-9]\d*)?", item)):
            return False
        numbers = [int(part) for part in (match[2], match[4]) if part and part.isdecimal()]
        if numbers != sorted(numbers) or any(not limits[0] <= number <= limits[1] for number in numbers):
            return False
    return True


def is_pinned(image: str) -> bool:
    """Return whether an image's name has a digest, or a tag other than latest."""
    name, _, digest = image.partition("@")
    return bool(digest) or name.rpartition("/")[2].partition(":")[2] not in ("", "latest")


def checked_mount(path: str, what: str) -> str:
    """Return `path`, normalized. Raises ConfigError, naming the setting `what`, if it would hide files of the image."""
    if not path.startswith("/"):
        raise ConfigError(
            f"{what} {path!r} is relative, but pods need an absolute path",
            hint=f"set {what} to an absolute path such as /data/runs, or to s3://bucket/prefix",
        )
    path = "/" + posixpath.normpath(path).lstrip("/")
    if hides_programs(path) or path.split("/")[1] in _SYSTEM_DIRS or ":" in path:
        raise ConfigError(
            f"{what} {path!r} cannot be mounted in a pod: it hides files of the image",
            hint=f"set {what} to a path such as /data/runs",
        )
    return path


def hides_programs(path: str) -> bool:
    """Return whether a volume mounted at a path hides programs of the image, such as its Python."""
    is_program = any(f"{path}/".startswith(f"{folder}/") for folder in _PROGRAM_DIRS)
    return is_program or path in _IMAGE_DIRS or not _PACKAGE_DIRS.isdisjoint(path.split("/"))
