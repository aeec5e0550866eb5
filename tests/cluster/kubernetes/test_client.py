"""apply, status, suspend, resume and delete, through Kubernetes' official client and a real HTTP server.

Each case runs against the small API server of `tests/support/kubernetes`, and a real one if `KUBEBUILDER_ASSETS`
is set. No operator runs: the tests write a RayJob's status in its place.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError
from outlast.cluster.cli.main import app
from outlast.cluster.kubernetes.client import KubernetesNamespace
from outlast.cluster.kubernetes.rayjob_successor import JobPhase, apply_notes, last_applied, next_name, phase, successor
from outlast.cluster.kubernetes.render import to_yaml
from tests.support.kubernetes.api_server import Api, small_api
from tests.support.kubernetes.manifests import Objects, rendered


def outlast(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(app, ["k8s", *arguments], input=given)


def test_apply_creates_everything(api: Api, objects: Objects) -> None:
    done = outlast("apply", "-", given=to_yaml(objects))
    assert done.exit_code == 0, done.output
    budget = ["poddisruptionbudget/my-run created"] if api.knows("policy/v1") else []
    assert done.stdout.splitlines() == [
        "configmap/my-run created",
        "serviceaccount/my-run created",
        "networkpolicy/my-run created",
        *budget,
        "persistentvolumeclaim/my-run-storage created",
        "rayjob/my-run created",
    ]
    there = api.get("my-run")
    assert there["spec"]["backoffLimit"] == 20
    assert there["metadata"]["labels"]["outlast/run"] == "my-run"
    assert api.names("v1", "persistentvolumeclaims") == ["my-run-storage"]


def test_apply_again_changes_our_fields(api: Api, objects: Objects) -> None:
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    assert cluster.apply(objects)[-1] == "rayjob/my-run applied"
    objects[-1]["spec"]["ttlSecondsAfterFinished"] = 600
    lines = cluster.apply(objects)
    assert "running: pods change only after suspend and resume" in lines[-1]
    assert api.get("my-run")["spec"]["ttlSecondsAfterFinished"] == 600


def test_fields_of_another_manager_are_kept(api: Api, objects: Objects) -> None:
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    api.patch("my-run", "another", backoffLimit=5)
    with pytest.raises(ConfigError, match="conflict") as caught:
        cluster.apply(objects)
    assert "--force" in caught.value.hint
    assert api.get("my-run")["spec"]["backoffLimit"] == 5
    cluster.apply(objects, force=True)
    assert api.get("my-run")["spec"]["backoffLimit"] == 20


def test_schema_errors(api: Api, objects: Objects) -> None:
    objects[-1]["spec"]["backoffLimit"] = "many"
    with pytest.raises(ConfigError, match="backoffLimit") as caught:
        KubernetesNamespace().apply(objects)
    assert "kubectl explain rayjob.spec.backoffLimit" in caught.value.hint
    assert api.names("ray.io/v1", "rayjobs") == []


def test_apply_lints_first(api: Api, objects: Objects) -> None:
    objects[-1]["spec"]["submissionMode"] = "K8SJobMode"
    done = outlast("apply", "-", given=to_yaml(objects))
    assert done.exit_code == 2
    assert "not one of K8sJobMode" in done.output
    assert api.names("v1", "configmaps") in ([], ["kube-root-ca.crt"])


@pytest.mark.parametrize(
    "value", ["!!binary aGVsbG8=", ".nan", "!!set {a, b}", "&a [*a]"], ids=["binary", "nan", "set", "cycle"]
)
def test_what_json_has_not_is_named_before_anything_is_applied(api: Api, objects: Objects, value: str) -> None:
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: odd}}\ndata: {{a: {value}}}\n"
    done = outlast("apply", "-", given=f"{to_yaml(objects)}---\n{text}")
    assert isinstance(done.exception, ConfigError), done.exception
    assert "configmap/odd cannot be sent as JSON" in done.exception.message
    assert api.names("v1", "serviceaccounts") in ([], ["default"])


def test_status(api: Api, objects: Objects) -> None:
    KubernetesNamespace().apply(objects)
    api.set_status(
        "my-run",
        jobDeploymentStatus="Running",
        jobStatus="RUNNING",
        failed=2,
        rayClusterStatus={"state": "ready", "readyWorkerReplicas": 1, "desiredWorkerReplicas": 1},
    )
    pod = {
        "metadata": {
            "name": "my-run-x7k2p-worker-a",
            "labels": {"outlast/run": "my-run", "ray.io/node-type": "worker"},
        },
        "spec": {"containers": [{"name": "ray-worker", "image": "outlast:1"}], "nodeName": "node-b"},
    }
    api.make("v1", "pods", pod)
    event = {
        "metadata": {"name": "my-run.1", "namespace": "ml"},
        "involvedObject": {"kind": "RayJob", "name": "my-run", "namespace": "ml"},
        "type": "Warning",
        "reason": "FailedToCreateRayCluster",
        "message": "quota exceeded",
        "lastTimestamp": "2026-01-01T00:00:00Z",
    }
    api.make("v1", "events", event)
    done = outlast("status", "my-run")
    assert done.exit_code == 0, done.output
    first, cluster, worker, warning = done.stdout.splitlines()
    assert first == "rayjob/my-run  live: Running RUNNING"
    assert cluster == "  cluster ready, workers 1 of 1; 2 of 21 job attempts failed"
    assert worker.split()[:2] == ["worker", "my-run-x7k2p-worker-a"]
    assert "node-b" in worker
    assert warning == "  warning: my-run: FailedToCreateRayCluster: quota exceeded"
    api.call("DELETE", "/api/v1/namespaces/ml/pods/my-run-x7k2p-worker-a?gracePeriodSeconds=0")
    api.call("DELETE", "/api/v1/namespaces/ml/events/my-run.1")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("RayCluster", "my-run-x7k2p"), ("Job", "my-run"), ("PersistentVolumeClaim", "my-run-storage")],
)
def test_events_of_a_refused_pod_are_those_of_its_owner(api: Api, objects: Objects, kind: str, name: str) -> None:
    KubernetesNamespace().apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Initializing", rayClusterName="my-run-x7k2p")
    for number, of in enumerate([name, "another-run-b2b2b"]):
        event = {
            "metadata": {"name": f"e.{number}", "namespace": "ml"},
            "involvedObject": {"kind": kind, "name": of, "namespace": "ml"},
            "type": "Warning",
            "reason": "FailedCreate",
            "message": "forbidden: violates PodSecurity",
        }
        api.make("v1", "events", event)
    try:
        assert [row["of"] for row in KubernetesNamespace().status("my-run")["warnings"]] == [name]
    finally:
        for number in range(2):
            api.call("DELETE", f"/api/v1/namespaces/ml/events/e.{number}")


def test_suspend_and_resume(api: Api, objects: Objects) -> None:
    KubernetesNamespace().apply(objects)
    assert outlast("suspend", "my-run").stdout == "rayjob/my-run suspended; to resume it: outlast k8s resume my-run\n"
    assert api.get("my-run")["spec"]["suspend"] is True
    assert "nothing to suspend" in outlast("suspend", "my-run").stdout
    assert outlast("resume", "my-run").stdout == "rayjob/my-run resumed\n"
    assert api.get("my-run")["spec"]["suspend"] is False
    assert outlast("resume", "my-run").stdout == "rayjob/my-run is running\n"


def test_queued_runs_are_suspended_by_kueue_only(api: Api, objects: Objects) -> None:
    objects[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    KubernetesNamespace().apply(objects)
    with pytest.raises(PreflightError, match="in a Kueue queue") as caught:
        KubernetesNamespace().suspend("my-run")
    assert "kubectl kueue stop workload" in caught.value.hint
    assert "spec.active: false" in caught.value.hint
    assert not api.get("my-run")["spec"].get("suspend")
    api.patch("my-run", "kueue", suspend=True)
    with pytest.raises(PreflightError, match="in a Kueue queue") as caught:
        KubernetesNamespace().resume("my-run")
    assert "spec.active: true" in caught.value.hint
    assert api.get("my-run")["spec"]["suspend"] is True
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    assert KubernetesNamespace().resume("my-run").startswith("rayjob/my-run-2 created")


def test_a_job_that_has_ended_is_followed_by_another(api: Api, objects: Objects) -> None:
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED", reason="JobStatusCheckTimeoutExceeded")
    assert "to resume: outlast k8s resume my-run" in cluster.apply(objects)[-1]
    assert cluster.resume("my-run") == "rayjob/my-run-2 created; it resumes where my-run ended"
    first, second = api.get("my-run"), api.get("my-run-2")
    assert second["spec"] == first["spec"]
    assert second["metadata"]["annotations"]["outlast/resumes"] == "my-run"
    assert second["metadata"]["labels"]["outlast/run"] == "my-run"
    assert "status" not in second or not second["status"].get("jobDeploymentStatus")
    assert cluster.resume("my-run") == "rayjob/my-run-2 is running"
    api.set_status("my-run-2", jobDeploymentStatus="Complete", jobStatus="STOPPED")
    assert cluster.resume("my-run").startswith("rayjob/my-run-3 created")
    api.set_status("my-run-3", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert cluster.resume("my-run") == "rayjob/my-run-3 is done"


def test_resume_uses_the_spec_applied_last(api: Api, objects: Objects) -> None:
    """It fails, resumes, fails again, and is fixed: apply writes to the first RayJob, the newest is the second."""
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    cluster.resume("my-run")
    api.set_status("my-run-2", jobDeploymentStatus="Failed", jobStatus="FAILED")
    objects[-1]["spec"]["entrypoint"] = "exec fixed"
    assert "rayjob/my-run-2 is ended and never runs again; to resume" in cluster.apply(objects)[-1]
    assert cluster.resume("my-run") == "rayjob/my-run-3 created; it resumes where my-run-2 ended"
    third = api.get("my-run-3")
    assert third["spec"]["entrypoint"] == "exec fixed"
    assert third["metadata"]["annotations"]["outlast/resumes"] == "my-run-2"


def test_apply_while_a_later_job_runs(api: Api, objects: Objects) -> None:
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    cluster.resume("my-run")
    objects[-1]["spec"]["entrypoint"] = "exec fixed"
    last = cluster.apply(objects)[-1]
    assert "rayjob/my-run-2 succeeds it and keeps its old spec (live)" in last
    assert "kubectl delete rayjob my-run-2" in last
    assert "is ended" not in last


def test_the_cluster_was_lost_with_everything(api: Api, objects: Objects) -> None:
    """Only the storage is left: applying the same objects resumes from it."""
    with pytest.raises(PreflightError, match="no RayJob of run my-run") as caught:
        KubernetesNamespace().resume("my-run")
    assert "outlast k8s apply" in caught.value.hint
    assert KubernetesNamespace().apply(objects)[-1] == "rayjob/my-run created"


def test_apply_needs_names(api: Api, objects: Objects) -> None:
    objects[-1]["metadata"] = {"generateName": "my-run-"}
    done = outlast("apply", "-", given=to_yaml(objects))
    assert isinstance(done.exception, ConfigError)
    assert "RayJob has no metadata.name" in done.exception.message
    assert "my-run" not in api.names("v1", "configmaps")


def test_apply_refuses_empty_input(api: Api) -> None:
    assert isinstance(outlast("apply", "-", given="").exception, ConfigError)


def test_another_run_of_the_same_name_is_not_replaced(api: Api, objects: Objects) -> None:
    KubernetesNamespace().apply(objects)
    theirs = copy.deepcopy(objects)
    for item in theirs:
        item["metadata"]["labels"]["outlast/run"] = item["metadata"]["annotations"]["outlast/run"] = "My_Run"
    with pytest.raises(ConfigError, match="already exists and belongs to run my-run"):
        KubernetesNamespace().apply(theirs)
    assert api.get("my-run")["metadata"]["labels"]["outlast/run"] == "my-run"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_kuberay_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(tmp_path, "claim")
    with small_api(tmp_path, without="ray.io/v1") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(PreflightError, match="no such kind of object") as caught:
            KubernetesNamespace().apply(objects)
    assert "install KubeRay" in caught.value.hint


def test_no_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_api(tmp_path) as api:
        api.kubeconfig.write_text(api.kubeconfig.read_text().replace("a-token", "another"))
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(PreflightError, match="Unauthorized") as caught:
            KubernetesNamespace()
        assert "log in again" in caught.value.hint


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    with pytest.raises(PreflightError, match="does not answer"):
        KubernetesNamespace()


def test_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PreflightError, match=r"no cluster is configured: there is no file .*/nowhere"):
        KubernetesNamespace()


def test_an_object_of_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(tmp_path, "claim")
    for item in objects:
        item["metadata"]["namespace"] = "theirs"
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(ConfigError, match="has namespace theirs, but --namespace is other") as caught:
            KubernetesNamespace(namespace="other").apply(objects)
        assert "render with --namespace other" in caught.value.hint
        assert KubernetesNamespace(namespace="theirs").apply(objects)


def test_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        assert KubernetesNamespace().namespace == "ml"
        assert KubernetesNamespace(namespace="other").namespace == "other"
        with pytest.raises(OutlastError):
            KubernetesNamespace(context="unknown")


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({}, JobPhase.LIVE),
        ({"status": {"jobDeploymentStatus": "Retrying"}}, JobPhase.LIVE),
        ({"spec": {"suspend": True}, "status": {"jobDeploymentStatus": "Suspending"}}, JobPhase.SUSPENDED),
        ({"status": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}}, JobPhase.DONE),
        ({"status": {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}}, JobPhase.ENDED),
        ({"status": {"jobDeploymentStatus": "ValidationFailed"}}, JobPhase.ENDED),
        ({"spec": {"suspend": True}, "status": {"jobDeploymentStatus": "Failed"}}, JobPhase.ENDED),
        ({"metadata": {"deletionTimestamp": "t"}, "status": {"jobDeploymentStatus": "Complete"}}, JobPhase.LEAVING),
    ],
)
def test_phases(job: dict[str, Any], expected: JobPhase) -> None:
    assert phase(job) is expected


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("my-run", [], "my-run-2"),
        ("my-run-2", [], "my-run-3"),
        ("my-run", ["my-run-2", "my-run-3"], "my-run-4"),
        ("llama-3-1", [], "llama-3-2"),
        ("a" * 47, [], "a" * 45 + "-2"),
        ("a" * 44 + "-99", [], "a" * 43 + "-100"),
    ],
)
def test_next_names(name: str, taken: list[str], expected: str) -> None:
    assert next_name(name, taken) == expected
    assert len(expected) <= 47


def test_a_number_at_the_end_of_a_name_counts_only_successors() -> None:
    job: dict[str, Any] = {"metadata": {"name": "sweep-1"}, "spec": {}}
    assert successor(job, [])["metadata"]["name"] == "sweep-1-2"
    job["metadata"] = {"name": "sweep-1-2", "annotations": {"outlast/resumes": "sweep-1"}}
    assert successor(job, ["sweep-1-3"])["metadata"]["name"] == "sweep-1-4"


def _job(name: str, *entries: tuple[str, str, str], resumes: bool = False) -> dict[str, Any]:
    rows = [{"manager": manager, "operation": operation, "time": at} for manager, operation, at in entries]
    annotations = {"outlast/resumes": "r"} if resumes else {}
    return {"metadata": {"name": name, "managedFields": rows, "annotations": annotations}}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([], [], "r"),
        ([("outlast", "Apply", "T1")], [("outlast", "Apply", "T2")], "r-2"),
        ([("outlast", "Apply", "T2")], [("outlast", "Apply", "T2")], "r"),
        ([("outlast", "Apply", "T3")], [("outlast", "Apply", "T2"), ("outlast", "Update", "T4")], "r"),
        ([("kubectl", "Apply", "T3"), ("kuberay", "Update", "T5")], [("outlast", "Apply", "T4")], "r-2"),
        ([("kubectl-client-side-apply", "Update", "T5")], [("outlast", "Apply", "T4")], "r"),
    ],
)
def test_which_was_applied_last(
    first: list[tuple[str, str, str]], second: list[tuple[str, str, str]], expected: str
) -> None:
    """Suspending a job is not an apply, and neither is a write by the operator."""
    assert last_applied([_job("r", *first), _job("r-2", *second, resumes=True)])["metadata"]["name"] == expected


def test_no_note_about_a_job_being_deleted() -> None:
    leaving = {"metadata": {"name": "r-2", "deletionTimestamp": "t"}}
    assert apply_notes({"metadata": {"name": "r"}}, leaving, changed=True) == []


def test_a_successor_is_not_suspended_and_has_no_job_id() -> None:
    job = {
        "metadata": {"name": "r", "uid": "u", "labels": {"a": "b"}, "annotations": {"n": "1", "outlast/resumes": "q"}},
        "spec": {"suspend": True, "jobId": "r-x", "entrypoint": "e"},
        "status": {"failed": 3},
    }
    assert successor(job, []) == {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "r-2", "labels": {"a": "b"}, "annotations": {"n": "1", "outlast/resumes": "r"}},
        "spec": {"entrypoint": "e"},
    }
