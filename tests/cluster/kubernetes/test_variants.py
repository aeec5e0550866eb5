"""Variants of a RayJob that are rendered on request: each against KubeRay's CRDs, lint, and what excludes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.kustomize import write_folder
from outlast.cluster.kubernetes.lint.linter import lint
from outlast.cluster.kubernetes.render import render, to_yaml
from outlast.cluster.kubernetes.settings import k8s_settings
from outlast.cluster.preflight.finding import Level
from tests.support.kubernetes.manifests import RELEASE, Read, crd_checker, read_run

ELASTIC = {"scale": {"workers": [2, 8]}, "exactness": "elastic"}
DELETE = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return partial(read_run, tmp_path)


@pytest.mark.parametrize(
    ("sections", "options", "warnings"),
    [
        ({}, {"sidecar": True}, ["submitter: securityContext lacks"]),
        ({}, {"keep_failed_s": 3600}, []),
        (ELASTIC, {"keep_failed_s": 3600}, []),
        (ELASTIC, {"queue": "research", "elastic_queue": True}, []),
        ({}, {"schedule": "0 3 * * *", "time_zone": "Europe/Berlin"}, ["kind: needs the operator's feature gate"]),
        (ELASTIC, {"schedule": "@daily", "sidecar": True, "keep_failed_s": 0}, ["kind: needs", "submitter: security"]),
    ],
)
def test_variants_satisfy_lint_and_crd(
    read: Read, tmp_path: Path, sections: dict[str, Any], options: dict[str, Any], warnings: list[str]
) -> None:
    objects = render(*read("/data/runs", **sections), k8s_settings(**RELEASE, **options))
    found = [finding for finding in lint(objects) if finding.level is not Level.OK]
    assert [finding.level for finding in found] == [Level.WARNING] * len(warnings), found
    for expected, finding in zip(warnings, found, strict=True):
        assert finding.text.startswith(expected)
    folder = tmp_path / "crds"
    folder.mkdir()
    check = crd_checker(folder, "raycronjobs" if "schedule" in options else "rayjobs")
    assert check(to_yaml(objects)) == []


def test_a_failed_run_keeps_its_head(read: Read) -> None:
    spec = render(*read("/data/runs"), k8s_settings(**RELEASE, keep_failed_s=3600))[-1]["spec"]
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & spec.keys()
    done, *failed = spec["deletionStrategy"]["deletionRules"]
    assert done == DELETE
    waits = [(rule["policy"], rule["condition"]["ttlSeconds"]) for rule in failed]
    assert waits == [("DeleteWorkers", 60), ("DeleteCluster", 3600)] * 2
    assert [next(iter(rule["condition"])) for rule in failed] == ["jobStatus"] * 2 + ["jobDeploymentStatus"] * 2
    spec = render(*read("/data/runs", **ELASTIC), k8s_settings(**RELEASE, keep_failed_s=3600))[-1]["spec"]
    assert {rule["policy"] for rule in spec["deletionStrategy"]["deletionRules"]} == {"DeleteCluster"}


def test_a_submitter_in_the_heads_pod(read: Read) -> None:
    spec = render(*read("/data/runs"), k8s_settings(**RELEASE, sidecar=True))[-1]["spec"]
    assert spec["submissionMode"] == "SidecarMode"
    assert not {"submitterPodTemplate", "submitterConfig"} & spec.keys()


def test_an_elastic_run_in_a_queue(read: Read) -> None:
    job = render(*read("/data/runs", **ELASTIC), k8s_settings(**RELEASE, queue="q", elastic_queue=True))[-1]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 8)


def test_a_schedule_makes_the_same_job(read: Read) -> None:
    run = read("/data/runs")
    job = render(*run, k8s_settings(**RELEASE))[-1]
    cron_job = render(*run, k8s_settings(**RELEASE, schedule="0 3 * * *"))[-1]
    assert cron_job["kind"] == "RayCronJob"
    assert cron_job["spec"] == {"schedule": "0 3 * * *", "jobTemplate": job["spec"]}
    assert cron_job["metadata"] == job["metadata"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elastic_queue": True}, "--elastic-queue needs --queue"),
        ({"schedule": "@daily", "queue": "q"}, "--schedule excludes --queue"),
        ({"keep_failed_s": 60, "queue": "q"}, "--keep-failed-s excludes --queue"),
        ({"keep_failed_s": -1}, "--keep-failed-s"),
        ({"time_zone": "Europe/Berlin"}, "--time-zone needs --schedule"),
        ({"schedule": "@daily", "time_zone": "Berlin"}, "not a time zone"),
        ({"schedule": "daily"}, "not a schedule of cron"),
    ],
)
def test_variants_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        k8s_settings(**RELEASE | options)


def test_variants_that_do_not_fit_the_run(read: Read, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--elastic-queue is for a run whose number of workers changes"):
        render(*read("/data/runs"), k8s_settings(**RELEASE, queue="q", elastic_queue=True))
    with pytest.raises(ConfigError, match="at most 36"):
        render(*read("/data/runs", name="x" * 37), k8s_settings(**RELEASE, schedule="@daily"))
    objects = render(*read("/data/runs"), k8s_settings(**RELEASE, schedule="@daily"))
    with pytest.raises(ConfigError, match="component spot changes a RayJob"):
        write_folder(tmp_path / "folder", objects, ["spot"])
