"""Kubernetes manifests of a run: a RayJob for KubeRay, and what it needs.

The templates in `k8s/` are plain YAML with the defaults; functions here set what depends on the run. They are pure, and
import neither torch nor ray. They must never write a secret: the run file is copied as written, `${env:…}` unexpanded,
and secrets are named, not read. Only the run's name and its storage's mount path are expanded from the environment.
"""

import copy
import json
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.location import ENV_VARIABLE
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_reference import RESUME_VARIABLE
from outlast.cluster.kubernetes.accessors import mapping
from outlast.cluster.kubernetes.egress import egress_ports, egress_warnings
from outlast.cluster.kubernetes.ownership import RUN_LABEL, RunIdentity, identity_of
from outlast.cluster.kubernetes.pod_paths import is_under, mount_path, pod_path
from outlast.cluster.kubernetes.settings import DRAIN_BEFORE_GRACE_S, LABEL, MAX_CRON_NAME, MAX_NAME, K8sSettings
from outlast.cluster.kubernetes.variants import scheduled, set_deletion, set_elastic_queue, set_submission

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: Labels of spot nodes, by cloud: key and value. Each cloud sets only its own.
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}

_STOP_BEFORE_GRACE_S = 20
_ALLOCATE_VARIABLE = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"


def render(config: RunConfig, declared: Mapping[str, Any], settings: K8sSettings) -> list[dict[str, Any]]:
    """Return every object that the run needs, in the order to create them.

    Args:
        config: The settings, as `load_run` returns them: paths are those in the pods, so they are not resolved here.
        declared: The settings as written, `${env:…}` unexpanded. They go into the ConfigMap, with a worker's CPUs set
            to all that its pod has, or Ray would put several workers into one pod.
        settings: The settings of the Kubernetes cluster.

    Raises:
        ConfigError: The run cannot run on Kubernetes with these settings.
    """
    name = job_name(config.name, settings)
    mount = mount_path(config, settings)
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
    run = declared_identity(config, declared)
    for item in objects:
        meta = item["metadata"]
        meta["annotations"] = {**meta.get("annotations", {}), **run.annotations}
        meta["name"] = claim if item["kind"] == "PersistentVolumeClaim" else name
        if settings.namespace:
            meta["namespace"] = settings.namespace
    _set_run_label(objects, config.name)
    return objects


def declared_identity(config: RunConfig, declared: Mapping[str, Any]) -> RunIdentity:
    """Return the identity of a run file's run, which its objects are annotated with."""
    return identity_of(config.name, str(mapping(declared, "checkpoint").get("storage", config.checkpoint.storage)))


def warnings_for(
    config: RunConfig, declared: Mapping[str, Any], settings: K8sSettings, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Return warnings on what may be wrong and cannot be checked from here, one sentence each.

    `environment` is that of this process: the pods' may name the same servers.
    """
    mount, warnings = mount_path(config, settings), []
    if "image" not in settings.model_fields_set:
        warnings.append(
            f"image {settings.image} is the local tag that k8s/README.md builds; for one in a registry: --image IMAGE"
        )
    paths = {key: pod_path(key, location) for key, location in config.places.items()}
    for key, path in paths.items():
        if key != "checkpoint.storage" and path and not is_under(path, mount):
            remedy = f"put it under {mount}" if mount else "mount a claim (--claim NAME --mount PATH)"
            warnings.append(f"{key}: no volume provides {path} in the pods; {remedy}, or include it in the image")
    names = sorted(set(ENV_VARIABLE.findall(json.dumps(dict(declared), default=str))))
    if names and settings.secret is None:
        warnings.append(f"the run file uses {', '.join(names)}: name a secret with these keys (--secret NAME)")
    if paths["checkpoint.storage"] is None and settings.secret is None and settings.service_account is None:
        warnings.append("object storage without --secret NAME or --service-account NAME: the pods have no access to it")
    warnings += egress_warnings(config, settings, environment or {}, autoscales=_autoscales(config, settings))
    if mount and settings.claim is None:
        claim = f"{job_name(config.name, settings)}-storage"
        warnings.append(f"claim {claim} holds the checkpoints: `kubectl delete -f` on these objects deletes them too")
    return warnings


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """Return one YAML stream that kubectl and PyYAML read alike."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, explicit_start=len(objects) > 1, sort_keys=False, allow_unicode=True, width=120
    )


