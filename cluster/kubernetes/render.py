"""Kubernetes manifests of a run: a RayJob for KubeRay, and what it needs.

The templates in `k8s/` are plain YAML that holds the defaults; functions here set what depends on the run. They are
pure, and import neither torch nor ray. They must never write a secret down: the run file travels as it was written,
`${env:…}` unexpanded, and secrets are named, not read. Of the environment there shows what places objects: the run's
name, and the path where its storage is mounted.
"""

from __future__ import annotations

import copy
import json
import posixpath
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.kubernetes.settings import DRAIN_BEFORE_GRACE_S, LABEL, MAX_NAME, K8sSettings, checked_mount

#: The label that every object and pod of a run carries, and that its policies select by.
RUN_LABEL = "outlast/run"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: How clouds mark spot nodes: the label's key and value. Each cloud knows its own alone.
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}

_STOP_BEFORE_GRACE_S = 20
_ALLOCATE_VARIABLE = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"
_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def render(config: RunConfig, declared: Mapping[str, Any], settings: K8sSettings) -> list[dict[str, Any]]:
    """Every object that the run needs, in the order in which to create them.

    Args:
        config: The settings, as `load_run` returns them: paths are those of the pods, so they stay as they are.
        declared: The settings as written, `${env:…}` unexpanded. They go into the ConfigMap, and with them the CPUs
            of a worker: all that its pod has, or Ray would put several into one pod.
        settings: What the cluster must be told beyond them.

    Raises:
        ConfigError: The run cannot be put on Kubernetes like this.
    """
    name = job_name(config.name, settings)
    for key, url in _sources(config).items():
        if urlsplit(url).username or urlsplit(url).password:
            raise ConfigError(f"{key}: the URL carries credentials", hint="put them into a secret: --secret NAME")
    mount = _mount(config, settings)
    claim = settings.claim or f"{name}-storage"
    objects = [_config_map(declared, _worker_cpus(config, settings))]
    if settings.service_account is None:
        objects.append(_template("serviceaccount"))
    if settings.network_policy:
        objects.append(_network_policy(config, settings))
    objects.append(_template("disruptionbudget"))
    if mount and settings.claim is None:
        objects.append(_volume_claim(settings))
    objects.append(_ray_job(config, settings, name, claim, mount))
    for item in objects:
        meta = item["metadata"]
        meta["name"] = claim if item["kind"] == "PersistentVolumeClaim" else name
        if settings.namespace:
            meta["namespace"] = settings.namespace
    _mark(objects, config.name)
    return objects


