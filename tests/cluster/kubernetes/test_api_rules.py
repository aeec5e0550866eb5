"""`outlast k8s lint`: what the API server refuses, defaults of the CRD, schedules, and the release of the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.main import app
from outlast.cluster.kubernetes.lint.linter import lint
from outlast.cluster.kubernetes.quantity import quantity_value
from outlast.cluster.kubernetes.settings import is_schedule
from outlast.cluster.preflight.finding import Level
from tests.cluster.kubernetes.test_lint import HEAD, WORKER_POD, WORKERS, found_at
from tests.support.kubernetes.manifests import ROOT


@pytest.mark.parametrize("key", ["replicas", "minReplicas", "maxReplicas"])
def test_defaults_of_the_crd(tmp_path: Path, key: str) -> None:
    assert found_at(tmp_path, "claim", {(*WORKERS, key): ...}, Level.FAILED) == []
    assert found_at(tmp_path, "claim", {(*WORKERS, key): None}, Level.FAILED) == []


WORKER = (*WORKER_POD, "containers", 0)
AT_POD = "spec.rayClusterSpec.workerGroupSpecs[0].template.spec"
AT = f"{AT_POD}.containers[0]"
SAME = {"name": "A", "value": "1"}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("metadata", "name"), "a_b", "metadata.name: 'a_b' is not a name"),
        (("metadata", "name"), ..., "metadata.name: is missing"),
        (("metadata", "namespace"), "a.b", "metadata.namespace: 'a.b' is not a DNS-1123 label"),
        (("metadata", "labels"), {"team": "x" * 64}, "metadata.labels.team: "),
        (("metadata", "labels"), {"team": "a b"}, "metadata.labels.team: 'a b' is not a label"),
        (("metadata", "labels"), {"team": 1}, "metadata.labels.team: 1 is not a text"),
        (("metadata", "labels"), {"a/b/c": "x"}, "metadata.labels.a/b/c: 'a/b/c' is not a key"),
        (("metadata", "labels"), ["a=b"], "metadata.labels: is not a mapping"),
        (("metadata", "annotations"), {"a b": "x"}, "metadata.annotations.a b: "),
        (("metadata", "annotations"), {"a": True}, "metadata.annotations.a: True is not a text"),
        (("metadata", "annotations"), {"a": "x" * 300_000}, "metadata.annotations: have more than 256 KiB"),
        (("spec", "backoffLimit"), "3", "spec.backoffLimit: '3' is not a whole number"),
        (("spec", "backoffLimit"), 2**31, "spec.backoffLimit: 2147483648 is not in 0"),
        (("spec", "shutdownAfterJobFinishes"), "yes", "spec.shutdownAfterJobFinishes: 'yes' is not true or false"),
        (("spec", "entrypoint"), 7, "spec.entrypoint: 7 is not a text"),
        ((*WORKERS, "replicas"), -1, "workerGroupSpecs[0].replicas: -1 must not be"),
        ((*WORKERS, "replicas"), 1.5, "workerGroupSpecs[0].replicas: 1.5 is not a whole number"),
        ((*WORKERS, "groupName"), 7, "workerGroupSpecs[0].groupName: 7 is not a text"),
        ((*WORKERS, "rayStartParams"), {"num-cpus": 4}, "workerGroupSpecs[0].rayStartParams.num-cpus: 4 is not a text"),
        ((*HEAD, "template", "metadata", "labels"), {"a": "-"}, "headGroupSpec.template.metadata.labels.a: '-' is"),
        ((*WORKER_POD, "nodeSelector"), {"spot": True}, f"{AT_POD}.nodeSelector.spot: True is not a text"),
        ((*WORKER_POD, "terminationGracePeriodSeconds"), -1, f"{AT_POD}.terminationGracePeriodSeconds: -1 must not be"),
        ((*WORKER_POD, "volumes", 0, "name"), "Shm", f"{AT_POD}.volumes[0].name: 'Shm' is not"),
        ((*WORKER_POD, "volumes", 1, "name"), "shm", f"{AT_POD}.volumes: shm is there 2 times"),
        ((*WORKER_POD, "volumes", 0, "emptyDir", "sizeLimit"), "1GB", f"{AT_POD}.volumes[0].emptyDir.sizeLimit: "),
        ((*WORKER, "name"), "ray_worker", f"{AT}.name: 'ray_worker' is not"),
        ((*WORKER, "name"), "x" * 64, f"{AT}.name: "),
        ((*WORKER, "image"), "a b:1", f"{AT}.image: 'a b:1' is not the name of an image"),
        ((*WORKER, "args"), "--x", f"{AT}.args: is not a list of texts"),
        ((*WORKER, "env"), [{"name": "A", "value": 1}], f"{AT}.env[0].value: of A is not a text"),
        ((*WORKER, "env"), [{"name": "A=B"}], f"{AT}.env[0].name: 'A=B' is not"),
        ((*WORKER, "env"), [SAME, SAME], f"{AT}.env: A is there 2 times"),
        ((*WORKER, "ports"), [{"containerPort": 0}], f"{AT}.ports[0].containerPort: 0 is not in"),
        ((*WORKER, "ports"), [{"containerPort": 65536}], f"{AT}.ports[0].containerPort: 65536"),
        ((*WORKER, "ports"), [{"containerPort": "80"}], f"{AT}.ports[0].containerPort: '80' is"),
        ((*WORKER, "ports"), [{"containerPort": 1, "name": "x" * 16}], f"{AT}.ports[0].name: "),
        ((*WORKER, "ports"), [{"containerPort": 80}] * 2, f"{AT}.ports: 80/TCP is there 2 times"),
        ((*WORKER, "volumeMounts", 0, "name"), "no", f"{AT}.volumeMounts[0].name: the pod has no volume 'no'"),
        ((*WORKER, "volumeMounts", 0, "mountPath"), "/tmp", f"{AT}.volumeMounts: /tmp is there 2"),
        ((*WORKER, "resources", "requests", "cpu"), "4 cores", f"{AT}.resources.requests.cpu: "),
        ((*WORKER, "resources", "requests", "memory"), "-1Gi", f"{AT}.resources.requests.memory"),
        ((*WORKER, "resources", "requests", "memory"), "17Gi", "requests.memory: 17Gi exceeds the limit of 16Gi"),
    ],
)
def test_what_the_api_server_refuses(tmp_path: Path, path: tuple[Any, ...], value: Any, expected: str) -> None:
    failed = found_at(tmp_path, "claim", {path: value}, Level.FAILED)
    assert any(expected in text for text in failed), failed


@pytest.mark.parametrize("path", ["/opt/outlast", "/usr", "/home/ray/anaconda3/lib", "/py/site-packages/x", "//opt/"])
def test_a_mount_over_the_images_programs(tmp_path: Path, path: str) -> None:
    found = found_at(tmp_path, "claim", {(*WORKER, "volumeMounts", 0, "mountPath"): path}, Level.WARNING)
    assert f"worker: a volume at {path} hides programs of the image" in found


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", 0.5), ("16Gi", 16 * 2**30), ("1e3", 1000), ("2E", 2e18), ("1Ei", 2**60), (4, 4), ("1.5k", 1500)],
)
def test_quantities(text: str | int, number: float) -> None:
    assert quantity_value(text) == pytest.approx(number)


def test_another_release_of_kuberay(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    objects = list(yaml.safe_load_all((ROOT / "tests" / "golden" / "manifests" / "claim.yaml").read_text()))
    objects[-1]["spec"]["submissionMode"] = "NewMode"
    path.write_text(yaml.safe_dump_all(objects))
    known = CliRunner().invoke(app, ["k8s", "lint", str(path), "--kuberay", "v1.7.3"])
    assert known.exit_code == 2
    assert "rules of KubeRay 1.7\n" in known.stderr
    other = CliRunner().invoke(app, ["k8s", "lint", str(path), "--kuberay", "1.8.0"])
    assert other.exit_code == 0
    assert "'NewMode' is not one of" in other.stdout
    assert "rules of KubeRay 1.7; what they refuse is a warning, because the cluster has 1.8.0" in other.stderr
    objects[-1]["metadata"]["name"] = "a_b"
    path.write_text(yaml.safe_dump_all(objects))
    assert CliRunner().invoke(app, ["k8s", "lint", str(path), "--kuberay", "1.8"]).exit_code == 2
    with pytest.raises(ConfigError, match="not a release"):
        lint(objects, "newest")


@pytest.mark.parametrize("text", ["0 3 * * *", "*/15 0-6 1,15 * mon", "@daily", "@every 1h30m", "5 4 * * 0"])
def test_schedules(text: str) -> None:
    assert is_schedule(text)


@pytest.mark.parametrize(
    "text", ["", "0 3 * *", "60 3 * * *", "0 24 * * *", "5-1 * * * *", "TZ=UTC 0 3 * * *", "@often"]
)
def test_texts_that_are_no_schedule(text: str) -> None:
    assert not is_schedule(text)


def test_a_schedule_has_the_rules_of_its_job() -> None:
    job = list(yaml.safe_load_all((ROOT / "tests" / "golden" / "manifests" / "claim.yaml").read_text()))[-1]
    spec: dict[str, Any] = {"schedule": "0 3 * * *", "timeZone": "Europe/Berlin", "jobTemplate": job["spec"]}
    cron_job = {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": {"name": "nightly"}, "spec": spec}
    [gate] = lint([cron_job])
    assert gate.level is Level.WARNING
    assert "feature gate RayCronJob" in gate.text
    cron_job["metadata"] = {"name": "x" * 37}
    spec |= {"schedule": "daily", "timeZone": "Berlin"}
    job["spec"]["backoffLimit"] = -1
    failed = [finding.text for finding in lint([cron_job]) if finding.level is Level.FAILED]
    for expected in ("at most 36", "spec.schedule", "spec.timeZone", "spec.jobTemplate.backoffLimit: "):
        assert any(expected in text for text in failed), failed


def test_a_folder_is_answered_with_the_command_that_prints_it(tmp_path: Path) -> None:
    for command in ("lint", "apply"):
        result = CliRunner().invoke(app, ["k8s", command, str(tmp_path)])
        assert isinstance(result.exception, ConfigError)
        assert result.exception.message == f"{tmp_path} is a folder"
        assert result.exception.hint.startswith(f"`kubectl kustomize {tmp_path}` prints what it makes")
