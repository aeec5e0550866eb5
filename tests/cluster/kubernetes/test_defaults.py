"""Defaults of a rendered run: settings that let it survive lost nodes, and that restrict its pods."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.kubernetes.render import SPOT, render, to_yaml
from outlast.cluster.kubernetes.settings import K8sSettings, k8s_settings
from tests.support.kubernetes.manifests import RELEASE, ROOT, RUNS, Read, mounts, pods, read_run, rendered, variables


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return partial(read_run, tmp_path)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, read: Read) -> tuple[RunConfig, dict[str, Any], K8sSettings]:
    storage, sections, options = RUNS[request.param]
    return (*read(storage, **sections), k8s_settings(**RELEASE, **options))


RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def test_every_container_is_restricted(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    job = render(*run)[-1]
    options = job["spec"]["rayClusterSpec"].get("autoscalerOptions", {"securityContext": RESTRICTED})
    assert options["securityContext"] == RESTRICTED
    for role, pod in pods(job).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, role
        assert {"hostNetwork", "hostPID", "hostIPC", "initContainers"}.isdisjoint(spec), role
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), role
        for container in spec["containers"]:
            assert container["securityContext"] == RESTRICTED, role


def test_reliability_defaults(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    config, _, settings = run
    job = render(*run)[-1]
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == settings.backoff_limit >= 10
    assert spec["entrypoint"] == "exec python -m outlast.cluster.cli train /etc/outlast/run.yaml --take-over"
    assert "gcsFaultToleranceOptions" not in cluster
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["maxReplicas"] for group in cluster["workerGroupSpecs"]} == {config.scale.max_workers}
    scales = config.scale.is_elastic or settings.fallback
    assert cluster.get("enableInTreeAutoscaling", False) == scales
    for group in cluster["workerGroupSpecs"]:
        fewest = 0 if settings.fallback else config.scale.min_workers
        assert group["replicas"] == group["minReplicas"] == fewest
    templates = pods(job)
    for role, pod in templates.items():
        assert variables(pod)["RAY_AUTH_MODE"] == "token"
        lost = {
            item["key"]: item["tolerationSeconds"] for item in pod["spec"]["tolerations"] if "tolerationSeconds" in item
        }
        assert lost == {"node.kubernetes.io/unreachable": 30, "node.kubernetes.io/not-ready": 30}
        assert pod["metadata"]["labels"] == {"outlast/run": config.name}, role
    for role in sorted(templates.keys() - {"submitter"}):
        grace, drain = templates[role]["spec"]["terminationGracePeriodSeconds"], "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        assert grace == settings.grace_s
        assert float(variables(templates[role])[drain]) == grace - 5
        [shm] = [volume for volume in templates[role]["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": settings.shm}
    assert 0 < float(variables(templates["head"])["RAY_JOB_STOP_WAIT_TIME_S"]) < settings.grace_s
    assert sum(name.startswith("RAY_health_check_") for name in variables(templates["head"])) == 4


def test_defaults_of_grace_and_drain(read: Read) -> None:
    head = pods(render(*read("/data/runs"), k8s_settings(**RELEASE))[-1])["head"]
    assert head["spec"]["terminationGracePeriodSeconds"] == 120
    assert variables(head)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "115"
    assert variables(head)["RAY_JOB_STOP_WAIT_TIME_S"] == "100"


def test_a_short_notice_is_announced_to_ray_for_workers(read: Read) -> None:
    """The kubelet of a spot node does not wait for the grace period; the head is never on one."""
    found = pods(render(*read("/data/runs"), k8s_settings(**RELEASE, notice_s=12))[-1])
    timeouts = {role: variables(found[role])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] for role in ("head", "worker")}
    assert timeouts == {"head": "115", "worker": "12"}
    assert found["worker"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_workers_get_the_resources_of_scale(read: Read) -> None:
    scale = {"workers": 3, "gpus_per_worker": 2, "cpus_per_worker": 12}
    worker = pods(render(*read("/data/runs", scale=scale), k8s_settings(**RELEASE, worker_memory="64Gi"))[-1])["worker"]
    assert worker["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "12", "memory": "64Gi"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
    }
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["spec"]["tolerations"]
    plain = pods(render(*read("/data/runs"), k8s_settings(**RELEASE))[-1])["worker"]
    assert plain["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "4"
    assert "nvidia" not in str(plain)


def test_head_and_workers_go_to_nodes_of_their_own(read: Read) -> None:
    settings = k8s_settings(
        **RELEASE, head_nodes=["spot=no"], worker_nodes=["spot=yes"], worker_taints=["spot=yes:NoSchedule", "slow"]
    )
    found = pods(render(*read("/data/runs"), settings)[-1])
    selectors = {role: pod["spec"]["nodeSelector"] for role, pod in found.items()}
    assert selectors == {"submitter": {"spot": "no"}, "head": {"spot": "no"}, "worker": {"spot": "yes"}}
    assert found["worker"]["spec"]["tolerations"][4:] == [
        {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
        {"key": "slow", "operator": "Exists"},
    ]
    assert len(found["head"]["spec"]["tolerations"]) == 2


def spot_terms(pod: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """Return the node terms of a pod's affinity: alternatives, each a list of (key, operator)."""
    node = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [
        [(item["key"], item["operator"]) for item in term["matchExpressions"]] for term in node["nodeSelectorTerms"]
    ]


