"""Overlays: each is built by a real kubectl, satisfies the schemas and passes lint. Alerts, by a real promtool."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.main import app
from outlast.cluster.config.run_file import load_run
from outlast.cluster.driver.prometheus import COUNTERS, GAUGES
from outlast.cluster.kubernetes.kustomize import component_names, write_folder
from outlast.cluster.kubernetes.lint.linter import lint, read_objects
from outlast.cluster.kubernetes.render import render, to_yaml
from outlast.cluster.kubernetes.settings import k8s_settings
from outlast.cluster.preflight.finding import Level
from tests.support.kubernetes.manifests import (
    KUBERNETES,
    RELEASE,
    ROOT,
    Objects,
    crd_checker,
    mounts,
    pods,
    read_run,
    rendered,
    variables,
)

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
TOOLS = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


def kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl", path=TOOLS)
    assert kubectl, "kubectl is missing: `make setup` installs it"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(overlay: str) -> Objects:
    return read_objects(kustomize(K8S / "overlays" / overlay))


def job_of(objects: Objects) -> dict[str, Any]:
    [job] = [item for item in objects if item["kind"] == "RayJob"]
    return job


@pytest.fixture(scope="module")
def crd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return crd_checker(tmp_path_factory.mktemp("crds"))


def test_the_base_is_what_is_rendered() -> None:
    settings = k8s_settings(mount="/data", image="outlast:0.1.0", ray_version="2.60.0")
    text = to_yaml(render(*load_run(str(K8S / "base" / "run.yaml")), settings))
    assert (K8S / "base" / "rendered.yaml").read_text() == text


def test_every_component_has_an_overlay() -> None:
    assert component_names() == OVERLAYS == ["dev", "gpu", "kueue", "monitoring", "nfs", "s3", "spot"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays(overlay: str, crd: Callable[[str], list[str]]) -> None:
    text = kustomize(K8S / "overlays" / overlay)
    objects = read_objects(text)
    assert crd(text) == []
    for item in objects:
        if item["apiVersion"].split("/")[0] not in ("ray.io", "monitoring.coreos.com"):
            for release in KUBERNETES:
                kubernetes_validate.validate(item, release, strict=True)
    expected = [Level.OK]
    if overlay == "dev":  # one node, so one node's volume will do
        expected = [Level.WARNING, Level.OK]
    assert [finding.level for finding in lint(objects)] == expected


def test_dev_fits_one_machine_and_keeps_the_times_in_order() -> None:
    objects = built("dev")
    job = job_of(objects)
    for role in ("head", "worker"):
        pod = pods(job)[role]
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace == 30
        assert float(variables(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < grace
    [data] = [item["data"] for item in objects if item["kind"] == "ConfigMap"]
    config = yaml.safe_load(data["run.yaml"])
    assert Path(config["data"]["train"]).name in data
    assert config["data"]["train"].startswith(mounts(pods(job)["head"])["run"])


def test_gpu_asks_for_what_its_run_file_asks_for() -> None:
    worker = pods(job_of(built("gpu")))["worker"]["spec"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]
    [shm] = [volume for volume in worker["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"]["sizeLimit"] == "8Gi"


def test_spot_is_what_render_does(tmp_path: Path) -> None:
    worker = pods(job_of(built("spot")))["worker"]["spec"]
    run, declared = load_run(str(K8S / "base" / "run.yaml"))
    options = {"mount": "/data", "image": "outlast:0.1.0", "ray_version": "2.60.0", "spot": True}
    assert worker["affinity"] == pods(render(run, declared, k8s_settings(**options))[-1])["worker"]["spec"]["affinity"]


def test_s3_has_a_secret_and_no_claim() -> None:
    objects = built("s3")
    assert "PersistentVolumeClaim" not in [item["kind"] for item in objects]
    found = pods(job_of(objects))
    for role in ("head", "worker"):
        assert found[role]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]
        assert "storage" not in mounts(found[role])
        assert "storage" not in [volume["name"] for volume in found[role]["spec"]["volumes"]]


def test_nfs_is_bound_by_name() -> None:
    by_kind = {item["kind"]: item for item in built("nfs")}
    claim, volume = by_kind["PersistentVolumeClaim"]["spec"], by_kind["PersistentVolume"]
    assert (claim["volumeName"], claim["storageClassName"]) == (volume["metadata"]["name"], "")
    assert {"noac", "lookupcache=none"} < set(volume["spec"]["mountOptions"])
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"


def test_kueue_has_its_label() -> None:
    assert job_of(built("kueue"))["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"


def test_the_script_for_a_real_cluster(crd: Callable[[str], list[str]]) -> None:
    """The parts of `make k8s-e2e` that need no cluster: its shell code, and the objects that it applies."""
    script = K8S / "e2e.sh"
    shellcheck = shutil.which("shellcheck", path=TOOLS)
    assert shellcheck, "shellcheck is missing: `make setup` installs it"
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

    def printed(*arguments: str) -> str:
        environment = {**os.environ, "PATH": TOOLS, "IMAGE": "outlast:e2e-1"}
        return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=True).stdout

    text = printed("print", "calm")
    assert "my-run" not in text
    assert crd(text) == []
    objects = read_objects(text)
    assert {finding.level for finding in lint(objects)} <= {Level.WARNING, Level.OK}
    job = job_of(objects)
    assert {pod["spec"]["containers"][0]["image"] for pod in pods(job).values()} == {"outlast:e2e-1"}
    [data] = [item["data"] for item in objects if item["kind"] == "ConfigMap"]
    config = yaml.safe_load(data["run.yaml"])
    assert (config["name"], config["train"]["steps"], config["checkpoint"]["every"]) == ("calm", 4000, 200)
    [reader] = read_objects(printed("reader"))
    kubernetes_validate.validate(reader, KUBERNETES[-1], strict=True)
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in reader["spec"]["volumes"]}
    assert claims == {f"{name}-storage" for name in ("calm", "troubled")}
    assert "calm-storage" in [item["metadata"]["name"] for item in objects]


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    made = rendered(tmp_path, "claim")
    folder = tmp_path / "deploy"
    written = write_folder(folder, made, ["spot", "monitoring"])
    assert [path.relative_to(folder).as_posix() for path in written] == [
        "rendered.yaml",
        "components/spot",
        "components/monitoring",
        "kustomization.yaml",
    ]
    objects = read_objects(kustomize(folder))
    assert "PrometheusRule" in [item["kind"] for item in objects]
    assert "affinity" in pods(job_of(objects))["worker"]["spec"]
    rules = folder / "components" / "monitoring" / "rules.yaml"
    rules.write_text(rules.read_text().replace("> 3600", "> 7200"))
    assert write_folder(folder, made, ["monitoring", "kueue"])[1] == folder / "components" / "kueue"
    assert "> 7200" in rules.read_text()
    assert yaml.safe_load((folder / "kustomization.yaml").read_text())["components"] == [
        "components/spot",
        "components/monitoring",
        "components/kueue",
    ]


@pytest.mark.parametrize("component", ["dev", "gpu"])
def test_components_keep_the_cpus_of_the_run_file(tmp_path: Path, component: str) -> None:
    run, declared = read_run(tmp_path, "/data/runs", scale={"workers": 2, "cpus_per_worker": 12, "gpus_per_worker": 1})
    folder = tmp_path / "deploy"
    write_folder(folder, render(run, declared, k8s_settings(**RELEASE)), [component])
    objects = read_objects(kustomize(folder))
    resources = pods(job_of(objects))["worker"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["cpu"] == "12"
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    assert Level.FAILED not in [finding.level for finding in lint(objects)]


@pytest.mark.parametrize(
    ("storage", "workers", "component", "hint"),
    [
        ("/data/runs", 2, "s3", "set checkpoint.storage to s3://"),
        ("s3://bucket/runs", 2, "s3", "give --secret NAME"),
        ("s3://bucket/runs", 2, "nfs", "omit --with nfs"),
        ("/data/runs", [1, 4], "kueue", "omit --with kueue"),
    ],
)
def test_components_that_do_not_fit_a_run(
    tmp_path: Path, storage: str, workers: Any, component: str, hint: str
) -> None:
    run, declared = read_run(tmp_path, storage, scale={"workers": workers})
    with pytest.raises(ConfigError) as caught:
        write_folder(tmp_path / "deploy", render(run, declared, k8s_settings(**RELEASE)), [component])
    assert hint in caught.value.hint
    assert not (tmp_path / "deploy").exists()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown component 'helm'") as caught:
        write_folder(tmp_path, [], ["helm"])
    assert "monitoring" in caught.value.hint
    (tmp_path / "kustomization.yaml").write_text("kind: Component\n")
    with pytest.raises(ConfigError, match="is not a Kustomization"):
        write_folder(tmp_path, [], [])
    run = K8S / "base" / "run.yaml"
    done = CliRunner().invoke(app, ["k8s", "render", str(run), "--with", "spot"])
    assert isinstance(done.exception, ConfigError)


# -- alerts ------------------------------------------------------------------------------------------------------------

RULES = K8S / "components" / "monitoring" / "rules.yaml"
POD = 'namespace="ml",outlast_run="my-run"'


def test_rules_use_existing_metrics() -> None:
    asked = set(re.findall(r"\bray_(outlast_\w+)", RULES.read_text()))
    assert asked
    assert asked <= {*GAUGES, *(f"{name}_total" for name in COUNTERS)}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool", path=TOOLS)
    if found is None:
        pytest.skip("promtool is not here (package prometheus)")
    return found


#: Two hours of a run, in minutes: step, seconds of a step, when the newest checkpoint was made, attempt; and what it
#: must raise at the end. A step takes 6 s when all is well, so a minute has ten.
SCENARIOS: dict[str, tuple[dict[str, str], set[str]]] = {
    "all is well": (
        {"step": "0+10x120", "step_seconds": "6x120", "checkpoint_time_seconds": "0+60x120", "attempt": "1x120"},
        set(),
    ),
    "no checkpoint for 70 minutes": (
        {"step": "0+10x120", "step_seconds": "6x120", "checkpoint_time_seconds": "0+60x50 3000x70", "attempt": "1x120"},
        {"OutlastCheckpointStale"},
    ),
    "starts again every eight minutes, to no avail": (
        {
            "step": "0+10x40 400x80",
            "step_seconds": "6x120",
            "checkpoint_time_seconds": "0+60x120",
            "attempt": "1x60 2x8 3x8 4x8 5x8 6x8 7x8 8x12",
        },
        {"OutlastCrashLoop", "OutlastLowGoodput"},
    ),
    "losses that the group survives in memory": (
        {
            "step": "0+10x120",
            "step_seconds": "6x120",
            "checkpoint_time_seconds": "0+60x120",
            "attempt": "9x30 10x40 11x8 12x8 13x8 14x8 15x8 16x8",
            'regroupings_total{WorkerId="1"}': "8x30 9x40",
            'regroupings_total{WorkerId="2"}': "_x71 1x7 2x8 3x8 4x8 5x8 6x8",
        },
        set(),
    ),
    "crashes beside losses that it survives": (
        {
            "step": "0+10x120",
            "step_seconds": "6x120",
            "checkpoint_time_seconds": "0+60x120",
            "attempt": "9x60 10x8 11x8 12x8 13x8 14x8 15x8 17x11",
            'regroupings_total{WorkerId="1"}': "_x110 1x9",
        },
        {"OutlastCrashLoop"},
    ),
    "most steps are done again and again": (
        {
            "step": "0+10x30 " + " ".join(f"{300 + 10 * turn}+10x5" for turn in range(15)),
            "step_seconds": "6x120",
            "checkpoint_time_seconds": "0+60x120",
            "attempt": "1x120",
        },
        {"OutlastLowGoodput"},
    ),
    "no pod is left": (
        {"step": "0+10x30", "step_seconds": "6x30", "checkpoint_time_seconds": "0+60x30", "attempt": "1x30"},
        set(),
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_alerts(tmp_path: Path, promtool: str, scenario: str) -> None:
    series, expected = SCENARIOS[scenario]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    given = []
    for name, values in series.items():
        metric, _, labels = name.removesuffix("}").partition("{")
        labels = f'{labels},run="my-run",{POD}'.removeprefix(",")
        given.append({"series": f"ray_outlast_{metric}{{{labels}}}", "values": values})
    given.append({"series": f"up{{{POD}}}", "values": "1x29" if scenario == "no pod is left" else "1x120"})
    alerts = ["OutlastCheckpointStale", "OutlastCrashLoop", "OutlastLowGoodput"]
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": given,
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)',
                        "eval_time": "118m",
                        "exp_samples": [{"labels": "{}", "value": int(name in expected)}],
                    }
                    for name in alerts
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    checked = subprocess.run([promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = subprocess.run([promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
