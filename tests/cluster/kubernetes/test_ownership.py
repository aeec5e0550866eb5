"""Deleting a run: what outlast made for it and can prove, and nothing else."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.cluster.cli.main import app
from outlast.cluster.kubernetes.client import KubernetesNamespace
from outlast.cluster.kubernetes.ownership import ID_ANNOTATION, Deletion, identity_of, owner
from outlast.cluster.kubernetes.render import render, to_yaml
from outlast.cluster.kubernetes.settings import k8s_settings
from tests.support.kubernetes.api_server import Api, small_api
from tests.support.kubernetes.manifests import RELEASE, Objects, read_run, rendered
from tests.support.terminal import on_terminal

RUN_LABEL = "outlast/run"


def outlast(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(app, ["k8s", *arguments], input=given)


def left(api: Api) -> list[str]:
    """Every object of the kinds that outlast makes, as kind/name."""
    rows = [
        f"{plural}/{name}"
        for plural, version in (
            ("raycronjobs", "ray.io/v1"),
            ("rayjobs", "ray.io/v1"),
            ("configmaps", "v1"),
            ("serviceaccounts", "v1"),
            ("networkpolicies", "networking.k8s.io/v1"),
            ("persistentvolumeclaims", "v1"),
        )
        for name in api.names(version, plural)
        if name not in ("kube-root-ca.crt", "default")
    ]
    return sorted(rows)


def without_annotations(objects: Objects) -> Objects:
    """The objects as releases before the annotation rendered them."""
    old = copy.deepcopy(objects)
    for item in old:
        del item["metadata"]["annotations"]
    return old


def delete(run: str, **options: Any) -> list[str]:
    cluster = KubernetesNamespace()
    return list(cluster.delete(cluster.plan_deletion(run, **options)))


def test_delete_keeps_the_checkpoints(api: Api, objects: Objects) -> None:
    KubernetesNamespace().apply(objects)
    done = outlast("delete", "my-run")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "rayjob/my-run deleted"
    assert lines[-1] == "claim my-run-storage kept, with the checkpoints; --storage deletes it too"
    assert left(api) == ["persistentvolumeclaims/my-run-storage"]
    assert delete("my-run", storage=True) == ["persistentvolumeclaim/my-run-storage deleted"]


def test_delete_of_an_unknown_run(api: Api) -> None:
    done = outlast("delete", "nope")
    assert done.stdout == ""
    assert isinstance(done.exception, PreflightError)
    assert done.exception.message == "namespace ml has no objects of run nope"


@pytest.mark.parametrize("name", ["", " ", "\t", "/", "../", "s3://bucket//", "*", "a,b", "my-run\n"])
@pytest.mark.parametrize("verb", ["status", "suspend", "resume", "delete"])
def test_no_verb_takes_an_empty_name(api: Api, objects: Objects, verb: str, name: str) -> None:
    KubernetesNamespace().apply(objects)
    before = left(api)
    done = outlast(verb, name)
    assert isinstance(done.exception, ConfigError), done.output
    assert "names no run" in done.exception.message or "is not usable" in done.exception.message
    cluster = KubernetesNamespace()
    with pytest.raises(ConfigError):
        cluster.plan_deletion(name) if verb == "delete" else getattr(cluster, verb)(name)
    assert left(api) == before


def test_every_rendered_object_is_annotated(tmp_path: Path) -> None:
    for item in rendered(tmp_path, "claim"):
        assert owner(item) == identity_of("my-run", "/data/runs"), item["kind"]


def test_the_id_is_of_the_name_and_the_storage() -> None:
    first = identity_of("my-run", "s3://bucket/runs")
    assert identity_of("my-run", "s3://bucket/runs/") == first
    assert len({first.id, identity_of("my-run", "s3://b/runs").id, identity_of("other", "s3://bucket/runs").id}) == 3
    assert "bucket" not in str(first.id)


@pytest.mark.parametrize("label", [RUN_LABEL, "app.kubernetes.io/name"])
def test_a_changed_label_hides_no_object(api: Api, objects: Objects, label: str) -> None:
    """`--label` and kustomize's commonLabels change labels of the RayJob, or of all objects."""
    for item in objects:
        item["metadata"]["labels"][label] = "platform"
    KubernetesNamespace().apply(objects)
    assert KubernetesNamespace().status("my-run")["jobs"][0]["name"] == "my-run"
    assert outlast("suspend", "my-run").stdout.startswith("rayjob/my-run suspended")
    done = outlast("delete", "my-run", "--storage")
    assert done.exit_code == 0, done.output
    assert left(api) == []


