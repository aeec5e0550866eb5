"""What KubeRay 1.7's operator refuses in a RayJob although its CRD allows it: the rules of its `validation.go`.

The API server accepts such an object, and the operator only writes `ValidationFailed` into its status, which is easily
overlooked. Groups that it cannot create pods for belong here too. Pure; no rule trusts the shape of what it reads.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from outlast.cluster.kubernetes.accessors import (
    CLUSTER,
    LintComplaint,
    autoscales,
    env_variables,
    first_container,
    mapping,
    mappings,
    pod_templates,
    worker_groups,
)
from outlast.cluster.kubernetes.settings import LABEL, MAX_NAME

#: The release of KubeRay whose rules these are.
KUBERAY = "1.7"
SUBMISSION_MODES = ("K8sJobMode", "SidecarMode", "HTTPMode", "InteractiveMode")
#: Fields of a RayCluster that need a feature gate of the operator, which is off by default.
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_GATE = "the operator's feature gate {}, which is off by default"
_GENERATED = 5  # characters that the API server adds to generateName
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_TOKEN_SINCE = (2, 52, 0)
_PRIORITY_SINCE = (2, 56, 0)


def operator_complaints(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield every finding; the operator reports only the first."""
    spec = mapping(job, "spec")
    cluster = mapping(spec, "rayClusterSpec")
    meta = mapping(job, "metadata")
    name = str(meta.get("name") or f"{meta.get('generateName')}{'x' * _GENERATED}")
    if not re.fullmatch(LABEL, name) or len(name) > MAX_NAME:
        yield "metadata.name", f"{name!r} is not a DNS-1035 label of at most {MAX_NAME} characters"
    yield from _lifetime(spec)
    yield from _submission(spec, cluster)
    yield from _deletion(spec, cluster)
    if cluster:
        for where, text in _cluster(cluster, mapping(job, "metadata", "annotations")):
            yield f"{CLUSTER}.{where}", text
    yield from _invalid_groups(job)


