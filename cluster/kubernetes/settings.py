"""What a Kubernetes cluster must be told that a run file does not say: one setting for each option of `k8s render`.

Pure, and imports neither torch nor ray.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.base import Settings
from outlast.trainers.config.validation_errors import SettingsFinding, findings

MAX_NAME = 47  # KubeRay makes longer names from it
LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
DRAIN_BEFORE_GRACE_S = 5  # Ray announces its own time-out as the end; a later one is never reached

_SYSTEM_DIRS = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "tmp", "usr"}
)
_HOLDS_THE_IMAGE = frozenset({"/", "/home", "/home/ray", "/opt", "/var"})

#: Options that give one of several, by the setting that they add to.
_ONE_OF = {name: name.removesuffix("s") for name in ("labels", "egress_ports", "head_nodes", "worker_nodes")} | {
    "worker_taints": "worker_taint"
}


def _name(longest: int) -> AfterValidator:
    """A name of Kubernetes'. What is given instead may be a secret's value, so it is not told."""

    def check(value: str) -> str:
        if len(value) > longest or not re.fullmatch(LABEL, value):
            said = f"not a name of lower-case letters, digits and dashes, at most {longest}, a letter first"
            raise ValueError(f"{said}; give a secret's name, not what is in it" if "=" in value else said)
        return value

    return AfterValidator(check)


def _quantity(value: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?", value) or not float(value.rstrip("KMGTki")):
        raise ValueError(f"{value!r} is no size as Kubernetes writes it: 16Gi, 500Mi")
    return value


def _bytes(value: str) -> float:
    number = value.rstrip("KMGTki")
    unit = value.removeprefix(number)
    return float(number) * (1024.0 if unit.endswith("i") else 1000.0) ** (
        "KMGT".find(unit[:1].upper()) + 1 if unit else 0
    )


def _taint(value: str) -> str:
    if not re.fullmatch(r"[\w./-]+(=[\w.-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?", value):
        raise ValueError(f"{value!r} is no taint as kubectl writes it: key=value:NoSchedule, key:NoSchedule or key")
    return value


Name = Annotated[str, _name(63)]
Quantity = Annotated[str, AfterValidator(_quantity)]
Taint = Annotated[str, AfterValidator(_taint)]
Port = Annotated[int, Field(ge=1, le=65535)]


class K8sSettings(Settings):
    """What a cluster must be told that a run file does not say."""

    image: str = Field(default_factory=lambda: f"outlast:{version('outlast')}", min_length=1)
    """Image of every container: outlast, and Ray of `ray_version`. It needs a tag of its own or a digest, because each
    new pod must be the same program. Default: the tag that `k8s/README.md` builds."""
    ray_version: str = Field(default_factory=lambda: version("ray"), pattern=r"^\d+\.\d+\.\d+\S*$")
    """Ray in the image; KubeRay picks probes and authentication by it. Default: the one installed here."""
    pull_secret: Name | None = None
    """A secret with which to fetch the image from a private registry."""
    namespace: Name | None = None
    """Where everything goes. Default: the one that kubectl is set to."""
    name: Annotated[str, _name(MAX_NAME)] | None = None
    """Name of the RayJob. Default: the run's, in lower case, with dashes for what Kubernetes does not allow."""
    service_account: Name | None = None
    """An existing service account for the pods, such as one with a cloud role. Default: a new one, without rights."""
    labels: dict[str, str] = Field(default_factory=dict)
    """More labels for the RayJob; KubeRay hands them on to the cluster. A queue of Volcano or YuniKorn, say."""
    queue: Name | None = None
    """A local queue of Kueue, which then says when the run may start, and suspends it for others."""

    claim: Name | None = None
    """An existing volume claim for checkpoints (ReadWriteMany). Default: a new one where storage is a path."""
    claim_size: Quantity = "100Gi"
    """Size of a new claim: `keep_last` checkpoints, the best ones and the model, with room for one more."""
    storage_class: str | None = None
    """Storage class of a new claim; it must offer ReadWriteMany. Default: the cluster's."""
    mount: str | None = None
    """Where the claim is mounted. Default: at `checkpoint.storage`; give a parent of it to reach data beside it."""
    secret: Name | None = None
    """A secret whose keys become environment variables of head and workers: credentials, endpoint and region of an
    object store, and what `${env:…}` in the run file asks for. Only its name is ever written."""

    network_policy: bool = True
    """Let the pods talk to each other, to DNS and to the ports below, and nobody else to them but the operator."""
    egress_ports: tuple[Port, ...] = ()
    """Ports that the pods may reach anywhere: a store's own, such as 9000. Port 443 needs no word where the run file
    names an object store or a model on the hub."""

    worker_cpus: int = Field(4, ge=1)
    """CPUs of a worker's pod where `scale.cpus_per_worker` does not say."""
    worker_memory: Quantity = "16Gi"
    """Memory of a worker's pod, request and limit, with `shm` in it."""
    head_cpus: int = Field(2, ge=1)
    """CPUs of the head: the driver tokenizes the data there."""
    head_memory: Quantity = "8Gi"
    """Memory of the head, request and limit: Ray's own processes take about 2 GiB."""
    shm: Quantity = "1Gi"
    """Size of /dev/shm, which counts as memory: Ray's object store (256 MiB) and NCCL's buffers."""

    spot: bool = False
    """Workers run on spot nodes only (GKE, EKS, Karpenter, AKS by their own labels). Default: there or elsewhere."""
    fallback: bool = False
    """With `spot`: where no spot node is to be had, Ray's autoscaler takes others."""
    fallback_after_s: int = Field(300, ge=30)
    """Seconds for which a pod waits for a spot node before another kind is tried."""
    head_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for head and submitter, which never run on spot nodes: losing the head restarts the run."""
    worker_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for workers."""
    worker_taints: tuple[Taint, ...] = ()
    """Taints that workers tolerate, as kubectl writes them: `key=value:NoSchedule`, `key:NoSchedule` or `key`. Those
    of spot nodes (GKE, AKS) and of GPUs need no word."""

    backoff_limit: int = Field(20, ge=0)
    """How often a failed job is started again, each time on a new cluster. Bugs and lost machines count alike."""
    ttl_s: int = Field(60, ge=0)
    """Seconds until a finished job's cluster is deleted. Workers hold their GPUs until then; the log stays anyway."""
    grace_s: int = Field(120, ge=30)
    """Seconds from a pod's SIGTERM to its SIGKILL: time to save. Two minutes is the longest notice of a spot node."""
    notice_s: int | None = Field(None, ge=10)
    """Seconds after a worker's SIGTERM that are announced to Ray as its node's end: the last save comes just before.
    Shorter than a cloud's own notice: 12 on spot nodes of GKE, 25 on those of Azure. Default: `grace_s` less 5."""

    @field_validator("image")
    @classmethod
    def _says_which(cls, value: str) -> str:
        if not is_pinned(value):
            raise ValueError(f"{value!r} may be another program tomorrow: give it a tag of its own, or a digest")
        return value

    @field_validator("mount")
    @classmethod
    def _mountable(cls, value: str | None) -> str | None:
        try:
            return value if value is None else checked_mount(value, "mount")
        except ConfigError as error:
            raise ValueError(error.message) from error

    @field_validator("head_nodes", "worker_nodes", "labels", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Takes `key=value` words, as a command line gives them, too."""
        if isinstance(value, Mapping):
            value = [f"{key}={label}" for key, label in value.items()]
        for word in value:
            if not re.fullmatch(r"[\w./-]+=[\w.-]*", word):
                raise ValueError(f"{word!r} is not a label: write key=value")
        return dict(word.split("=", 1) for word in value)

    @model_validator(mode="after")
    def _falls_back_from_somewhere(self) -> K8sSettings:
        if self.fallback and not self.spot:
            raise ValueError("--fallback is from spot nodes to others: give --spot too")
        return self

    @model_validator(mode="after")
    def _saves_before_the_kill(self) -> K8sSettings:
        if self.announced_s >= self.grace_s:
            raise ValueError(f"--notice-s {self.notice_s} is not below --grace-s {self.grace_s}, which ends in SIGKILL")
        return self

    @model_validator(mode="after")
    def _has_room_for_shared_memory(self) -> K8sSettings:
        for option, memory in (("--worker-memory", self.worker_memory), ("--head-memory", self.head_memory)):
            if _bytes(self.shm) >= _bytes(memory):
                raise ValueError(f"--shm {self.shm} is part of {option} {memory}, and would be all of it")
        return self

    @property
    def announced_s(self) -> int:
        """Seconds after a worker's SIGTERM that Ray takes for its node's end."""
        return self.grace_s - DRAIN_BEFORE_GRACE_S if self.notice_s is None else self.notice_s


def k8s_settings(**given: Any) -> K8sSettings:
    """The settings as given on a command line.

    Raises:
        ConfigError: One cannot be used; the message lists every finding.
    """
    try:
        return K8sSettings.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        lines = "\n".join(f"  {_as_option(found)}" for found in findings(error, K8sSettings))
        raise ConfigError(
            f"Kubernetes settings that cannot be used:\n{lines}", hint="`outlast k8s render --help` explains each"
        ) from error


def _as_option(found: SettingsFinding) -> str:
    """The finding under the name that was typed."""
    if not found.path:
        return found.message
    setting = str(found.path[0])
    said = f"--{_ONE_OF.get(setting, setting).replace('_', '-')}: {found.message}"
    return f"{said}; {found.suggestion}" if found.suggestion else said


def is_pinned(image: str) -> bool:
    """Whether an image's name means the same program tomorrow: it has a digest, or a tag other than latest."""
    name, _, digest = image.partition("@")
    return bool(digest) or name.rpartition("/")[2].partition(":")[2] not in ("", "latest")


def checked_mount(path: str, what: str) -> str:
    """`path`, normalized, if a volume can be mounted there without hiding what a pod needs.

    Raises:
        ConfigError: It cannot; `what` names it.
    """
    if not path.startswith("/"):
        raise ConfigError(
            f"{what} {path!r} is relative, and a pod has no home of yours",
            hint=f"set {what} to an absolute path such as /data/runs, or to s3://bucket/prefix",
        )
    path = "/" + posixpath.normpath(path).lstrip("/")
    if path in _HOLDS_THE_IMAGE or path.split("/")[1] in _SYSTEM_DIRS or ":" in path:
        raise ConfigError(
            f"{what} {path!r} cannot be mounted in a pod: it would hide files of the image",
            hint=f"set {what} to a path such as /data/runs",
        )
    return path
