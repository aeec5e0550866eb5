"""Where the client finds its cluster and credentials: a client library that replaces today's must pass all of these."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing.errors import PreflightError
from outlast.cluster.kubernetes import kubeconfig
from outlast.cluster.kubernetes.client import KubernetesNamespace
from tests.support.kubernetes.api_server import TOKEN, Api, small_api


def rewrite(api: Api, user: dict[str, Any], cluster: dict[str, Any] | None = None) -> None:
    """Rewrites the user, and adds to the cluster."""
    body = yaml.safe_load(api.kubeconfig.read_text())
    body["users"][0]["user"] = user
    body["clusters"][0]["cluster"] |= cluster or {}
    api.kubeconfig.write_text(yaml.safe_dump(body))


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    with small_api(tmp_path) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        yield api


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """The small server with a certificate that only its own CA file vouches for."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with small_api(tmp_path, tls=context, certificate=certificate) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        yield api


def plugin(folder: Path, version: str, status: dict[str, Any], name: str = "plugin") -> dict[str, Any]:
    """A credential plugin that answers with `status`, and a user who has it."""
    answer = {"kind": "ExecCredential", "apiVersion": f"client.authentication.k8s.io/{version}", "status": status}
    script = folder / f"{name}.py"
    script.write_text(f"import os\nassert os.environ['MODE'] == 'test'\nprint({json.dumps(answer)!r})\n")
    return {
        "exec": {
            "apiVersion": f"client.authentication.k8s.io/{version}",
            "command": sys.executable,
            "args": [str(script)],
            "env": [{"name": "MODE", "value": "test"}],
            "interactiveMode": "Never",
        }
    }


def test_a_context_has_its_namespace(plain: Api) -> None:
    body = yaml.safe_load(plain.kubeconfig.read_text())
    body["contexts"] += [
        {"name": "prod", "context": {"cluster": "test", "user": "test", "namespace": "prod"}},
        {"name": "bare", "context": {"cluster": "test", "user": "test"}},
    ]
    plain.kubeconfig.write_text(yaml.safe_dump(body))
    assert KubernetesNamespace().namespace == "ml"
    assert KubernetesNamespace(context="prod").namespace == "prod"
    assert KubernetesNamespace(context="bare").namespace == "default"
    assert KubernetesNamespace(context="prod", namespace="x").namespace == "x"


def test_a_list_of_files(plain: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts, clusters and users come from different files; one that is missing is passed over."""
    body = yaml.safe_load(plain.kubeconfig.read_text())
    users = {"apiVersion": "v1", "kind": "Config", "users": body.pop("users")}
    (tmp_path / "users").write_text(yaml.safe_dump(users))
    plain.kubeconfig.write_text(yaml.safe_dump(body))
    files = [tmp_path / "missing", plain.kubeconfig, tmp_path / "users"]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))
    assert KubernetesNamespace().jobs("my-run") == []


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_credential_plugin(plain: Api, tmp_path: Path, version: str) -> None:
    rewrite(plain, plugin(tmp_path, version, {"token": TOKEN}))
    assert KubernetesNamespace().jobs("my-run") == []


def test_a_credential_plugin_that_fails(plain: Api, tmp_path: Path) -> None:
    user = plugin(tmp_path, "v1", {"token": TOKEN})
    user["exec"]["args"] = ["-c", "import sys; sys.exit('please log in')"]
    rewrite(plain, user)
    with pytest.raises(PreflightError, match="please log in") as caught:
        KubernetesNamespace()
    assert "log in, as your cluster's provider says" in caught.value.hint
    user["exec"]["command"] = "no-such-plugin"
    rewrite(plain, user)
    with pytest.raises(PreflightError, match="no-such-plugin"):
        KubernetesNamespace()


@pytest.mark.parametrize("as_data", [False, True])
def test_a_ca_of_ones_own(secure: Api, as_data: bool) -> None:
    if as_data:
        body = yaml.safe_load(secure.kubeconfig.read_text())
        cluster = body["clusters"][0]["cluster"]
        text = Path(cluster.pop("certificate-authority")).read_bytes()
        cluster["certificate-authority-data"] = base64.b64encode(text).decode()
        secure.kubeconfig.write_text(yaml.safe_dump(body))
    assert KubernetesNamespace().jobs("my-run") == []


def test_an_unknown_ca(secure: Api) -> None:
    body = yaml.safe_load(secure.kubeconfig.read_text())
    del body["clusters"][0]["cluster"]["certificate-authority"]
    secure.kubeconfig.write_text(yaml.safe_dump(body))
    with pytest.raises(PreflightError, match="certificate is not trusted") as caught:
        KubernetesNamespace()
    assert "certificate-authority" in caught.value.hint


def test_the_servers_name_in_its_certificate(secure: Api) -> None:
    rewrite(secure, {"token": TOKEN}, {"tls-server-name": "another.example"})
    with pytest.raises(PreflightError):
        KubernetesNamespace()


def test_in_a_pod(secure: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kubeconfig: the service account's token, CA and namespace."""
    from kubernetes.config import incluster_config

    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text(TOKEN)
    (account / "namespace").write_text("team\n")
    shutil.copy(tmp_path / "server.crt", account / "ca.crt")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(account / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(account / "ca.crt"))
    monkeypatch.setattr(kubeconfig, "SERVICE_ACCOUNT", account)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", secure.url.rpartition(":")[2])
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    cluster = KubernetesNamespace()
    assert cluster.namespace == "team"
    assert cluster.jobs("my-run") == []


@pytest.mark.parametrize(
    "content", [b"- x\n", b"\xff\xfe", b"clusters: 3\ncontexts: [1]\ncurrent-context: []\n"], ids=str
)
def test_a_malformed_kubeconfig_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (tmp_path / "config").write_bytes(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(PreflightError, match="is malformed") as caught:
        KubernetesNamespace()
    assert "kubectl config view" in caught.value.hint