def test_objects_of_others_with_the_labels_of_the_run(api: Api, objects: Objects) -> None:
    """A label is no proof, whoever set it."""
    KubernetesNamespace().apply(objects)
    labels = {"app.kubernetes.io/name": "outlast", RUN_LABEL: "my-run"}
    api.make("v1", "configmaps", {"metadata": {"name": "theirs", "labels": labels}, "data": {}})
    done = outlast("delete", "my-run", "--storage")
    assert done.exit_code == 0, done.output
    assert "configmap/theirs kept: it has the run's label, but not the annotation" in done.stdout
    assert done.stdout.splitlines()[-1] == "if these are yours: kubectl delete --namespace ml configmap/theirs"
    assert left(api) == ["configmaps/theirs"]


def test_objects_of_an_older_release_are_left_and_named(api: Api, objects: Objects) -> None:
    """They have no annotation: the run is found by its label, and deleted by the user with kubectl."""
    KubernetesNamespace().apply(without_annotations(objects))
    assert outlast("suspend", "my-run").stdout.startswith("rayjob/my-run suspended")
    before = left(api)
    done = outlast("delete", "my-run")
    assert isinstance(done.exception, PreflightError)
    assert "nothing proves" in done.exception.message
    assert done.exception.hint.startswith("kubectl delete --namespace ml rayjob/my-run networkpolicy/my-run")
    assert "claim" not in done.exception.hint
    assert left(api) == before
    done = outlast("delete", "my-run", "--storage")
    assert isinstance(done.exception, PreflightError)
    assert "persistentvolumeclaim/my-run-storage" in done.exception.hint
    KubernetesNamespace().apply(objects)  # rendered again: the proof is there
    assert outlast("delete", "my-run", "--storage").exit_code == 0
    assert left(api) == []


def test_two_runs_of_one_name(api: Api, tmp_path: Path) -> None:
    """Two people, one namespace, one run name: storages tell the runs apart."""
    files = {}
    for who, storage in (("ann", "/data/ann"), ("bob", "/data/bob")):
        folder = tmp_path / who
        folder.mkdir()
        objects = render(*read_run(folder, storage), k8s_settings(**RELEASE, name=f"llama-{who}"))
        KubernetesNamespace().apply([item for item in objects if api.knows(item["apiVersion"])])
        files[who] = str(folder / "run.yaml")
    before = left(api)
    for verb in ("status", "suspend", "resume", "delete"):
        done = outlast(verb, "my-run")
        assert isinstance(done.exception, ConfigError), verb
        assert "rayjob/llama-ann" in done.exception.message
        assert "rayjob/llama-bob" in done.exception.message
        assert "give the run file" in done.exception.hint
    assert left(api) == before
    assert outlast("suspend", files["bob"]).stdout.startswith("rayjob/llama-bob suspended")
    done = outlast("delete", files["ann"], "--storage")
    assert done.exit_code == 0, done.output
    assert [row for row in left(api) if "ann" in row] == []
    assert [row for row in left(api) if "bob" in row] == [row for row in before if "bob" in row]


