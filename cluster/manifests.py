"""Kubernetes manifests of a run: a RayJob for KubeRay, and what it needs.

The templates in `k8s/` are plain YAML that holds the defaults; functions here set what depends on the run. They are
pure, and import neither torch nor ray. They must never write a secret down: the run file travels as it was written,
`${env:…}` unexpanded, and secrets are named, not read. Of the environment there shows what places objects: the run's
name, and the path where its storage is mounted.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config import RunConfig
from outlast.trainers.config import Settings
from outlast.trainers.findings import explain

MAX_NAME = 47  # KubeRay makes longer names from it
SUBMISSION_MODES = ("K8sJobMode", "SidecarMode", "HTTPMode", "InteractiveMode")
DRAIN_BEFORE_GRACE_S = 5  # Ray announces its own time-out as the end; a later one is never reached
_STOP_BEFORE_GRACE_S = 20

_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_SYSTEM_DIRS = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib64", "proc", "root", "run", "sbin", "sys", "tmp", "usr"}
)
_HOLDS_THE_IMAGE = frozenset({"/", "/home", "/home/ray", "/opt", "/var"})

Name = Annotated[str, Field(pattern=rf"^{_LABEL}$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$")]
Taint = Annotated[str, Field(pattern=r"^[\w./-]+(=[\w.-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?$")]


class K8sSettings(Settings):
    """What a cluster must be told that a run file does not say."""

    image: str = Field(default_factory=lambda: f"outlast:{version('outlast')}", min_length=1)
    """Image of every container: outlast, and Ray of `ray_version`. Default: the tag that `k8s/README.md` builds."""
    ray_version: str = Field(default_factory=lambda: version("ray"), pattern=r"^\d+\.\d+\.\d+\S*$")
    """Ray in the image; KubeRay picks probes and authentication by it. Default: the one installed here."""
    namespace: Name | None = None
    """Where everything goes. Default: the one that kubectl is set to."""
    name: Annotated[str, Field(pattern=rf"^{_LABEL}$", max_length=MAX_NAME)] | None = None
    """Name of the RayJob. Default: the run's, in lower case, with dashes for what Kubernetes does not allow."""
    service_account: Name | None = None
    """An existing service account for the pods, such as one with a cloud role. Default: a new one, without rights."""

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

    head_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for head and submitter: nodes that stay, because losing the head restarts the run."""
    worker_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for workers, such as spot nodes."""
    worker_taints: tuple[Taint, ...] = ()
    """Taints that workers tolerate, as kubectl writes them: `key=value:NoSchedule`, `key:NoSchedule` or `key`."""

    backoff_limit: int = Field(20, ge=0)
    """How often a failed job is started again, each time on a new cluster. Bugs and lost machines count alike."""
    ttl_s: int = Field(60, ge=0)
    """Seconds until a finished job's cluster is deleted. Workers hold their GPUs until then; the log stays anyway."""
    grace_s: int = Field(120, ge=30)
    """Seconds from a pod's SIGTERM to its SIGKILL: time to save. Two minutes is the longest notice of a spot node."""

    @field_validator("mount")
    @classmethod
    def _mountable(cls, value: str | None) -> str | None:
        try:
            return value if value is None else _checked_mount(value, "mount")
        except ConfigError as error:
            raise ValueError(error.message) from error

    @field_validator("head_nodes", "worker_nodes", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Takes `key=value` words, as a command line gives them, too."""
        if isinstance(value, Mapping):
            value = [f"{key}={label}" for key, label in value.items()]
        for word in value:
            if not re.fullmatch(r"[\w./-]+=[\w.-]*", word):
                raise ValueError(f"{word!r} is not a node label: write key=value")
        return dict(word.split("=", 1) for word in value)


def k8s_settings(**given: Any) -> K8sSettings:
    """The settings as given on a command line.

    Raises:
        ConfigError: One cannot be used; the message lists every finding.
    """
    try:
        return K8sSettings.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, K8sSettings).splitlines())
        raise ConfigError(f"Kubernetes settings that cannot be used:\n{lines}") from error


def render(config: RunConfig, declared: Mapping[str, Any], settings: K8sSettings) -> list[dict[str, Any]]:
    """Every object that the run needs, in the order in which to create them.

    Args:
        config: The settings, as `load_run` returns them: paths are those of the pods, so they stay as they are.
        declared: The settings as written, `${env:…}` unexpanded. They go into the ConfigMap.
        settings: What the cluster must be told beyond them.

    Raises:
        ConfigError: The run cannot be put on Kubernetes like this.
    """
    name = job_name(config.name, settings)
    for url in _sources(config).values():
        if urlsplit(url).username or urlsplit(url).password:
            raise ConfigError("a URL in the run file carries credentials", hint="put them into a secret: --secret NAME")
    mount = _mount(config, settings)
    claim = settings.claim or f"{name}-storage"
    objects = [_config_map(declared)]
    if settings.service_account is None:
        objects.append(_template("serviceaccount"))
    if mount and settings.claim is None:
        objects.append(_volume_claim(settings))
    objects.append(_ray_job(config, settings, name, claim, mount))
    for item in objects:
        meta = item["metadata"]
        meta["name"] = claim if item["kind"] == "PersistentVolumeClaim" else name
        meta["labels"]["outlast/run"] = config.name
        if settings.namespace:
            meta["namespace"] = settings.namespace
    findings = operator_findings(objects[-1])
    assert not findings, findings
    return objects


def cautions(config: RunConfig, declared: Mapping[str, Any], settings: K8sSettings) -> list[str]:
    """What may be wrong and cannot be seen from here, one sentence each."""
    mount, found = _mount(config, settings), []
    for key, value in _sources(config).items():
        if key != "checkpoint.storage" and not _remote(value) and not _lies_under(value, mount):
            place = f"put it under {mount}" if mount else "mount a claim (--claim NAME --mount PATH)"
            found.append(f"{key}: no volume brings {value} into the pods; {place}, or have it in the image")
    names = sorted(set(_ENV.findall(json.dumps(dict(declared), default=str))))
    if names and settings.secret is None:
        found.append(f"the run file asks for {', '.join(names)}: name a secret with these keys (--secret NAME)")
    if _remote(config.checkpoint.storage) and settings.secret is None and settings.service_account is None:
        found.append(
            "object storage without --secret NAME or --service-account NAME: nothing gives the pods access to it"
        )
    if mount and settings.claim is None:
        claim = f"{job_name(config.name, settings)}-storage"
        found.append(f"claim {claim} holds the checkpoints: `kubectl delete -f` on these objects would delete them too")
    return found


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """One YAML stream, for people, for kubectl and for PyYAML alike."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, explicit_start=len(objects) > 1, sort_keys=False, allow_unicode=True, width=120
    )