def job_name(run: str, settings: K8sSettings) -> str:
    """Return the RayJob's name: the given one, or one made from the run's name. Raises ConfigError if that fails."""
    longest = MAX_CRON_NAME if settings.schedule else MAX_NAME
    name = settings.name or re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if len(name) > longest:
        kind = "RayCronJob" if settings.schedule else "RayJob"
        raise ConfigError(
            f"name {name!r} has {len(name)} characters; a {kind}'s name has at most {longest}",
            hint="give a shorter name for Kubernetes only: --name NAME",
        )
    if not re.fullmatch(LABEL, name):
        raise ConfigError(
            f"run name {run!r} cannot be a RayJob's name, which must begin with a letter",
            hint=f"give another name for Kubernetes only: --name run-{name}",
        )
    return name


def _config_map(declared: Mapping[str, Any], cpus: int) -> dict[str, Any]:
    body = _template("configmap")
    run = {**declared, "scale": {**(declared.get("scale") or {}), "cpus_per_worker": cpus}}
    body["data"] = {"run.yaml": yaml.safe_dump(run, sort_keys=False, allow_unicode=True)}
    return body


def _worker_cpus(config: RunConfig, settings: K8sSettings) -> int:
    cpus = config.scale.cpus_per_worker
    return settings.worker_cpus if cpus is None else _whole_number("cpus_per_worker", cpus)


def _volume_claim(settings: K8sSettings) -> dict[str, Any]:
    body = _template("pvc")
    body["spec"]["resources"]["requests"]["storage"] = settings.claim_size
    if settings.storage_class:
        body["spec"]["storageClassName"] = settings.storage_class
    return body


