"""Manifests against KubeRay's CRDs and Kubernetes' own schemas, and properties that schemas cannot express."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.main import app
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_file import load_run
from outlast.cluster.kubernetes.lint.linter import lint
from outlast.cluster.kubernetes.render import job_name, render, to_yaml, warnings_for
from outlast.cluster.kubernetes.settings import K8sSettings, k8s_settings
from outlast.cluster.preflight.finding import Level
from tests.support.kubernetes.manifests import (
    RELEASE,
    ROOT,
    RUNS,
    Read,
    check_core,
    crd_checker,
    mounts,
    pods,
    read_run,
)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return partial(read_run, tmp_path)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, read: Read) -> tuple[RunConfig, dict[str, Any], K8sSettings]:
    storage, sections, options = RUNS[request.param]
    return (*read(storage, **sections), k8s_settings(**RELEASE, **options))


@pytest.fixture(scope="module")
def crd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return crd_checker(tmp_path_factory.mktemp("crds"))


def test_objects_satisfy_the_schemas(
    run: tuple[RunConfig, dict[str, Any], K8sSettings], crd: Callable[[str], list[str]]
) -> None:
    text = to_yaml(render(*run))
    assert crd(text) == []
    check_core(list(yaml.safe_load_all(text)))


def test_core_objects_satisfy_the_schemas_without_crds(read: Read) -> None:
    check_core(render(*read("/data/runs"), k8s_settings(**RELEASE)))


def test_schemas_are_strict(read: Read, crd: Callable[[str], list[str]]) -> None:
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
    assert [finding.level for finding in lint(objects)] == [Level.OK]


def test_rendered_objects_pass_lint(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    assert [finding for finding in lint(render(*run)) if finding.level is not Level.OK] == []


def test_a_path_is_a_claim_mounted_there(read: Read) -> None:
    settings = k8s_settings(**RELEASE, claim_size="1Ti", storage_class="nfs", namespace="ml")
    objects = render(*read("/data/runs"), settings)
    assert [item["kind"] for item in objects] == [
        "ConfigMap",
        "ServiceAccount",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PersistentVolumeClaim",
        "RayJob",
    ]
    assert {item["metadata"]["namespace"] for item in objects} == {"ml"}
    claim = objects[4]
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
    assert mounts(pods(objects[-1])["submitter"]) == {"tmp": "/tmp"}


def test_an_existing_claim_and_account_are_not_rendered(read: Read) -> None:
    settings = k8s_settings(**RELEASE, claim="team", mount="/data", service_account="trainer")
    objects = render(*read("/data/runs"), settings)
    assert [item["kind"] for item in objects] == ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "RayJob"]
    assert mounts(pods(objects[-1])["worker"])["storage"] == "/data"
    assert {pod["spec"]["serviceAccountName"] for pod in pods(objects[-1]).values()} == {"trainer"}


def test_an_object_store_is_a_secret_by_name(read: Read) -> None:
    objects = render(*read("s3://bucket/runs"), k8s_settings(**RELEASE, secret="store"))
    found = pods(objects[-1])
    for role in ("head", "worker"):
        assert found[role]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]
        assert "storage" not in mounts(found[role])
    assert "envFrom" not in found["submitter"]["spec"]["containers"][0]
    assert "PersistentVolumeClaim" not in [item["kind"] for item in objects]


def test_nothing_secret_is_written(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "bucket-must-stay-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-must-stay-secret")
    config, declared = read("s3://${env:BUCKET}/runs", data={"train": "s3://${env:BUCKET}/a.jsonl"})
    assert "must-stay-secret" in config.checkpoint.storage
    objects = render(config, declared, k8s_settings(**RELEASE, secret="store"))
    assert "must-stay-secret" not in to_yaml(objects)
    written = yaml.safe_load(objects[0]["data"]["run.yaml"])
    assert written == {**declared, "scale": {"cpus_per_worker": 4}}
    assert written["checkpoint"]["storage"] == "s3://${env:BUCKET}/runs"
    assert [finding.level for finding in lint(objects)] == [Level.OK]


@pytest.mark.parametrize("where", ["checkpoint", "data"])
def test_credentials_in_a_url_are_refused(read: Read, where: str) -> None:
    url = "s3://user:word@bucket/runs"
    with pytest.raises(ConfigError, match="must not carry credentials") as caught:
        read(*([url] if where == "checkpoint" else ["/data/runs"]), data={"train": url})
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("storage", "train"),
    [
        ("s3:///runs", None),
        ("s3://", None),
        ("s3://${env:EMPTY}/runs", None),
        ("s3a://bucket/runs", None),
        ("azure://container/runs", None),
        ("https://host/runs", None),
        ("file://data/runs", None),
        ("s3://minio:9000/bucket", None),
        ("/data/runs", "https://host/texts.jsonl"),
        ("/data/runs", "s3://${env:EMPTY}/texts.jsonl"),
    ],
)
def test_what_validate_refuses_render_and_lint_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, train: str | None
) -> None:
    monkeypatch.setenv("EMPTY", "")
    (data := tmp_path / "x.jsonl").write_text('{"text": "a text"}\n')
    body = {"name": "my-run", "model": {"path": "org/model"}, "data": {"train": train or str(data)}}
    run_file, manifests = tmp_path / "run.yaml", tmp_path / "rendered.yaml"
    run_file.write_text(yaml.safe_dump(body | {"checkpoint": {"storage": storage}}))
    for command in (["validate"], ["k8s", "render"]):
        done = CliRunner().invoke(app, [*command, str(run_file)])
        assert isinstance(done.exception, ConfigError) or done.exit_code == 2, command
        assert ("checkpoint.storage" if train is None else "data.train") in done.output + str(done.exception), command
    if "${env:" in storage + (train or ""):
        return  # which lint cannot expand
    text = (ROOT / "tests" / "golden" / "manifests" / "claim.yaml").read_text()
    objects = list(yaml.safe_load_all(text))
    [config_map] = [item for item in objects if item["kind"] == "ConfigMap"]
    config_map["data"]["run.yaml"] = run_file.read_text()
    manifests.write_text(to_yaml(objects))
    done = CliRunner().invoke(app, ["k8s", "lint", str(manifests)])
    assert done.exit_code == 2
    assert ("checkpoint.storage" if train is None else "data.train") in done.stdout


@pytest.mark.parametrize("storage", ["FILE:///data/runs", "file://localhost/data/runs", "//data//runs", "/data/runs/"])
def test_every_spelling_of_a_path_is_mounted(read: Read, storage: str) -> None:
    objects = render(*read(storage), k8s_settings(**RELEASE))
    for role in ("head", "worker"):
        assert mounts(pods(objects[-1])[role])["storage"] == "/data/runs"
    assert [finding.level for finding in lint(objects)] == [Level.OK]


@pytest.mark.parametrize(
    ("storage", "ports"),
    [
        ("s3://b/runs?endpoint_override=minio:9000", [443, 9000]),
        ("s3://b/runs?endpoint_override=http://minio:9000", [443, 9000]),
        ("S3://b/runs?endpoint_override=minio&scheme=http", [80, 443]),
        ("gs://b/runs?endpoint_override=gcs:4443", [443, 4443]),
        ("abfs://c@a.dfs.core.windows.net/runs?blob_storage_authority=.azurite:10000", [443, 10000]),
        ("hdfs://name-node:8021/runs", [443, 8021, 9866]),
        ("FILE:///data/runs", [443]),
    ],
)
def test_ports_of_a_url_are_opened(read: Read, storage: str, ports: list[int]) -> None:
    objects = render(*read(storage, data={"train": "/data/x.jsonl"}), k8s_settings(**RELEASE))
    [policy] = [item for item in objects if item["kind"] == "NetworkPolicy"]
    assert [item["port"] for item in policy["spec"]["egress"][-1]["ports"]] == ports  # 443 is the model hub's


def test_servers_of_this_environment_are_told(read: Read) -> None:
    given = {
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "MLFLOW_TRACKING_URI": "http://user:word@mlflow:5000",
        "WANDB_BASE_URL": "https://wandb.example",
        "HF_ENDPOINT": "http://mirror",
    }
    run = read("s3://b/runs", track={"to": ["mlflow", "wandb"]})
    found = warnings_for(*run, k8s_settings(**RELEASE, secret="store"), given)
    assert [line.split()[0] for line in found] == ["AWS_ENDPOINT_URL", "HF_ENDPOINT", "MLFLOW_TRACKING_URI"]
    assert [line.rpartition(" ")[2] for line in found] == ["9000", "80", "5000"]
    assert "word" not in str(found)
    opened = k8s_settings(**RELEASE, secret="store", egress_ports=[80, 5000, 9000])
    assert warnings_for(*run, opened, given) == []
    assert warnings_for(*run, k8s_settings(**RELEASE, secret="store", network_policy=False), given) == []
    named = read("s3://b/runs?endpoint_override=other:9001", data={"train": "gs://b/x.jsonl"})
    assert warnings_for(*named, k8s_settings(**RELEASE, secret="store"), given | {"HF_ENDPOINT": ""}) == []


def test_yaml_round_trip_and_determinism(run: tuple[RunConfig, dict[str, Any], K8sSettings]) -> None:
    objects = render(*run)
    text = to_yaml(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert to_yaml(render(*copy.deepcopy(run))) == text
    assert "&id" not in text


def test_the_config_map_is_the_run_file(read: Read, tmp_path: Path) -> None:
    scale = {"workers": 2, "cpus_per_worker": 3}
    config, declared = read("/data/runs", train={"lr": "2e-4", "steps": 3}, name="My_Run.v2", scale=scale)
    [config_map, *_] = render(config, declared, k8s_settings(**RELEASE))
    again = tmp_path / "mounted.yaml"
    again.write_text(config_map["data"]["run.yaml"])
    assert load_run(str(again)) == (config, declared)


def test_a_worker_asks_for_all_that_its_pod_has(read: Read) -> None:
    """Else Ray, which packs, puts all workers into one pod and leaves the others idle."""
    config, declared = read("/data/runs", scale={"workers": 4})
    objects = render(config, declared, k8s_settings(**RELEASE, worker_cpus=6))
    asked = yaml.safe_load(objects[0]["data"]["run.yaml"])["scale"]
    assert asked == {"workers": 4, "cpus_per_worker": 6}
    [job] = [item for item in objects if item["kind"] == "RayJob"]
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == "6"


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


@pytest.mark.parametrize(("run_name", "message"), [("a" * 48, "48 characters"), ("7b.sft", "must begin with a letter")])
def test_names_that_cannot_be(run_name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        job_name(run_name, k8s_settings(**RELEASE))
    assert "--name" in caught.value.hint


@pytest.mark.parametrize(
    ("storage", "sections", "options", "message"),
    [
        ("./runs", {}, {}, "is relative, but pods need an absolute path"),
        ("~/runs", {}, {}, "is relative, but pods need an absolute path"),
        ("file:runs", {}, {}, "did you mean runs?"),
        ("/", {}, {}, "cannot be mounted"),
        ("/home/ray", {}, {}, "cannot be mounted"),
        ("/tmp/runs", {}, {}, "cannot be mounted"),
        ("/data/../x", {}, {}, "has `..`"),
        ("FILE:///data/../x", {}, {}, "has `..`"),
        ("//etc//outlast", {}, {}, "cannot be mounted"),
        ("FILE:///opt/outlast/lib", {}, {}, "'/opt/outlast/lib' cannot be mounted"),
        ("/opt/outlast", {}, {}, "cannot be mounted"),
        ("/home/ray/anaconda3/runs", {}, {}, "cannot be mounted"),
        ("/py/lib/python3.11/site-packages", {}, {}, "cannot be mounted"),
        ("/data/runs", {"data": {"train": "texts.jsonl"}}, {}, "data.train 'texts.jsonl' is relative"),
        ("/data/runs", {"data": {"train": ["/data/a.jsonl", "~/b.jsonl"]}}, {}, r"data.train\[1\] '~/b.jsonl' is"),
        ("/data/runs", {"data": {"train": "/data/a.jsonl", "eval": "../b.jsonl"}}, {}, "data.eval '../b.jsonl' is"),
        ("/data/runs", {"model": {"path": "./gpt2"}}, {}, "model.path './gpt2' is relative"),
        ("/data/runs", {}, {"claim": "team", "mount": "/dat"}, "is not under /dat"),
        ("s3://bucket/runs", {}, {"claim": "team"}, "needs both --claim and --mount"),
        ("s3://bucket/runs", {}, {"mount": "/data"}, "needs both --claim and --mount"),
        ("/data/runs", {"scale": {"gpus_per_worker": 0.5}}, {}, "scale.gpus_per_worker is 0.5"),
        ("/data/runs", {"scale": {"cpus_per_worker": 0.5}}, {}, "scale.cpus_per_worker is 0.5"),
        ("/data/runs", {"scale": {"workers": [1, 2]}}, {"queue": "research"}, "a fixed number of pods"),
        ("/data/runs", {}, {"queue": "research", "spot": True, "fallback": True}, "a fixed number of pods"),
    ],
)
def test_runs_that_cannot_be(
    read: Read, storage: str, sections: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        render(*read(storage, **sections), k8s_settings(**RELEASE, **options))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "My-Run"}, "name"),
        ({"name": "a" * 48}, "name"),
        ({"namespace": "a_b"}, "namespace"),
        ({"claim_size": "lots"}, "--claim-size"),
        ({"worker_nodes": ["spot"]}, "--worker-node: 'spot' is not a label"),
        ({"image": "registry.example:5000/outlast"}, "give it a tag other than latest, or a digest"),
        ({"image": "outlast:latest"}, "can change between pods"),
        ({"fallback": True}, "--fallback needs --spot"),
        ({"egress_ports": [0]}, "--egress-port"),
        ({"worker_taints": ["spot=true:Never"]}, "--worker-taint"),
        ({"mount": "data"}, "mount 'data' is relative"),
        ({"ray_version": "latest"}, "--ray-version"),
        ({"imagee": "x"}, "--imagee: unknown key; did you mean 'image'"),
        ({"notice_s": 9}, "--notice-s"),
        ({"notice_s": 60, "grace_s": 60}, r"--notice-s \(60\) must be less than --grace-s \(60\)"),
        ({"shm": "16Gi"}, r"--shm \(16Gi\) must be less than --worker-memory \(16Gi\)"),
        ({"shm": "9G", "worker_memory": "20Gi"}, r"--shm \(9G\) must be less than --head-memory \(8Gi\)"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        k8s_settings(**RELEASE | options)


def test_warnings(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/elsewhere")
    sections = {
        "data": {"train": "${env:WHERE}/train.jsonl", "eval": "/data/eval.jsonl"},
        "model": {"path": "/models/my-gpt2"},
    }
    found = warnings_for(*read("/data/runs", **sections), k8s_settings(**RELEASE))
    assert [line.split(":")[0] for line in found[:3]] == ["data.train", "data.eval", "model.path"]
    assert "put it under /data/runs" in found[0]
    assert "WHERE" in found[3]
    assert "--secret" in found[3]
    assert "kubectl delete -f" in found[4]
    good = {"data": {"train": "/data/train.jsonl", "eval": "2%"}}
    assert warnings_for(*read("/data/runs", **good), k8s_settings(**RELEASE, claim="team", mount="/data")) == []
    several = {"data": {"train": ["s3://b/*.jsonl", "/data/part-*.csv", "/elsewhere/a.csv"]}}
    [left] = warnings_for(*read("/data/runs", **several), k8s_settings(**RELEASE, claim="team", mount="/data"))
    assert left.startswith("data.train[2]: no volume provides /elsewhere/a.csv")
    assert warnings_for(*read("s3://b/runs"), k8s_settings(**RELEASE, secret="store")) == []
    [closed] = warnings_for(*read("/data/runs", track={"to": ["mlflow"]}), k8s_settings(**RELEASE, claim="team"))
    assert "--egress-port PORT" in closed
    release = {key: value for key, value in RELEASE.items() if key != "image"}
    [local] = warnings_for(*read("s3://b/runs"), k8s_settings(**release, secret="store"))
    assert "--image" in local
    [access] = warnings_for(*read("s3://b/runs"), k8s_settings(**RELEASE))
    assert "--service-account" in access


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom outlast.cluster.cli import kubernetes\n"
        "from outlast.cluster.kubernetes import client, render\n"
        "from outlast.cluster.kubernetes.lint import linter\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