def operator_findings(job: Mapping[str, Any]) -> list[str]:
    """What KubeRay's operator refuses, or ignores in silence, though the CRD lets it pass. Empty is good."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    mode, submitter = spec.get("submissionMode", "K8sJobMode"), spec.get("submitterPodTemplate")
    found = []
    if not re.fullmatch(_LABEL, job["metadata"]["name"]) or len(job["metadata"]["name"]) > MAX_NAME:
        found.append(f"name: not a DNS-1035 label of at most {MAX_NAME} characters")
    if mode not in SUBMISSION_MODES:
        found.append(f"submissionMode: {mode!r} is none of {', '.join(SUBMISSION_MODES)}")
    if mode == "SidecarMode" and (submitter or "submitterConfig" in spec or "clusterSelector" in spec):
        found.append("submissionMode: SidecarMode refuses submitterPodTemplate, submitterConfig and clusterSelector")
    if submitter and submitter["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        found.append("submitterPodTemplate: restartPolicy must be Never or OnFailure")
    if cluster.get("authOptions", {}).get("mode") == "token" and not cluster.get("rayVersion"):
        found.append("authOptions: token needs rayVersion")
    for group in cluster.get("workerGroupSpecs", []):
        if not 0 <= group.get("minReplicas", -1) <= group["replicas"] <= group.get("maxReplicas", -1):
            found.append(f"{group['groupName']}: give minReplicas, replicas and maxReplicas, in this order of size")
    return found


def job_name(run: str, settings: K8sSettings) -> str:
    """The RayJob's name: as asked for, or made from the run's.

    Raises:
        ConfigError: None can be made from it.
    """
    if settings.name is not None:
        return settings.name
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if len(name) > MAX_NAME:
        raise ConfigError(
            f"run name {run!r} has {len(name)} characters; a RayJob's name has {MAX_NAME} at most",
            hint="give a shorter one for Kubernetes only: --name NAME",
        )
    if not re.fullmatch(_LABEL, name):
        raise ConfigError(
            f"run name {run!r} makes no name for a RayJob, which begins with a letter",
            hint=f"give one for Kubernetes only: --name run-{name}",
        )
    return name


def _config_map(declared: Mapping[str, Any]) -> dict[str, Any]:
    body = _template("configmap")
    body["data"] = {"run.yaml": yaml.safe_dump(dict(declared), sort_keys=False, allow_unicode=True)}
    return body


def _volume_claim(settings: K8sSettings) -> dict[str, Any]:
    body = _template("pvc")
    body["spec"]["resources"]["requests"]["storage"] = settings.claim_size
    if settings.storage_class:
        body["spec"]["storageClassName"] = settings.storage_class
    return body


def _ray_job(config: RunConfig, settings: K8sSettings, name: str, claim: str, mount: str | None) -> dict[str, Any]:
    job = _template("rayjob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    spec["backoffLimit"], spec["ttlSecondsAfterFinished"] = settings.backoff_limit, settings.ttl_s
    cluster["rayVersion"] = settings.ray_version
    [group] = cluster["workerGroupSpecs"]
    scale = config.scale
    group.update(replicas=scale.max_workers, minReplicas=scale.min_workers, maxReplicas=scale.max_workers)
    submitter, head, worker = spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], group["template"]
    for pod in (submitter, head, worker):
        pod["metadata"]["labels"]["outlast/run"] = config.name
        pod["spec"]["serviceAccountName"] = settings.service_account or name
        pod["spec"]["containers"][0]["image"] = settings.image
    for pod in (submitter, head):
        _place(pod["spec"], settings.head_nodes, ())
    gpus = _whole("gpus_per_worker", config.scale.gpus_per_worker)
    gpu_taint = ("nvidia.com/gpu:NoSchedule",) if gpus else ()
    _place(worker["spec"], settings.worker_nodes, (*settings.worker_taints, *gpu_taint))
    cpus = config.scale.cpus_per_worker
    _size(head["spec"], settings.head_cpus, settings.head_memory, 0)
    worker_cpus = settings.worker_cpus if cpus is None else _whole("cpus_per_worker", cpus)
    _size(worker["spec"], worker_cpus, settings.worker_memory, gpus)
    head["spec"]["volumes"][0]["configMap"]["name"] = name
    for pod in (head, worker):
        _ray_node(pod["spec"], settings, claim, mount)
    return job


def _place(pod: dict[str, Any], nodes: Mapping[str, str], taints: tuple[str, ...]) -> None:
    if nodes:
        pod["nodeSelector"] = dict(nodes)
    for taint in taints:
        key_value, _, effect = taint.partition(":")
        key, equals, value = key_value.partition("=")
        matches = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
        pod["tolerations"].append({"key": key, **matches, **({"effect": effect} if effect else {})})


def _size(pod: dict[str, Any], cpus: int, memory: str, gpus: int) -> None:
    pod["containers"][0]["resources"] = {
        "requests": {"cpu": str(cpus), "memory": memory},
        "limits": {"memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
    }


def _ray_node(pod: dict[str, Any], settings: K8sSettings, claim: str, mount: str | None) -> None:
    container = pod["containers"][0]
    pod["terminationGracePeriodSeconds"] = settings.grace_s
    timed = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": settings.grace_s - DRAIN_BEFORE_GRACE_S,
        "RAY_JOB_STOP_WAIT_TIME_S": settings.grace_s - _STOP_BEFORE_GRACE_S,
    }
    for variable in container["env"]:
        if variable["name"] in timed:
            variable["value"] = str(timed[variable["name"]])
    [shm] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    shm["emptyDir"]["sizeLimit"] = settings.shm
    if settings.secret:
        container["envFrom"] = [{"secretRef": {"name": settings.secret}}]
    if mount:
        container["volumeMounts"].append({"name": "storage", "mountPath": mount})
        pod["volumes"].append({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})


def _mount(config: RunConfig, settings: K8sSettings) -> str | None:
    """Where the claim is mounted in head and workers; None without one."""
    storage = config.checkpoint.storage
    if _remote(storage):
        if (settings.claim is None) != (settings.mount is None):
            raise ConfigError(
                f"storage {storage} needs no claim; for data give both --claim and --mount",
                hint="--claim NAME --mount PATH, or neither",
            )
        return settings.mount
    path = _checked_mount(urlsplit(storage).path if storage.startswith("file:") else storage, "checkpoint.storage")
    if settings.mount and not _lies_under(path, settings.mount):
        raise ConfigError(
            f"checkpoint.storage {path} is not under {settings.mount}, where the claim is mounted",
            hint=f"--mount {path}, or a parent of it",
        )
    return settings.mount or path


def _checked_mount(path: str, what: str) -> str:
    """`path`, normalized, if a volume can be mounted there without hiding what a pod needs."""
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


def _whole(key: str, value: float) -> int:
    if value != int(value):
        raise ConfigError(
            f"scale.{key} is {value:g}; on Kubernetes each worker has a pod of its own, with whole CPUs and GPUs",
            hint=f"set scale.{key} to a whole number",
        )
    return int(value)


def _sources(config: RunConfig) -> dict[str, str]:
    """Every setting that may name a place, by key."""
    tokenizer = config.model.tokenizer.path if config.model.tokenizer else None
    places = {
        "checkpoint.storage": config.checkpoint.storage,
        **config.data.places,
        "model.path": _unless_hub_id(config.model.path),
        "model.tokenizer.path": _unless_hub_id(tokenizer),
    }
    return {key: place for key, place in places.items() if place}


def _unless_hub_id(name: str | None) -> str | None:
    """`name` if it can only be a path; anything else may be a hub id."""
    return name if name and name.startswith(("/", "./", "../", "~")) else None


def _remote(place: str) -> bool:
    return "://" in place and not place.startswith("file:")


def _lies_under(path: str, mount: str | None) -> bool:
    path = urlsplit(path).path if path.startswith("file:") else path
    return mount is not None and f"{posixpath.normpath(path)}/".startswith(f"{mount}/")


def _template(name: str) -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load((files("outlast.k8s") / f"{name}.yaml").read_text(encoding="utf-8"))
    return body


class _Dumper(yaml.SafeDumper):
    """Blocks for text of several lines, no aliases, and quotes where YAML 1.2 or Go's reader would see no string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else '"' if re.match(r"[-+.]?\d|[yYnN]$", value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