def _network_policy(config: RunConfig, settings: K8sSettings) -> dict[str, Any]:
    """Allow egress on the ports that the run file needs."""
    body = _template("networkpolicy")
    if settings.operator_namespace:
        [of_operator] = body["spec"]["ingress"][1]["from"]
        of_operator["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}}
    if ports := egress_ports(config, settings, autoscales=_autoscales(config, settings)):
        body["spec"]["egress"].append({"ports": [{"protocol": "TCP", "port": port} for port in sorted(ports)]})
    if settings.service_account:  # the metadata server, which gives a cloud role its credentials
        metadata = {"ipBlock": {"cidr": "169.254.0.0/16"}}
        metadata_ports = [{"protocol": "TCP", "port": port} for port in (80, 988)]
        body["spec"]["egress"].append({"to": [metadata], "ports": metadata_ports})
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
        _set_node_placement(pod["spec"], settings.head_nodes, ())
    gpus = _whole_number("gpus_per_worker", config.scale.gpus_per_worker)
    gpu_taint = ("nvidia.com/gpu:NoSchedule",) if gpus else ()
    _set_node_placement(worker["spec"], settings.worker_nodes, (*settings.worker_taints, *gpu_taint))
    _set_resources(head["spec"], settings.head_cpus, settings.head_memory, 0)
    _set_resources(worker["spec"], _worker_cpus(config, settings), settings.worker_memory, gpus)
    head["spec"]["volumes"][0]["configMap"]["name"] = name
    head["spec"]["containers"][0]["env"].append(
        {"name": RESUME_VARIABLE, "value": shlex.join(["outlast", "k8s", "resume", config.name])}
    )
    for pod, announced_s in ((head, settings.grace_s - DRAIN_BEFORE_GRACE_S), (worker, settings.announced_s)):
        _configure_ray_pod(pod["spec"], settings, claim, mount, announced_s)
    cluster["workerGroupSpecs"] = _worker_groups(group, config, settings)
    if not _autoscales(config, settings):
        _remove_autoscaler(cluster, head["spec"])
    else:
        _set_variables(cluster["autoscalerOptions"], {_ALLOCATE_VARIABLE: settings.fallback_after_s})
    set_submission(spec, settings)
    set_deletion(spec, settings, autoscales=_autoscales(config, settings))
    set_elastic_queue(job, settings, autoscales=_autoscales(config, settings))
    return scheduled(job, settings)


def _autoscales(config: RunConfig, settings: K8sSettings) -> bool:
    """Return whether Ray's autoscaler sets the number of pods. Raises ConfigError if so in a Kueue queue."""
    autoscales = config.scale.is_elastic or settings.fallback
    if autoscales and settings.queue and not settings.elastic_queue:
        raise ConfigError(
            "Kueue admits only RayJobs with a fixed number of pods",
            hint="give scale.workers as one number and omit --fallback, or omit --queue, or add --elastic-queue",
        )
    return autoscales


def _worker_groups(group: dict[str, Any], config: RunConfig, settings: K8sSettings) -> list[dict[str, Any]]:
    """Return the worker groups. KubeRay submits the job once all `replicas` pods run, so a group that scales starts at
    its minimum; of two groups that are alternatives each starts at 0."""
    scale = config.scale
    group.update(replicas=scale.min_workers, minReplicas=scale.min_workers, maxReplicas=scale.max_workers)
    if settings.spot:
        group["template"]["spec"]["affinity"] = _node_affinity("In")
    if not settings.fallback:
        return [group]
    on_demand = copy.deepcopy(group)
    on_demand["template"]["spec"]["affinity"] = _node_affinity("NotIn")
    for item, name, priority in ((group, "spot", 10), (on_demand, "on-demand", 0)):
        item.update(groupName=name, replicas=0, minReplicas=0, maxReplicas=scale.max_workers, priority=priority)
    return [group, on_demand]


def _node_affinity(operator: str) -> dict[str, Any]:
    """Return an affinity to spot nodes only (In), or to others (NotIn). Terms are alternatives, so In has one for each
    cloud; all expressions of a term must hold, so NotIn has one term for all clouds."""
    rules = [{"key": key, "operator": operator, "values": [value]} for key, value in SPOT.items()]
    terms = [{"matchExpressions": [rule]} for rule in rules] if operator == "In" else [{"matchExpressions": rules}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _remove_autoscaler(cluster: dict[str, Any], head: dict[str, Any]) -> None:
    """Remove the autoscaler and its access to the API server."""
    del cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "api"]
    container = head["containers"][0]
    container["env"] = [item for item in container["env"] if item["name"] != "OUTLAST_WAIT_FOR_NODES_S"]


def _set_run_label(value: Any, run: str) -> None:
    """Set the run's label wherever a template has it: on objects, pods and selectors."""
    if isinstance(value, dict):
        if RUN_LABEL in value:
            value[RUN_LABEL] = run
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        _set_run_label(item, run)


def _set_node_placement(pod: dict[str, Any], nodes: Mapping[str, str], taints: tuple[str, ...]) -> None:
    if nodes:
        pod["nodeSelector"] = dict(nodes)
    for taint in taints:
        key_value, _, effect = taint.partition(":")
        key, equals, value = key_value.partition("=")
        matches = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
        pod["tolerations"].append({"key": key, **matches, **({"effect": effect} if effect else {})})


def _set_resources(pod: dict[str, Any], cpus: int, memory: str, gpus: int) -> None:
    pod["containers"][0]["resources"] = {
        "requests": {"cpu": str(cpus), "memory": memory},
        "limits": {"memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
    }


def _configure_ray_pod(
    pod: dict[str, Any], settings: K8sSettings, claim: str, mount: str | None, announced_s: int
) -> None:
    container = pod["containers"][0]
    pod["terminationGracePeriodSeconds"] = settings.grace_s
    stop_wait_s = settings.grace_s - _STOP_BEFORE_GRACE_S
    timeouts = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": announced_s, "RAY_JOB_STOP_WAIT_TIME_S": stop_wait_s}
    _set_variables(container, timeouts)
    [shm] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    shm["emptyDir"]["sizeLimit"] = settings.shm
    if settings.secret:
        container["envFrom"] = [{"secretRef": {"name": settings.secret}}]
    if mount:
        container["volumeMounts"].append({"name": "storage", "mountPath": mount})
        pod["volumes"].append({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})


def _set_variables(container: dict[str, Any], values: Mapping[str, int]) -> None:
    for variable in container["env"]:
        if variable["name"] in values:
            variable["value"] = str(values[variable["name"]])


def _whole_number(key: str, value: float) -> int:
    if value != int(value):
        raise ConfigError(
            f"scale.{key} is {value:g}, but a worker's pod on Kubernetes has whole CPUs and GPUs",
            hint=f"set scale.{key} to a whole number",
        )
    return int(value)


def _template(name: str) -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load((files("outlast.k8s") / f"{name}.yaml").read_text(encoding="utf-8"))
    return body


class _Dumper(yaml.SafeDumper):
    """Dumps text of several lines as blocks, without aliases, and quotes what YAML 1.2 or Go would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else '"' if re.match(r"[-+.]?\d|[yYnN]$", value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
