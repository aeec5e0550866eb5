"""apply, status, suspend, resume and delete, through Kubernetes' official client and a real HTTP server.

Each case runs against the small API server of `k8s_api.py`, and against a real one where `KUBEBUILDER_ASSETS` has it.
No operator is there: what it would write into a RayJob's status, the tests write.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError
from outlast.cluster.cli.main import app
from outlast.cluster.kubernetes.client import Cluster
from outlast.cluster.kubernetes.rayjob_sequence import JobPhase, applied_last, consequences, next_name, phase, successor
from outlast.cluster.kubernetes.render import to_yaml
from tests.support.kubernetes.api_server import Api, assets, real_api, small_api
from tests.support.kubernetes.manifests import Objects, rendered


@pytest.fixture(scope="module", params=["small", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with ExitStack() as stack:
        if request.param == "small":
            yield stack.enter_context(small_api(tmp_path_factory.mktemp("api")))
            return
        binaries = assets()
        if binaries is None:
            pytest.skip("KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver")
        yield stack.enter_context(real_api(binaries))


@pytest.fixture
def api(server: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """The server, empty of this run's objects again afterwards."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    yield server
    with suppress(PreflightError):  # a test may have left nothing
        Cluster().delete("my-run", storage=True)


@pytest.fixture
def objects(server: Api, tmp_path: Path) -> Objects:
    """A run's objects, without the PodDisruptionBudget where the server is older than its kind (1.21)."""
    return [item for item in rendered(tmp_path, "claim") if server.knows(item["apiVersion"])]


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


def test_apply_again_changes_what_is_ours(api: Api, objects: Objects) -> None:
    cluster = Cluster()
    cluster.apply(objects)
    assert cluster.apply(objects)[-1] == "rayjob/my-run applied"
    objects[-1]["spec"]["ttlSecondsAfterFinished"] = 600
    said = cluster.apply(objects)
    assert "at work: its pods change when it is suspended and resumed" in said[-1]
    assert api.get("my-run")["spec"]["ttlSecondsAfterFinished"] == 600


def test_what_somebody_else_has_set_is_kept(api: Api, objects: Objects) -> None:
    cluster = Cluster()
    cluster.apply(objects)
    api.patch("my-run", "somebody", backoffLimit=5)
    with pytest.raises(ConfigError, match="conflict") as caught:
        cluster.apply(objects)
    assert "--force" in caught.value.hint
    assert api.get("my-run")["spec"]["backoffLimit"] == 5
    cluster.apply(objects, force=True)
    assert api.get("my-run")["spec"]["backoffLimit"] == 20


def test_what_the_schema_refuses(api: Api, objects: Objects) -> None:
    objects[-1]["spec"]["backoffLimit"] = "many"
    with pytest.raises(ConfigError, match="backoffLimit") as caught:
        Cluster().apply(objects)
    assert "outlast k8s lint" in caught.value.hint
    assert api.names("ray.io/v1", "rayjobs") == []


def test_apply_looks_first(api: Api, objects: Objects) -> None:
    objects[-1]["spec"]["submissionMode"] = "K8SJobMode"
    done = outlast("apply", "-", given=to_yaml(objects))
    assert done.exit_code == 2
    assert "none of K8sJobMode" in done.output
    assert api.names("v1", "configmaps") in ([], ["kube-root-ca.crt"])


def test_status(api: Api, objects: Objects) -> None:
    Cluster().apply(objects)
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
    assert cluster == "  cluster ready, workers 1 of 1; 2 of 21 tries failed"
    assert worker.split()[:2] == ["worker", "my-run-x7k2p-worker-a"]
    assert "node-b" in worker
    assert warning == "  warning: my-run: FailedToCreateRayCluster: quota exceeded"
    api.call("DELETE", "/api/v1/namespaces/ml/pods/my-run-x7k2p-worker-a?gracePeriodSeconds=0")
    api.call("DELETE", "/api/v1/namespaces/ml/events/my-run.1")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("RayCluster", "my-run-x7k2p"), ("Job", "my-run"), ("PersistentVolumeClaim", "my-run-storage")],
)
def test_a_refused_pod_is_told_of_by_what_was_to_have_it(api: Api, objects: Objects, kind: str, name: str) -> None:
    Cluster().apply(objects)
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
        assert [row["of"] for row in Cluster().status("my-run")["warnings"]] == [name]
    finally:
        for number in range(2):
            api.call("DELETE", f"/api/v1/namespaces/ml/events/e.{number}")