def test_apply_takes_over_no_run_of_the_same_name(api: Api, objects: Objects, tmp_path: Path) -> None:
    """The first run's RayJob would go on in the second one's storage, from step 0."""
    KubernetesNamespace().apply(objects)
    before = api.get("my-run")["spec"]
    (tmp_path / "bob").mkdir()
    theirs = render(*read_run(tmp_path / "bob", "/data/bob"), k8s_settings(**RELEASE))
    with pytest.raises(ConfigError, match="belongs to another run named my-run") as caught:
        KubernetesNamespace().apply(theirs)
    assert "--name" in caught.value.hint
    assert "outlast k8s delete my-run" in caught.value.hint
    assert api.get("my-run")["spec"] == before


def test_a_schedule_is_deleted_first(api: Api, tmp_path: Path) -> None:
    """Left, it would start RayJobs whose ConfigMap and account are gone."""
    objects = render(*read_run(tmp_path, "/data/runs"), k8s_settings(**RELEASE, schedule="@daily"))
    KubernetesNamespace().apply([item for item in objects if api.knows(item["apiVersion"])])
    for verb in ("status", "suspend", "resume"):
        done = outlast(verb, "my-run")
        assert isinstance(done.exception, PreflightError), verb
        assert done.exception.message.startswith("raycronjob/my-run makes the RayJobs of run my-run")
    assert delete("my-run")[0] == "raycronjob/my-run deleted"
    assert left(api) == ["persistentvolumeclaims/my-run-storage"]


@pytest.mark.parametrize(
    "server", [{"without": "RayCronJob"}, {"refusals": {"list raycronjobs": (403, "raycronjobs is forbidden")}}]
)
def test_a_cluster_without_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: dict[str, Any]) -> None:
    """KubeRay before 1.6 has no RayCronJob; a role for RayJobs may not list them."""
    with small_api(tmp_path, **server) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        KubernetesNamespace().apply(rendered(tmp_path, "claim"))
        assert delete("my-run")[0] == "rayjob/my-run deleted"


def test_a_run_file_of_another_storage(api: Api, objects: Objects, tmp_path: Path) -> None:
    KubernetesNamespace().apply(objects)
    before = left(api)
    (tmp_path / "moved").mkdir()
    read_run(tmp_path / "moved", "s3://bucket/runs")
    done = outlast("delete", str(tmp_path / "moved" / "run.yaml"))
    assert isinstance(done.exception, ConfigError)
    assert "rendered with another checkpoint.storage" in done.exception.message
    assert left(api) == before


def test_dry_run(api: Api, objects: Objects) -> None:
    KubernetesNamespace().apply(objects)
    before = left(api)
    done = outlast("delete", "my-run", "--dry-run")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "rayjob/my-run would be deleted"
    assert "claim my-run-storage kept" in done.stdout
    assert left(api) == before


@pytest.mark.parametrize(
    ("answer", "options", "code"),
    [
        ("n\n", [], 1),
        ("what?\nn\n", [], 1),
        ("\n", [], 1),
        ("\x04", [], 1),  # Ctrl-D
        ("\x03", [], 1),  # Ctrl-C
        ("y\n", [], 0),
        ("", ["--yes"], 0),
    ],
    ids=["no", "garbage", "enter", "end", "interrupt", "yes", "option"],
)
def test_a_terminal_is_asked(api: Api, objects: Objects, answer: str, options: list[str], code: int) -> None:
    KubernetesNamespace().apply(objects)
    before = left(api)
    ended, screen = on_terminal(
        [sys.executable, "-m", "outlast.cluster.cli", "k8s", "delete", "my-run", *options],
        "[y/N]: " if answer else "",
        answer,
    )
    assert ended == code, screen
    assert ("rayjob/my-run would be deleted" in screen) == (not options)
    assert (left(api) != before) == (code == 0)


