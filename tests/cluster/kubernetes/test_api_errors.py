"""Refusals of an API server: each names what was refused, and has the hint that helps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError
from outlast.cluster.cli.main import app
from outlast.cluster.kubernetes.api_errors import Refusal, error_for
from outlast.cluster.kubernetes.client import KubernetesNamespace
from outlast.cluster.kubernetes.render import to_yaml
from tests.support.kubernetes.api_server import KINDS, Api, small_api
from tests.support.kubernetes.manifests import Objects, rendered
from tests.support.kubernetes.real_api_server import wait_for_kind

TYPED = "failed to create typed patch object (ml/my-run; ray.io/v1, Kind=RayJob): "
POLICY = "rayjobs.ray.io \"my-run\" is forbidden: ValidatingAdmissionPolicy 'gpu' with binding 'b' denied request: no"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("backoffLimit", "many", "rayjob/my-run: spec.backoffLimit: expected numeric (int or float), got string"),
        ("backOffLimit", 3, "rayjob/my-run: spec.backOffLimit: field not declared in schema"),
        ("suspend", "yes", "rayjob/my-run: spec.suspend: expected boolean, got string"),
    ],
)
def test_the_typed_patch_names_the_field(
    api: Api, objects: Objects, tmp_path: Path, key: str, value: object, expected: str
) -> None:
    """Server-side apply answers with status 500, as if the server were at fault."""
    objects[-1]["spec"][key] = value
    with pytest.raises(ConfigError) as caught:
        KubernetesNamespace().apply(objects)
    assert caught.value.message == expected
    assert caught.value.exit_code == 2
    assert f"kubectl explain rayjob.spec.{key}" in caught.value.hint
    assert "auth can-i" not in caught.value.hint


def test_every_wrong_field_is_named(api: Api, objects: Objects) -> None:
    objects[-1]["spec"] |= {"backoffLimit": "many", "backOffLimit": 3}
    with pytest.raises(ConfigError) as caught:
        KubernetesNamespace().apply(objects)
    assert "spec.backoffLimit: expected" in caught.value.message
    assert "spec.backOffLimit: field not declared" in caught.value.message


@pytest.mark.parametrize(
    ("status", "message", "kind", "expected", "hint"),
    [
        (401, "Unauthorized", "rayjob", PreflightError, "log in again"),
        (
            403,
            'pods "x" is forbidden: exceeded quota: team, requested: count/rayjobs.ray.io=1, used: 5, limited: 5',
            "rayjob",
            PreflightError,
            "kubectl describe quota,limitrange --namespace ml",
        ),
        (
            403,
            'rayjobs.ray.io "r" is forbidden: User "bob" cannot patch resource "rayjobs"',
            "rayjob",
            PreflightError,
            "kubectl auth can-i --list --namespace ml",
        ),
        (
            400,
            'admission webhook "policy.example" denied the request: images must be signed',
            "rayjob",
            ConfigError,
            "an admission policy of this cluster refuses",
        ),
        (422, POLICY, "rayjob", ConfigError, "an admission policy of this cluster refuses"),
        (
            500,
            'Internal error occurred: failed calling webhook "mrayjob.kb.io": connect: connection refused',
            "rayjob",
            PreflightError,
            "the webhook's own service does not work",
        ),
        (
            422,
            'PersistentVolumeClaim "c" is invalid: spec: Forbidden: spec is immutable after creation except …',
            "persistentvolumeclaim",
            ConfigError,
            "--claim NAME",
        ),
        (
            422,
            "spec.resources.requests.storage: Forbidden: field can not be less than status.capacity",
            "persistentvolumeclaim",
            ConfigError,
            "can at most grow",
        ),
        (
            403,
            'persistentvolumeclaims "c" is forbidden: only dynamically provisioned pvc can be resized',
            "persistentvolumeclaim",
            ConfigError,
            "can at most grow",
        ),
        (422, "spec.managedBy: the managedBy field is immutable", "rayjob", ConfigError, "delete the object and apply"),
        (
            403,
            "unable to create new content in namespace ml because it is being terminated",
            "configmap",
            PreflightError,
            "namespace ml is being deleted",
        ),
        (409, 'Apply failed with 1 conflict: conflict with "kubectl": .spec.x', "rayjob", ConfigError, "--force"),
        (409, "the object has been modified; please apply your changes", "rayjob", ConfigError, "try again"),
        (400, 'strict decoding error: unknown field "spec.foo"', "configmap", ConfigError, "configmap.spec.foo"),
        (429, "too many requests", "rayjob", PreflightError, "try again in a moment"),
        (500, "etcdserver: request timed out", "rayjob", PreflightError, "/readyz"),
        (500, f"{TYPED}.spec.x[0].y: expected string, got &value.x", "rayjob", ConfigError, "rayjob.spec.x.y"),
        (500, f"{TYPED}something else", "rayjob", ConfigError, "kubectl explain rayjob"),
    ],
)
def test_hints(status: int, message: str, kind: str, expected: type[OutlastError], hint: str) -> None:
    error = error_for(Refusal(status, message, f"{kind}/r", "ml"))
    assert type(error).exit_code == expected.exit_code
    assert hint in error.hint
    assert error.message.startswith(f"{kind}/r: ")


def test_a_quota_is_met_through_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was applied before is named, and applying again goes on."""
    objects = rendered(tmp_path, "claim")
    quota = (403, 'rayjobs.ray.io "my-run" is forbidden: exceeded quota: team, limited: 0')
    with small_api(tmp_path, refusals={"rayjobs": quota}) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(PreflightError, match="exceeded quota: team") as caught:
            KubernetesNamespace().apply(objects)
        assert "kubectl describe quota" in caught.value.hint
        assert "stays from this apply: configmap/my-run created, serviceaccount/my-run created" in caught.value.hint
        assert "rayjob" not in caught.value.hint.partition("stays")[2]
        assert api.names("v1", "configmaps") == ["my-run"]
        with pytest.raises(PreflightError, match="exceeded quota") as caught:
            KubernetesNamespace().apply(objects[-1:])
        assert "stays" not in caught.value.hint


def test_a_claim_that_cannot_change(api: Api, objects: Objects) -> None:
    KubernetesNamespace().apply(objects)
    [claim] = [item for item in objects if item["kind"] == "PersistentVolumeClaim"]
    claim["spec"]["storageClassName"] = "another"
    done = CliRunner().invoke(app, ["k8s", "apply", "-"], input=to_yaml(objects))
    assert isinstance(done.exception, ConfigError)
    assert "immutable" in done.exception.message
    assert "--claim NAME" in done.exception.hint
    assert "stays from this apply: configmap/my-run applied" in done.exception.hint


def test_a_kind_that_appears_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new CRD is not there at once: the tests wait, the client has a hint."""
    version = "ray.io/v1"
    objects = rendered(tmp_path, "claim")
    with small_api(tmp_path, late={version: 8}) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        with pytest.raises(PreflightError, match="no such kind of object") as caught:
            KubernetesNamespace().apply(objects[-1:])
        assert "install KubeRay" in caught.value.hint
        wait_for_kind(api, version, "RayJob", KINDS[version]["RayJob"], time.monotonic() + 60)
        assert KubernetesNamespace().apply(objects[-1:]) == ["rayjob/my-run created"]