def test_the_head_is_never_on_spot_nodes_and_workers_are_if_asked(read: Read) -> None:
    never, only = [[(key, "NotIn") for key in SPOT]], [[(key, "In")] for key in SPOT]
    plain = pods(render(*read("/data/runs"), k8s_settings(**RELEASE))[-1])
    assert spot_terms(plain["head"]) == spot_terms(plain["submitter"]) == never
    assert "affinity" not in plain["worker"]["spec"]
    spot = pods(render(*read("/data/runs"), k8s_settings(**RELEASE, spot=True))[-1])
    assert spot_terms(spot["head"]) == never
    assert spot_terms(spot["worker"]) == only
    tolerated = {item["key"] for item in spot["worker"]["spec"]["tolerations"]}
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} < tolerated


def test_karpenter_leaves_the_head_alone_and_evicts_workers(read: Read) -> None:
    """It does not evict a pod with this annotation from a reclaimed spot node: no SIGTERM, no save."""
    found = pods(render(*read("/data/runs"), k8s_settings(**RELEASE, spot=True))[-1])
    keeps = {role for role, pod in found.items() if "karpenter.sh/do-not-disrupt" in str(pod["metadata"])}
    assert keeps == {"head"}


def test_spot_nodes_first_then_others(read: Read) -> None:
    settings = k8s_settings(**RELEASE, spot=True, fallback=True, fallback_after_s=120)
    job = render(*read("/data/runs", scale={"workers": 4}), settings)[-1]
    cluster = job["spec"]["rayClusterSpec"]
    spot, other = cluster["workerGroupSpecs"]
    assert (spot["groupName"], other["groupName"]) == ("spot", "on-demand")
    assert spot["priority"] > other["priority"]
    assert spot_terms(spot["template"]) == [[(key, "In")] for key in SPOT]
    assert spot_terms(other["template"]) == [[(key, "NotIn") for key in SPOT]]
    # KubeRay submits once all requested pods run, and either group may wait for ever.
    assert [group["replicas"] for group in (spot, other)] == [0, 0]
    assert variables(pods(job)["head"])["OUTLAST_WAIT_FOR_NODES_S"] == "3600"
    [timeout] = cluster["autoscalerOptions"]["env"]
    assert timeout == {"name": "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", "value": "120"}


def test_only_the_autoscaler_may_reach_the_api_server(read: Read) -> None:
    elastic = render(*read("/data/runs", scale={"workers": [2, 8]}), k8s_settings(**RELEASE))[-1]
    cluster = elastic["spec"]["rayClusterSpec"]
    [volume] = [item for item in pods(elastic)["head"]["spec"]["volumes"] if "projected" in item]
    mount, own = cluster["autoscalerOptions"]["volumeMounts"]
    assert own == {"name": "tmp", "mountPath": "/tmp"}
    assert mount["name"] == volume["name"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert volume["name"] not in mounts(pods(elastic)["head"])
    [group] = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 8)
    fixed = render(*read("/data/runs"), k8s_settings(**RELEASE))[-1]
    assert "autoscalerOptions" not in fixed["spec"]["rayClusterSpec"]
    assert "projected" not in str(fixed)
    assert "OUTLAST_WAIT_FOR_NODES_S" not in str(fixed)