def test_a_second_delete_says_what_is_left(api: Api, objects: Objects) -> None:
    """KubeRay's finalizer holds a RayJob while its pods commit; a protected claim stays until no pod mounts it."""
    KubernetesNamespace().apply(objects)
    api.set_metadata("ray.io/v1", "rayjobs", "my-run", finalizers=["ray.io/rayjob-finalizer"])
    pod = {
        "metadata": {"name": "my-run-worker", "labels": {RUN_LABEL: "my-run"}},
        "spec": {"containers": [{"name": "ray-worker", "image": "outlast:1"}]},
    }
    api.make("v1", "pods", pod)
    assert outlast("delete", "my-run").exit_code == 0
    done = outlast("delete", "my-run")
    assert done.exit_code == 0, done.output
    first, pods, claim = done.stdout.splitlines()
    assert first.startswith("rayjob/my-run is being deleted since 20")
    assert first.endswith("; it waits for ray.io/rayjob-finalizer")
    assert pods == "1 pod of the run not ended yet"
    assert claim.startswith("claim my-run-storage kept")


def test_an_object_replaced_meanwhile_is_kept(api: Api, objects: Objects) -> None:
    """Between the question and the answer somebody may make a new object of the name."""
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    plan = cluster.plan_deletion("my-run")
    api.call("DELETE", "/api/v1/namespaces/ml/configmaps/my-run")
    api.call("DELETE", "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies/my-run")
    api.make("v1", "configmaps", {"metadata": {"name": "my-run"}, "data": {"theirs": "yes"}})
    lines = list(cluster.delete(plan))
    assert "networkpolicy/my-run is gone already" in lines
    assert "configmap/my-run kept: it was replaced in the meantime; run the command again to look at it" in lines
    assert "configmaps/my-run" in left(api)


def test_apply_takes_over_no_object_of_others(api: Api, objects: Objects) -> None:
    """It would carry the annotation afterwards, and be deleted with the run."""
    api.make("v1", "configmaps", {"metadata": {"name": "my-run"}, "data": {"theirs": "yes"}})
    with pytest.raises(ConfigError, match="configmap/my-run already exists and was not made by outlast") as caught:
        KubernetesNamespace().apply(objects)
    assert "--name" in caught.value.hint
    assert left(api) == ["configmaps/my-run"]


def test_a_successor_is_owned_too(api: Api, objects: Objects) -> None:
    cluster = KubernetesNamespace()
    cluster.apply(objects)
    api.set_status("my-run", jobDeploymentStatus="Failed", jobStatus="FAILED")
    cluster.resume("my-run")
    assert {"rayjob/my-run deleted", "rayjob/my-run-2 deleted"} <= set(delete("my-run"))


def test_kustomize_changes_names_and_labels(api: Api, objects: Objects, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    (tmp_path / "rendered.yaml").write_text(to_yaml(objects))
    body = {
        "resources": ["rendered.yaml"],
        "namePrefix": "dev-",
        "nameSuffix": "-v2",
        "commonLabels": {RUN_LABEL: "platform", "app.kubernetes.io/name": "theirs"},
        "commonAnnotations": {"team": "nlp"},
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(body))
    built = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, check=True).stdout
    changed = list(yaml.safe_load_all(built))
    assert {item["metadata"]["name"] for item in changed} == {"dev-my-run-v2", "dev-my-run-storage-v2"}
    KubernetesNamespace().apply(changed)
    assert "rayjob/dev-my-run-v2 deleted" in delete("my-run", storage=True)
    assert left(api) == []


def test_an_annotation_without_an_id_is_no_proof() -> None:
    assert owner({"metadata": {"annotations": {RUN_LABEL: "my-run"}}}) is None
    assert owner({"metadata": {"annotations": {RUN_LABEL: "", ID_ANNOTATION: "x"}}}) is None
    assert owner({"metadata": {"annotations": {RUN_LABEL: 3, ID_ANNOTATION: "x"}}}) is None
    assert owner({"metadata": {}}) is None
    assert Deletion(identity_of("a", "b"), "ml").is_empty