def test_suspend_and_resume(api: Api, objects: Objects) -> None:
    Cluster().apply(objects)
    assert outlast("suspend", "my-run").stdout == "rayjob/my-run suspended; go on with: outlast k8s resume my-run\n"
    assert api.get("my-run")["spec"]["suspend"] is True
    assert "nothing to suspend" in outlast("suspend", "my-run").stdout
    assert outlast("resume", "my-run").stdout == "rayjob/my-run goes on\n"
    assert api.get("my-run")["spec"]["suspend"] is False
    assert outlast("resume", "my-run").stdout == "rayjob/my-run is at work\n"


def test_kueue_suspends_what_is_in_its_queue(api: Api, objects: Objects) -> None:
    objects[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    Cluster().apply(objects)
    with pytest.raises(PreflightError, match="in a queue of Kueue") as caught:
        Cluster().suspend("my-run")
    assert "kubectl kueue stop workload" in caught.value.hint
    assert "spec.active: false" in caught.value.hint
    assert not api.get("my-run")["spec"].get("suspend")
    api.patch("my-run", "kueue", suspend=True)
    with pytest.raises(PreflightError, match="in a queue of Kueue") as caught:
        Cluster().resume("my-run")
    assert "spec.active: true" in caught.value.hint
    assert api.get("my-run")["spec"]["suspend"] is True
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    assert Cluster().resume("my-run").startswith("rayjob/my-run-2 created")


def test_a_job_that_has_ended_is_followed_by_another(api: Api, objects: Objects) -> None:
    cluster = Cluster()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED", reason="JobStatusCheckTimeoutExceeded")
    assert "go on with: outlast k8s resume my-run" in cluster.apply(objects)[-1]
    assert cluster.resume("my-run") == "rayjob/my-run-2 created; it goes on where my-run ended"
    first, second = api.get("my-run"), api.get("my-run-2")
    assert second["spec"] == first["spec"]
    assert second["metadata"]["annotations"]["outlast/resumes"] == "my-run"
    assert second["metadata"]["labels"]["outlast/run"] == "my-run"
    assert "status" not in second or not second["status"].get("jobDeploymentStatus")
    assert cluster.resume("my-run") == "rayjob/my-run-2 is at work"
    api.set_status("my-run-2", jobDeploymentStatus="Complete", jobStatus="STOPPED")
    assert cluster.resume("my-run").startswith("rayjob/my-run-3 created")
    api.set_status("my-run-3", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert cluster.resume("my-run") == "rayjob/my-run-3 is done"


def test_a_mended_job_is_what_goes_on(api: Api, objects: Objects) -> None:
    """It fails, goes on, fails again, and is mended: apply writes to the first RayJob, the newest is the second."""
    cluster = Cluster()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    cluster.resume("my-run")
    api.set_status("my-run-2", jobDeploymentStatus="Failed", jobStatus="FAILED")
    objects[-1]["spec"]["entrypoint"] = "exec mended"
    assert "rayjob/my-run-2 is ended, and stays so; go on with" in cluster.apply(objects)[-1]
    assert cluster.resume("my-run") == "rayjob/my-run-3 created; it goes on where my-run-2 ended"
    third = api.get("my-run-3")
    assert third["spec"]["entrypoint"] == "exec mended"
    assert third["metadata"]["annotations"]["outlast/resumes"] == "my-run-2"


def test_apply_while_a_later_job_is_at_work(api: Api, objects: Objects) -> None:
    cluster = Cluster()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    cluster.resume("my-run")
    objects[-1]["spec"]["entrypoint"] = "exec mended"
    last = cluster.apply(objects)[-1]
    assert "rayjob/my-run-2 goes on for it, and is live" in last
    assert "kubectl delete rayjob my-run-2" in last
    assert "is ended" not in last


def test_the_cluster_was_lost_with_everything(api: Api, objects: Objects) -> None:
    """What is left is the storage: the same objects again go on from it."""
    with pytest.raises(PreflightError, match="no RayJob of run my-run") as caught:
        Cluster().resume("my-run")
    assert "outlast k8s apply" in caught.value.hint
    assert Cluster().apply(objects)[-1] == "rayjob/my-run created"


def test_delete_keeps_the_checkpoints(api: Api, objects: Objects) -> None:
    cluster = Cluster()
    cluster.apply(objects)
    said = cluster.delete("my-run")
    assert said[0] == "rayjob/my-run deleted"
    assert said[-1] == "claim my-run-storage stays, with the checkpoints; --storage deletes it too"
    assert api.names("ray.io/v1", "rayjobs") == []
    assert "my-run" not in api.names("v1", "configmaps")
    assert api.names("v1", "persistentvolumeclaims") == ["my-run-storage"]
    assert "persistentvolumeclaim/my-run-storage deleted" in cluster.delete("my-run", storage=True)


def test_delete_of_what_is_not_there(api: Api) -> None:
    done = outlast("delete", "nope")
    assert done.stdout == ""
    assert isinstance(done.exception, PreflightError)
    assert done.exception.message == "namespace ml has no objects of run nope"


def test_apply_needs_names(api: Api, objects: Objects) -> None:
    objects[-1]["metadata"] = {"generateName": "my-run-"}
    done = outlast("apply", "-", given=to_yaml(objects))
    assert isinstance(done.exception, ConfigError)
    assert "RayJob has no metadata.name" in done.exception.message
    assert "my-run" not in api.names("v1", "configmaps")


def test_a_render_that_failed_is_no_apply_of_nothing(api: Api) -> None:
    assert isinstance(outlast("apply", "-", given="").exception, ConfigError)


def test_others_are_left_alone(api: Api, objects: Objects, tmp_path: Path) -> None:
    Cluster().apply(objects)
    api.make("v1", "configmaps", {"metadata": {"name": "theirs", "labels": {"outlast/run": "my-run"}}, "data": {}})
    Cluster().delete("my-run", storage=True)
    assert "theirs" in api.names("v1", "configmaps")
    api.call("DELETE", "/api/v1/namespaces/ml/configmaps/theirs")


def test_another_run_of_the_same_name_is_not_replaced(api: Api, objects: Objects) -> None:
    Cluster().apply(objects)
    theirs = copy.deepcopy(objects)
    for item in theirs:
        item["metadata"]["labels"]["outlast/run"] = "My_Run"
    with pytest.raises(ConfigError, match="is there already, and belongs to run my-run"):
        Cluster().apply(theirs)
    assert api.get("my-run")["metadata"]["labels"]["outlast/run"] == "my-run"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_kuberay_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(tmp_path, "claim")
    with small_api(tmp_path, without="ray.io/v1") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(PreflightError, match="does not know this kind") as caught:
            Cluster().apply(objects)
    assert "install KubeRay" in caught.value.hint


def test_no_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_api(tmp_path) as api:
        api.kubeconfig.write_text(api.kubeconfig.read_text().replace("a-token", "another"))
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(PreflightError, match="Unauthorized"):
            Cluster()


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    with pytest.raises(PreflightError, match="does not answer"):
        Cluster()


def test_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PreflightError, match="no cluster is configured"):
        Cluster()


def test_an_object_of_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered(tmp_path, "claim")
    for item in objects:
        item["metadata"]["namespace"] = "theirs"
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(ConfigError, match="goes to namespace theirs, not other") as caught:
            Cluster(namespace="other").apply(objects)
        assert "render with --namespace other" in caught.value.hint
        assert Cluster(namespace="theirs").apply(objects)


def test_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        assert Cluster().namespace == "ml"
        assert Cluster(namespace="other").namespace == "other"
        with pytest.raises(OutlastError):
            Cluster(context="of-nobody")


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


def test_a_number_at_the_end_of_a_name_counts_only_what_went_on() -> None:
    job: dict[str, Any] = {"metadata": {"name": "sweep-1"}, "spec": {}}
    assert successor(job, [])["metadata"]["name"] == "sweep-1-2"
    job["metadata"] = {"name": "sweep-1-2", "annotations": {"outlast/resumes": "sweep-1"}}
    assert successor(job, ["sweep-1-3"])["metadata"]["name"] == "sweep-1-4"


def _job(name: str, *entries: tuple[str, str, str], resumes: bool = False) -> dict[str, Any]:
    rows = [{"manager": manager, "operation": operation, "time": at} for manager, operation, at in entries]
    notes = {"outlast/resumes": "r"} if resumes else {}
    return {"metadata": {"name": name, "managedFields": rows, "annotations": notes}}


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
    """To suspend a job is no apply, and neither is what the operator writes."""
    assert applied_last([_job("r", *first), _job("r-2", *second, resumes=True)])["metadata"]["name"] == expected


def test_a_job_that_is_being_deleted_is_no_reason_to_warn() -> None:
    leaving = {"metadata": {"name": "r-2", "deletionTimestamp": "t"}}
    assert consequences({"metadata": {"name": "r"}}, leaving, changed=True) == []


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
