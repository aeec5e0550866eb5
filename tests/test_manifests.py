"""Manifests against KubeRay's CRDs and Kubernetes' own schemas, and what the schemas cannot say."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import kubernetes_validate
import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config import RunConfig, load_run
from outlast.cluster.manifests import (
    K8sSettings,
    cautions,
    job_name,
    k8s_settings,
    operator_findings,
    render,
    to_yaml,
)

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("OUTLAST_SHARED", ROOT.parent / "shared"))
CRDS, TOOL = SHARED / "kuberay-crds", SHARED / "tools" / "validate_crd.py"
KUBERNETES = ("1.29", "1.34")
RELEASE = {"image": "registry.example/outlast:1", "ray_version": "2.60.0"}

Objects = list[dict[str, Any]]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[RunConfig, dict[str, Any]]]:
    """`read(storage, name=…, **sections)`: writes a run file and loads it as the command line does."""

    def make(storage: str, name: str = "my-run", **sections: Any) -> tuple[RunConfig, dict[str, Any]]:
        body = {
            "name": name,
            "model": {"path": "org/model"},
            "data": {"train": "s3://bucket/train.jsonl"},
            "checkpoint": {"storage": storage},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(body | sections))
        return load_run(str(path))

    return make


RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "claim": ("/data/runs", {}, {}),
    "old claim above the data": ("/data/runs", {}, {"claim": "team", "mount": "/data", "namespace": "ml"}),
    "object store": ("s3://bucket/runs", {}, {"secret": "store"}),
    "object store, data on a claim": ("s3://bucket/runs", {}, {"claim": "team", "mount": "/data", "secret": "store"}),
    "cloud role": ("s3://bucket/runs", {}, {"service_account": "with-a-role"}),
    "gpus": ("/data/runs", {"scale": {"workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 8}}, {}),
    "many, on spot": (
        "file:///data/runs",
        {"scale": {"workers": 512}, "name": "Llama_3.1-SFT." + "x" * 32},
        {
            "worker_nodes": ["cloud.example/spot=true"],
            "head_nodes": ["cloud.example/spot=false"],
            "worker_taints": ["spot=true:NoSchedule", "dedicated:NoExecute", "shared"],
            "storage_class": "nfs",
            "claim_size": "2.5Ti",
            "grace_s": 30,
        },
    ),
    "a name that looks like a number": ("/data/runs", {"name": "1e5"}, {"name": "y"}),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, read: Callable[..., Any]) -> tuple[RunConfig, dict[str, Any], K8sSettings]:
    storage, sections, options = RUNS[request.param]
    return (*read(storage, **sections), k8s_settings(**RELEASE, **options))


def _quickly(file: TextIO) -> Any:
    """The pure Python loader takes half a minute for the CRDs."""
    with file:
        return yaml.load(file, Loader=yaml.CSafeLoader)


@pytest.fixture(scope="module")
def crd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What a strict API server that knows KubeRay's CRDs would say to a stream of objects."""
    if not (CRDS.is_dir() and TOOL.is_file()):
        pytest.skip(f"KubeRay's CRDs are not at {SHARED} (OUTLAST_SHARED says where)")
    spec = importlib.util.spec_from_file_location("validate_crd", TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("crds")  # with one of the four, because reading them all takes seconds
    (folder / "rayjobs.yaml").symlink_to(CRDS / "ray.io_rayjobs.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "safe_load", _quickly)
        known = tool.load_crds(str(folder))

    def check(text: str) -> list[str]:
        found = [tool.validate(body, known) for body in yaml.load_all(text, tool.StrictLoader)]
        assert any(item is not None for item in found), "no Ray resource in it"
        return [line for item in found for line in item or []]

    return check


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of a RayJob by role."""
    cluster = job["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": group["template"],
    }


def variables(pod: dict[str, Any]) -> dict[str, str]:
    [container] = pod["spec"]["containers"]
    return {item["name"]: item["value"] for item in container["env"]}


def mounts(pod: dict[str, Any]) -> dict[str, str]:
    [container] = pod["spec"]["containers"]
    return {item["name"]: item["mountPath"] for item in container.get("volumeMounts", [])}


def check_core(objects: Objects) -> None:
    """Every core object, and every pod that the RayJob describes, against Kubernetes' strict schemas."""
    *core, job = objects
    for role, pod in pods(job).items():
        core.append({"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": role, **pod["metadata"]}})
    for release in KUBERNETES:
        for item in core:
            kubernetes_validate.validate(item, release, strict=True)


def test_objects_satisfy_the_schemas(
    run: tuple[RunConfig, dict[str, Any], K8sSettings], crd: Callable[[str], list[str]]
) -> None:
    text = to_yaml(render(*run))
    assert crd(text) == []
    check_core(list(yaml.safe_load_all(text)))


def test_core_objects_satisfy_the_schemas_without_crds(read: Callable[..., Any]) -> None:
    check_core(render(*read("/data/runs"), k8s_settings(**RELEASE)))


def test_schemas_are_strict(read: Callable[..., Any], crd: Callable[[str], list[str]]) -> None:
    [*_, job] = objects = render(*read("/data/runs"), k8s_settings(**RELEASE))
    job["spec"]["backOffLimit"] = 3
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert [line.split(":")[0] for line in crd(to_yaml(objects))] == [
        ".spec",
        ".spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus",
    ]
    pods(job)["head"]["spec"]["terminationGracePeriodSecond"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        check_core(objects)


def test_templates_are_valid_by_themselves(crd: Callable[[str], list[str]]) -> None:
    objects = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "k8s").glob("*.yaml"))]
    assert crd(to_yaml(objects)) == []
    objects.sort(key=lambda item: item["kind"] == "RayJob")
    check_core(objects)
    assert operator_findings(objects[-1]) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("spec", "submissionMode"), "K8SJobMode", "none of K8sJobMode, SidecarMode, HTTPMode, InteractiveMode"),
        (("spec", "submissionMode"), "SidecarMode", "refuses submitterPodTemplate"),
        (("spec", "submitterPodTemplate", "spec", "restartPolicy"), "Always", "must be Never or OnFailure"),
        (("spec", "rayClusterSpec", "rayVersion"), "", "token needs rayVersion"),
        (("metadata", "name"), "x" * 48, "at most 47"),
        (("metadata", "name"), "7b", "DNS-1035"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"), 0, "in this order of size"),
    ],
)
def test_what_the_crd_lets_pass_is_found(
    read: Callable[..., Any], crd: Callable[[str], list[str]], path: tuple[Any, ...], value: Any, said: str
) -> None:
    [*_, job] = render(*read("/data/runs"), k8s_settings(**RELEASE))
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert crd(to_yaml([job])) == []
    [finding] = operator_findings(job)
    assert said in finding