@pytest.mark.parametrize(
    ("storage", "sections", "options", "ports"),
    [
        ("/data/runs", {"model": {"path": "/data/m"}, "data": {"train": "/data/t.jsonl"}}, {}, []),
        ("/data/runs", {"data": {"train": "/data/t.jsonl"}}, {}, [443]),
        ("/data/runs", {"model": {"path": "/data/m"}, "track": {"to": ["wandb"]}}, {}, [443]),
        ("s3://bucket/runs", {}, {"egress_ports": [9000]}, [443, 9000]),
        ("/data/runs", {"scale": {"workers": [1, 2]}}, {}, [443, 6443]),
    ],
)
def test_pods_reach_what_the_run_needs(
    read: Read, storage: str, sections: dict[str, Any], options: dict[str, Any], ports: list[int]
) -> None:
    settings = k8s_settings(**RELEASE, **options)
    [policy] = [item for item in render(*read(storage, **sections), settings) if item["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {"matchLabels": {"outlast/run": "my-run"}}
    between_pods, dns, *others = policy["spec"]["egress"]
    assert between_pods == {"to": [{"podSelector": {"matchLabels": {"outlast/run": "my-run"}}}]}
    assert {row["port"] for row in dns["ports"]} == {53, 5353}
    assert all(rule.keys() <= {"namespaceSelector", "ipBlock"} and rule for rule in dns["to"])
    assert [row["port"] for rule in others for row in rule["ports"]] == ports


def test_a_cloud_role_needs_its_metadata_server(read: Read) -> None:
    objects = render(*read("s3://bucket/runs"), k8s_settings(**RELEASE, service_account="with-a-role"))
    assert objects[1]["spec"]["egress"][-1]["to"] == [{"ipBlock": {"cidr": "169.254.0.0/16"}}]


def test_everything_of_a_run_has_its_label(read: Read) -> None:
    objects = render(*read("/data/runs", name="My_Run.v2"), k8s_settings(**RELEASE, spot=True, fallback=True))
    assert {item["metadata"]["labels"]["outlast/run"] for item in objects} == {"My_Run.v2"}
    text = to_yaml(objects)
    assert text.count("outlast/run: my-run") == 0
    assert (
        text.count("outlast/run: My_Run.v2") == 2 * len(objects) + 4 + 2 + 4
    )  # annotations, pods, spread, policies' selectors


def test_queues_and_labels_are_passed_on(read: Read) -> None:
    settings = k8s_settings(**RELEASE, queue="research", labels=["volcano.sh/queue-name=q", "team=nlp"])
    labels = render(*read("/data/runs"), settings)[-1]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "research"
    assert (labels["volcano.sh/queue-name"], labels["team"]) == ("q", "nlp")


#: Fields that need no reason, or have one under another name.
_PLAIN = {"containers", "volumes", "serviceAccountName", "securityContext", "restartPolicy"}


def test_readme_explains_every_default() -> None:
    text = (ROOT / "k8s" / "README.md").read_text()
    job = yaml.safe_load((ROOT / "k8s" / "rayjob.yaml").read_text())
    names = {*job["spec"]} - {"rayClusterSpec", "entrypoint", "submitterPodTemplate"}
    names |= {*job["spec"]["rayClusterSpec"]} - {"headGroupSpec", "workerGroupSpecs", "rayVersion"}
    for pod in pods(job).values():
        names |= {*pod["spec"], *pod["metadata"].get("annotations", {})} - _PLAIN
        names |= {name for name in variables(pod) if not name.startswith("RAY_health_check_")}
    assert [name for name in sorted(names) if name not in text] == []


GOLDEN = ROOT / "tests" / "golden" / "manifests"
REPRESENTATIVE = ("claim", "object store", "gpus", "elastic", "spot, then others", "queued")


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_golden_files(tmp_path: Path, name: str) -> None:
    """Rendered objects, complete for review. `OUTLAST_GOLDEN=write` rewrites the files."""
    path = GOLDEN / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
    text = to_yaml(rendered(tmp_path, name))
    if os.environ.get("OUTLAST_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"worker_memory": "16GB"}, "--worker-memory: '16GB' is not a Kubernetes quantity such as 16Gi"),
        ({"worker_memory": "0"}, "--worker-memory: '0' is not a Kubernetes quantity"),
        ({"egress_ports": [443, 99999]}, "--egress-port: "),
        ({"worker_taints": ["a b"]}, "--worker-taint: 'a b' is not a taint"),
        ({"name": "My_Run"}, "--name: not a name: use lower-case letters, digits and dashes, at most 47"),
        ({"secret": "AWS_SECRET_ACCESS_KEY=abc"}, "--secret: not a name: use lower-case letters"),
    ],
)
def test_errors_name_the_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        k8s_settings(image="outlast:1", **given)
    assert message in caught.value.message
    assert "abc" not in caught.value.message