def _invalid_groups(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield groups that the operator accepts but cannot create pods for, or cannot distinguish."""
    for role, pod in pod_templates(job):
        for key in ("initContainers", "containers"):
            for container in mappings(mapping(pod, "spec"), key):
                if not container.get("image"):
                    yield role, f"container {container.get('name')} has no image, so no pod can be created"
    names = Counter(str(group["groupName"]) for _, group in worker_groups(job) if group.get("groupName"))
    for name in (name for name, count in names.items() if count > 1):
        yield f"{CLUSTER}.workerGroupSpecs", f"several groups are named {name}, but KubeRay counts pods by group name"


def _lifetime(spec: Mapping[str, Any]) -> Iterator[LintComplaint]:
    shuts_down = spec.get("shutdownAfterJobFinishes") is True
    if spec.get("suspend") and not shuts_down:
        yield "spec.suspend", "is allowed only with shutdownAfterJobFinishes: true"
    if not shuts_down and _number(spec.get("ttlSecondsAfterFinished")) > 0:
        yield "spec.ttlSecondsAfterFinished", "is allowed only with shutdownAfterJobFinishes: true"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if key in spec and _number(spec[key]) <= 0:
            yield f"spec.{key}", "must be positive"
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        if _number(spec.get(key)) < 0:
            yield f"spec.{key}", "must not be negative"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML") or "")
    except (yaml.YAMLError, AttributeError):
        yield "spec.runtimeEnvYAML", "is not YAML"


def _submission(spec: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    mode, selector = spec.get("submissionMode", "K8sJobMode"), mapping(spec, "clusterSelector")
    retries = _number(spec.get("backoffLimit")) > 0
    if mode not in SUBMISSION_MODES:
        yield "spec.submissionMode", f"{mode!r} is not one of {', '.join(SUBMISSION_MODES)}"
    if not cluster and not selector:
        yield "spec.rayClusterSpec", "is missing, and so is clusterSelector"
    if selector and not selector.get("ray.io/cluster"):
        yield "spec.clusterSelector", "has no ray.io/cluster"
    if selector and (retries or spec.get("suspend")):
        yield "spec.clusterSelector", "excludes backoffLimit and suspend"
    if mode == "InteractiveMode" and retries:
        yield "spec.backoffLimit", "must be 0 in InteractiveMode"
    if mode == "SidecarMode":
        if excluded := [key for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector") if key in spec]:
            yield "spec.submissionMode", f"SidecarMode excludes {', '.join(excluded)}"
        if mapping(cluster, "headGroupSpec", "template", "spec").get("restartPolicy", "Never") != "Never":
            yield "spec.rayClusterSpec.headGroupSpec", "restartPolicy must be Never or unset in SidecarMode"
    submitter = mapping(spec, "submitterPodTemplate", "spec")
    if submitter and submitter.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "spec.submitterPodTemplate", "restartPolicy must be Never or OnFailure, because a Job runs the pod"
    if mapping(cluster, "authOptions").get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions", "enableK8sTokenAuth is not allowed in a RayJob"


def _deletion(spec: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if "deletionStrategy" not in spec:
        return
    strategy = mapping(spec, "deletionStrategy")
    rules, where = mappings(strategy, "deletionRules"), "spec.deletionStrategy"
    policies = [mapping(strategy, key).get("policy") for key in ("onSuccess", "onFailure")]
    shuts_down = spec.get("shutdownAfterJobFinishes") is True
    if rules and (shuts_down or "onSuccess" in strategy or "onFailure" in strategy):
        yield where, "deletionRules exclude shutdownAfterJobFinishes, onSuccess and onFailure"
    if not rules and None in policies:
        yield where, "give deletionRules, or both onSuccess.policy and onFailure.policy"
    if shuts_down and "DeleteNone" in policies:
        yield where, "DeleteNone contradicts shutdownAfterJobFinishes: true"
    if autoscales(cluster) and "DeleteWorkers" in (*policies, *(rule.get("policy") for rule in rules)):
        yield where, "DeleteWorkers is not allowed with the autoscaler"
    times: dict[tuple[str, str], dict[str, int]] = {}
    for number, rule in enumerate(rules):
        condition = mapping(rule, "condition")
        if len(condition.keys() & {"jobStatus", "jobDeploymentStatus"}) != 1:
            yield f"{where}.deletionRules[{number}]", "needs either jobStatus or jobDeploymentStatus"
            continue
        status = f"{condition.get('jobStatus', '')}", f"{condition.get('jobDeploymentStatus', '')}"
        seconds = times.setdefault(status, {})
        policy = str(rule.get("policy"))
        if policy in seconds:
            yield f"{where}.deletionRules[{number}]", f"a second rule of {policy} for the same status"
        seconds[policy] = _number(condition.get("ttlSeconds"))
    for status, seconds in times.items():
        waits = [seconds[policy] for policy in _DELETION_ORDER if policy in seconds]
        if waits != sorted(waits):
            yield where, f"for {status[0] or status[1]}, ttlSeconds must not decrease from workers to cluster to RayJob"


def _cluster(cluster: Mapping[str, Any], annotations: Mapping[str, Any]) -> Iterator[LintComplaint]:
    head = mapping(cluster, "headGroupSpec")
    if not first_container(head):
        yield "headGroupSpec", "has no container"
    yield from _group_resources("headGroupSpec", head)
    for number, group in enumerate(mappings(cluster, "workerGroupSpecs")):
        yield from _worker_group(f"workerGroupSpecs[{number}]", group, cluster)
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy", "is not allowed in a RayJob's cluster"
    for key, gate in GATED.items():
        if key in cluster:
            yield key, f"needs {_GATE.format(gate)}"
    yield from _tables(cluster, annotations)
    yield from _autoscaler(cluster)
    if mapping(cluster, "authOptions").get("mode") == "token" and _release(cluster) < _TOKEN_SINCE:
        yield "authOptions", f"token needs rayVersion 2.52.0 or newer (it is {cluster.get('rayVersion')!r})"


def _group_resources(where: str, group: Mapping[str, Any]) -> Iterator[LintComplaint]:
    parameters = mapping(group, "rayStartParams")
    if mapping(group, "resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield where, "sets its resources twice, in rayStartParams and in resources"
    if "labels" in parameters:
        yield where, "rayStartParams must not set labels; set the group's labels"


def _worker_group(where: str, group: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    if not first_container(group):
        yield where, "has no container"
    low, high = group.get("minReplicas"), group.get("maxReplicas")  # the CRD's defaults: none, and no limit
    if _number(low) < 0 or (high is not None and _number(high) < _number(low)):
        yield where, f"needs 0 <= minReplicas ({low or 0}) <= maxReplicas ({high})"
    yield from _group_resources(where, group)
    is_v2 = _is_v2(cluster)
    if "idleTimeoutSeconds" in group and not (is_v2 and _number(group["idleTimeoutSeconds"]) >= 0):
        yield where, "idleTimeoutSeconds needs autoscaler v2, and must not be negative"
    if _number(group.get("priority")) and not (is_v2 and _release(cluster) >= _PRIORITY_SINCE):
        yield where, "priority needs autoscaler v2, and rayVersion 2.56.0 or newer"
    if group.get("suspend") and autoscales(cluster):
        yield where, "suspend is not allowed with the autoscaler"


def _tables(cluster: Mapping[str, Any], annotations: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield findings on GCS fault tolerance."""
    options, head = mapping(cluster, "gcsFaultToleranceOptions"), mapping(cluster, "headGroupSpec")
    named = env_variables(first_container(head))
    is_on = "gcsFaultToleranceOptions" in cluster
    if is_on and annotations.get("ray.io/ft-enabled"):
        yield "gcsFaultToleranceOptions", "is also set by the annotation ray.io/ft-enabled; remove one"
    if not is_on and annotations.get("ray.io/ft-enabled") != "true" and "RAY_REDIS_ADDRESS" in named:
        yield "headGroupSpec", "RAY_REDIS_ADDRESS enables fault tolerance; set gcsFaultToleranceOptions instead"
    owned = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & named.keys() if is_on else set()
    if owned or (is_on and mapping(head, "rayStartParams").get("redis-password")):
        yield "headGroupSpec", "set Redis' address and password in gcsFaultToleranceOptions only"
    if "REDIS_USERNAME" in named or mapping(head, "rayStartParams").get("redis-username"):
        yield "headGroupSpec", "set Redis' user in gcsFaultToleranceOptions.redisUsername"
    if options.get("backend") == "rocksdb":
        gate = "GCSFaultToleranceEmbeddedStorage"
        yield "gcsFaultToleranceOptions", f"rocksdb needs {_GATE.format(gate)}"


def _autoscaler(cluster: Mapping[str, Any]) -> Iterator[LintComplaint]:
    head, options = mapping(cluster, "headGroupSpec"), mapping(cluster, "autoscalerOptions")
    version_variable = env_variables(first_container(head)).get(_AUTOSCALER_V2)
    if not autoscales(cluster) and version_variable in ("1", "true"):
        yield "headGroupSpec", f"{_AUTOSCALER_V2} needs enableInTreeAutoscaling: true"
    if autoscales(cluster) and "version" in options and version_variable is not None:
        yield "autoscalerOptions.version", f"is also set by {_AUTOSCALER_V2}; remove that variable"
    if autoscales(cluster) and options.get("version") == "v2":
        groups = mappings(cluster, "workerGroupSpecs")
        for where, group in (("headGroupSpec", head), *(("workerGroupSpecs", group) for group in groups)):
            if mapping(group, "template", "spec").get("restartPolicy", "Never") != "Never":
                yield where, "restartPolicy must be Never or unset with autoscaler v2"
    if _number(options.get("idleTimeoutSeconds")) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds", "must not be negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in env_variables(options):
        yield "autoscalerOptions.env", "KUBERAY_GEN_AUTOSCALER_START_CMD is reserved for the operator"


def _is_v2(cluster: Mapping[str, Any]) -> bool:
    named = env_variables(first_container(mapping(cluster, "headGroupSpec")))
    return mapping(cluster, "autoscalerOptions").get("version") == "v2" or named.get(_AUTOSCALER_V2) in ("1", "true")


def _release(cluster: Mapping[str, Any]) -> tuple[int, ...]:
    """Return rayVersion as numbers; (0,) if it is missing or not a version."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(cluster.get("rayVersion") or ""))
    return tuple(int(part or 0) for part in match.groups()) if match else (0,)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