def test_every_container_is_restricted(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    for role, pod in pods(render(*run)[-1]).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, role
        assert {"hostNetwork", "hostPID", "hostIPC", "initContainers"}.isdisjoint(spec), role
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), role
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, role


def test_what_keeps_a_run_alive(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    config, _, settings = run
    job = render(*run)[-1]
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == settings.backoff_limit >= 10
    assert spec["entrypoint"] == "exec python -m outlast.cluster.cli train /etc/outlast/run.yaml --take-over"
    assert "gcsFaultToleranceOptions" not in cluster
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [group] = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == config.scale.workers
    templates = pods(job)
    for role, pod in templates.items():
        assert variables(pod)["RAY_AUTH_MODE"] == "token"
        lost = {
            item["key"]: item["tolerationSeconds"] for item in pod["spec"]["tolerations"] if "tolerationSeconds" in item
        }
        assert lost == {"node.kubernetes.io/unreachable": 30, "node.kubernetes.io/not-ready": 30}
        assert pod["metadata"]["labels"] == {"outlast/run": config.name}, role
    for role in ("head", "worker"):
        grace, drain = templates[role]["spec"]["terminationGracePeriodSeconds"], "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        assert grace == settings.grace_s
        assert float(variables(templates[role])[drain]) == grace - 5
        [shm] = [volume for volume in templates[role]["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": settings.shm}
    assert 0 < float(variables(templates["head"])["RAY_JOB_STOP_WAIT_TIME_S"]) < settings.grace_s
    assert sum(name.startswith("RAY_health_check_") for name in variables(templates["head"])) == 4


def test_defaults_of_grace_and_drain(read: Callable[..., Any]) -> None:
    head = pods(render(*read("/data/runs"), k8s_settings(**RELEASE))[-1])["head"]
    assert head["spec"]["terminationGracePeriodSeconds"] == 120
    assert variables(head)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "115"
    assert variables(head)["RAY_JOB_STOP_WAIT_TIME_S"] == "100"


def test_workers_get_what_scale_says(read: Callable[..., Any]) -> None:
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


def test_head_and_workers_go_to_nodes_of_their_own(read: Callable[..., Any]) -> None:
    settings = k8s_settings(
        **RELEASE, head_nodes=["spot=no"], worker_nodes=["spot=yes"], worker_taints=["spot=yes:NoSchedule", "slow"]
    )
    found = pods(render(*read("/data/runs"), settings)[-1])
    selectors = {role: pod["spec"]["nodeSelector"] for role, pod in found.items()}
    assert selectors == {"submitter": {"spot": "no"}, "head": {"spot": "no"}, "worker": {"spot": "yes"}}
    assert found["worker"]["spec"]["tolerations"][2:] == [
        {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
        {"key": "slow", "operator": "Exists"},
    ]
    assert len(found["head"]["spec"]["tolerations"]) == 2


def test_a_path_is_a_claim_mounted_there(read: Callable[..., Any]) -> None:
    settings = k8s_settings(**RELEASE, claim_size="1Ti", storage_class="nfs", namespace="ml")
    objects = render(*read("/data/runs"), settings)
    assert [item["kind"] for item in objects] == ["ConfigMap", "ServiceAccount", "PersistentVolumeClaim", "RayJob"]
    assert {item["metadata"]["namespace"] for item in objects} == {"ml"}
    claim = objects[2]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Ti"}},
        "storageClassName": "nfs",
    }
    for role in ("head", "worker"):
        pod = pods(objects[-1])[role]
        assert mounts(pod)["storage"] == "/data/runs"
        assert {"name": "storage", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in pod["spec"][
            "volumes"
        ]
    assert mounts(pods(objects[-1])["submitter"]) == {}


def test_an_existing_claim_and_account_are_not_rendered(read: Callable[..., Any]) -> None:
    settings = k8s_settings(**RELEASE, claim="team", mount="/data", service_account="trainer")
    objects = render(*read("/data/runs"), settings)
    assert [item["kind"] for item in objects] == ["ConfigMap", "RayJob"]
    assert mounts(pods(objects[-1])["worker"])["storage"] == "/data"
    assert {pod["spec"]["serviceAccountName"] for pod in pods(objects[-1]).values()} == {"trainer"}


def test_an_object_store_is_a_secret_by_name(read: Callable[..., Any]) -> None:
    objects = render(*read("s3://bucket/runs"), k8s_settings(**RELEASE, secret="store"))
    found = pods(objects[-1])
    for role in ("head", "worker"):
        assert found[role]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]
        assert "storage" not in mounts(found[role])
    assert "envFrom" not in found["submitter"]["spec"]["containers"][0]
    assert "PersistentVolumeClaim" not in [item["kind"] for item in objects]


def test_nothing_secret_is_written(read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "bucket-nobody-may-see")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-nobody-may-see")
    config, declared = read("s3://${env:BUCKET}/runs", data={"train": "s3://${env:BUCKET}/a.jsonl"})
    assert "nobody-may-see" in config.checkpoint.storage
    objects = render(config, declared, k8s_settings(**RELEASE, secret="store"))
    assert "nobody-may-see" not in to_yaml(objects)
    written = yaml.safe_load(objects[0]["data"]["run.yaml"])
    assert written == declared
    assert written["checkpoint"]["storage"] == "s3://${env:BUCKET}/runs"


@pytest.mark.parametrize("where", ["checkpoint", "data"])
def test_credentials_in_a_url_are_refused(read: Callable[..., Any], where: str) -> None:
    url = "s3://user:word@bucket/runs"
    config, declared = read(*([url] if where == "checkpoint" else ["/data/runs"]), data={"train": url})
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        render(config, declared, k8s_settings(**RELEASE))
    assert "word" not in str(caught.value)


def test_yaml_round_trip_and_determinism(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    objects = render(*run)
    text = to_yaml(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert to_yaml(render(*copy.deepcopy(run))) == text
    assert "&id" not in text


def test_the_config_map_is_the_run_file(read: Callable[..., Any], tmp_path: Path) -> None:
    config, declared = read("/data/runs", train={"lr": "2e-4", "steps": 3}, name="My_Run.v2")
    [config_map, *_] = render(config, declared, k8s_settings(**RELEASE))
    again = tmp_path / "mounted.yaml"
    again.write_text(config_map["data"]["run.yaml"])
    assert load_run(str(again)) == (config, declared)


def test_yaml_keeps_text_that_other_readers_take_for_numbers() -> None:
    text = to_yaml([{"a": "1e5", "b": "y", "c": "2.60.0", "d": "0o17", "e": "+1", "f": "N"}])
    assert text.count('"') == 12
    assert yaml.safe_load(text) == {"a": "1e5", "b": "y", "c": "2.60.0", "d": "0o17", "e": "+1", "f": "N"}


@pytest.mark.parametrize(
    ("run_name", "name"),
    [("my-run", "my-run"), ("My_Run.v2", "my-run-v2"), ("a" * 47, "a" * 47), ("Llama-3.1__8B", "llama-3-1-8b")],
)
def test_names(run_name: str, name: str) -> None:
    assert job_name(run_name, k8s_settings(**RELEASE)) == name
    assert job_name(run_name, k8s_settings(**RELEASE, name="other")) == "other"


@pytest.mark.parametrize(("run_name", "said"), [("a" * 48, "48 characters"), ("7b.sft", "begins with a letter")])
def test_names_that_cannot_be(run_name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        job_name(run_name, k8s_settings(**RELEASE))
    assert "--name" in caught.value.hint


@pytest.mark.parametrize(
    ("storage", "sections", "options", "said"),
    [
        ("./runs", {}, {}, "is relative, and a pod has no home"),
        ("~/runs", {}, {}, "is relative, and a pod has no home"),
        ("file:runs", {}, {}, "is relative, and a pod has no home"),
        ("/", {}, {}, "cannot be mounted"),
        ("/home/ray", {}, {}, "cannot be mounted"),
        ("/tmp/runs", {}, {}, "cannot be mounted"),
        ("/data/../etc/outlast", {}, {}, "cannot be mounted"),
        ("/data/runs", {}, {"claim": "team", "mount": "/dat"}, "is not under /dat"),
        ("s3://bucket/runs", {}, {"claim": "team"}, "give both --claim and --mount"),
        ("s3://bucket/runs", {}, {"mount": "/data"}, "give both --claim and --mount"),
        ("/data/runs", {"scale": {"gpus_per_worker": 0.5}}, {}, "scale.gpus_per_worker is 0.5"),
        ("/data/runs", {"scale": {"cpus_per_worker": 0.5}}, {}, "scale.cpus_per_worker is 0.5"),
    ],
)
def test_runs_that_cannot_be(
    read: Callable[..., Any], storage: str, sections: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        render(*read(storage, **sections), k8s_settings(**RELEASE, **options))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "My-Run"}, "name"),
        ({"name": "a" * 48}, "name"),
        ({"namespace": "a_b"}, "namespace"),
        ({"claim_size": "lots"}, "claim_size"),
        ({"worker_nodes": ["spot"]}, "worker_nodes: 'spot' is not a node label"),
        ({"worker_taints": ["spot=true:Never"]}, "worker_taints"),
        ({"mount": "data"}, "mount: mount 'data' is relative"),
        ({"ray_version": "latest"}, "ray_version"),
        ({"imagee": "x"}, "did you mean 'image'"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        k8s_settings(**RELEASE | options)


def test_cautions(read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/elsewhere")
    sections = {
        "data": {"train": "${env:WHERE}/train.jsonl", "eval": "/data/eval.jsonl"},
        "model": {"path": "./my-gpt2"},
    }
    found = cautions(*read("/data/runs", **sections), k8s_settings(**RELEASE))
    assert [line.split(":")[0] for line in found[:3]] == ["data.train", "data.eval", "model.path"]
    assert "put it under /data/runs" in found[0]
    assert "WHERE" in found[3]
    assert "--secret" in found[3]
    assert "kubectl delete -f" in found[4]
    good = {"data": {"train": "/data/train.jsonl", "eval": "2%"}}
    assert cautions(*read("/data/runs", **good), k8s_settings(**RELEASE, claim="team", mount="/data")) == []
    several = {"data": {"train": ["s3://b/*.jsonl", "/data/part-*.csv", "/elsewhere/a.csv"]}}
    [left] = cautions(*read("/data/runs", **several), k8s_settings(**RELEASE, claim="team", mount="/data"))
    assert left.startswith("data.train[2]: no volume brings /elsewhere/a.csv")
    assert cautions(*read("s3://b/runs"), k8s_settings(**RELEASE, secret="store")) == []
    [access] = cautions(*read("s3://b/runs"), k8s_settings(**RELEASE))
    assert "--service-account" in access


def test_readme_explains_every_default() -> None:
    text = (ROOT / "k8s" / "README.md").read_text()
    job = yaml.safe_load((ROOT / "k8s" / "rayjob.yaml").read_text())
    names = {*job["spec"]} - {"rayClusterSpec", "entrypoint", "submitterPodTemplate"}
    for pod in pods(job).values():
        names |= {name for name in variables(pod) if not name.startswith("RAY_health_check_")}
    assert [name for name in sorted(names) if name not in text] == []


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom outlast.cluster.manifests import k8s_settings\nk8s_settings()\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