def cautions(config: RunConfig, declared: Mapping[str, Any], settings: K8sSettings) -> list[str]:
    """What may be wrong and cannot be seen from here, one sentence each."""
    mount, found = _mount(config, settings), []
    if "image" not in settings.model_fields_set:
        found.append(f"image {settings.image} is the tag that k8s/README.md builds; one in a registry: --image IMAGE")
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
    if settings.network_policy and not settings.egress_ports and "mlflow" in (config.track.to or ()):
        found.append("the NetworkPolicy lets nobody reach an MLflow server: --egress-port PORT, its own")
    if mount and settings.claim is None:
        claim = f"{job_name(config.name, settings)}-storage"
        found.append(f"claim {claim} holds the checkpoints: `kubectl delete -f` on these objects would delete them too")
    return found


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """One YAML stream, for people, for kubectl and for PyYAML alike."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, explicit_start=len(objects) > 1, sort_keys=False, allow_unicode=True, width=120
    )


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
    if not re.fullmatch(LABEL, name):
        raise ConfigError(
            f"run name {run!r} makes no name for a RayJob, which begins with a letter",
            hint=f"give one for Kubernetes only: --name run-{name}",
        )
    return name


def _config_map(declared: Mapping[str, Any], cpus: int) -> dict[str, Any]:
    body = _template("configmap")
    run = {**declared, "scale": {**(declared.get("scale") or {}), "cpus_per_worker": cpus}}
    body["data"] = {"run.yaml": yaml.safe_dump(run, sort_keys=False, allow_unicode=True)}
    return body


def _worker_cpus(config: RunConfig, settings: K8sSettings) -> int:
    cpus = config.scale.cpus_per_worker
    return settings.worker_cpus if cpus is None else _whole("cpus_per_worker", cpus)


def _volume_claim(settings: K8sSettings) -> dict[str, Any]:
    body = _template("pvc")
    body["spec"]["resources"]["requests"]["storage"] = settings.claim_size
    if settings.storage_class:
        body["spec"]["storageClassName"] = settings.storage_class
    return body


def _network_policy(config: RunConfig, settings: K8sSettings) -> dict[str, Any]:
    """Egress to any address on the ports of what the run file names; a store has no address that could be told."""
    body = _template("networkpolicy")
    ports = set(settings.egress_ports)
    is_far = any(_remote(place) for place in _sources(config).values()) or _on_the_hub(config)
    if is_far or "wandb" in (config.track.to or ()):
        ports.add(443)
    if _autoscales(config, settings):
        ports |= {443, 6443}  # the API server, by its service or where it really listens
    if ports:
        body["spec"]["egress"].append({"ports": [{"protocol": "TCP", "port": port} for port in sorted(ports)]})
    if settings.service_account:  # what gives a cloud role its credentials, on every cloud
        metadata = {"ipBlock": {"cidr": "169.254.0.0/16"}}
        told = [{"protocol": "TCP", "port": port} for port in (80, 988)]
        body["spec"]["egress"].append({"to": [metadata], "ports": told})
    return body


def _ray_job(config: RunConfig, settings: K8sSettings, name: str, claim: str, mount: str | None) -> dict[str, Any]:
    job = _template("rayjob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    job["metadata"]["labels"].update(settings.labels, **({QUEUE_LABEL: settings.queue} if settings.queue else {}))
    spec["backoffLimit"], spec["ttlSecondsAfterFinished"] = settings.backoff_limit, settings.ttl_s
    cluster["rayVersion"] = settings.ray_version
    [group] = cluster["workerGroupSpecs"]
    submitter, head, worker = spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], group["template"]
    for pod in (submitter, head, worker):
        pod["spec"]["serviceAccountName"] = settings.service_account or name
        pod["spec"]["containers"][0]["image"] = settings.image
        if settings.pull_secret:
            pod["spec"]["imagePullSecrets"] = [{"name": settings.pull_secret}]
    for pod in (submitter, head):
        _place(pod["spec"], settings.head_nodes, ())
    gpus = _whole("gpus_per_worker", config.scale.gpus_per_worker)
    gpu_taint = ("nvidia.com/gpu:NoSchedule",) if gpus else ()
    _place(worker["spec"], settings.worker_nodes, (*settings.worker_taints, *gpu_taint))
    _size(head["spec"], settings.head_cpus, settings.head_memory, 0)
    _size(worker["spec"], _worker_cpus(config, settings), settings.worker_memory, gpus)
    head["spec"]["volumes"][0]["configMap"]["name"] = name
    for pod, announced_s in ((head, settings.grace_s - DRAIN_BEFORE_GRACE_S), (worker, settings.announced_s)):
        _ray_node(pod["spec"], settings, claim, mount, announced_s)
    cluster["workerGroupSpecs"] = _groups(group, config, settings)
    if not _autoscales(config, settings):
        _scale_not(cluster, head["spec"])
    for variable in cluster.get("autoscalerOptions", {}).get("env", []):
        if variable["name"] == _ALLOCATE_VARIABLE:
            variable["value"] = str(settings.fallback_after_s)
    return job


def _autoscales(config: RunConfig, settings: K8sSettings) -> bool:
    """Whether Ray's autoscaler says how many pods there are.

    Raises:
        ConfigError: It would have to, and Kueue does not let it.
    """
    wanted = config.scale.is_elastic or settings.fallback
    if wanted and settings.queue:
        raise ConfigError(
            "Kueue admits a RayJob with all its pods, and none whose number changes",
            hint="give scale.workers as one number and leave out --fallback, or leave out --queue",
        )
    return wanted


def _groups(group: dict[str, Any], config: RunConfig, settings: K8sSettings) -> list[dict[str, Any]]:
    """The worker groups. KubeRay submits once all pods that `replicas` asks for are there, so a group that scales
    begins with the fewest; of two groups that stand in for each other neither can be waited for."""
    scale = config.scale
    least, most = scale.min_workers, scale.max_workers
    group.update(replicas=least, minReplicas=least, maxReplicas=most)
    if settings.spot:
        _set_affinity(group["template"]["spec"], _only_spot())
    if not settings.fallback:
        return [group]
    other = copy.deepcopy(group)
    _set_affinity(other["template"]["spec"], _never_spot())
    for item, name, priority in ((group, "spot", 10), (other, "on-demand", 0)):
        item.update(groupName=name, replicas=0, minReplicas=0, maxReplicas=most, priority=priority)
    return [group, other]


def _only_spot() -> list[dict[str, Any]]:
    """One term for each cloud; terms are alternatives."""
    return [{"matchExpressions": [{"key": key, "operator": "In", "values": [word]}]} for key, word in SPOT.items()]


def _never_spot() -> list[dict[str, Any]]:
    """One term of all clouds; the expressions of a term hold together."""
    return [{"matchExpressions": [{"key": key, "operator": "NotIn", "values": [word]} for key, word in SPOT.items()]}]


def _set_affinity(pod: dict[str, Any], terms: list[dict[str, Any]]) -> None:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    pod["affinity"] = {"nodeAffinity": required}


def _scale_not(cluster: dict[str, Any], head: dict[str, Any]) -> None:
    """Takes the autoscaler away, and its access to the API server."""
    del cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "api"]
    container = head["containers"][0]
    container["env"] = [item for item in container["env"] if item["name"] != "OUTLAST_WAIT_FOR_NODES_S"]


def _mark(value: Any, run: str) -> None:
    """Sets the run's label wherever a template has it: on objects and pods, and in what selects them."""
    if isinstance(value, dict):
        if RUN_LABEL in value:
            value[RUN_LABEL] = run
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        _mark(item, run)


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


def _ray_node(pod: dict[str, Any], settings: K8sSettings, claim: str, mount: str | None, announced_s: int) -> None:
    container = pod["containers"][0]
    pod["terminationGracePeriodSeconds"] = settings.grace_s
    timed = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": announced_s,
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
    path = checked_mount(urlsplit(storage).path if storage.startswith("file:") else storage, "checkpoint.storage")
    if settings.mount and not _lies_under(path, settings.mount):
        raise ConfigError(
            f"checkpoint.storage {path} is not under {settings.mount}, where the claim is mounted",
            hint=f"--mount {path}, or a parent of it",
        )
    return settings.mount or path


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


def _on_the_hub(config: RunConfig) -> bool:
    """Whether the model or the tokenizer is named as one of the hub's may be."""
    tokenizer = config.model.tokenizer.path if config.model.tokenizer else None
    return any(name and not _unless_hub_id(name) for name in (config.model.path, tokenizer))


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
