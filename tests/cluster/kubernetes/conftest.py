"""API servers for the tests of the client: the small one, and a real one if `KUBEBUILDER_ASSETS` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.kubernetes.api_server import Api, small_api
from tests.support.kubernetes.manifests import Objects, rendered
from tests.support.kubernetes.real_api_server import assets, real_api


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
    """The server; all objects are deleted afterwards."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    yield server
    server.clear()


@pytest.fixture
def objects(server: Api, tmp_path: Path) -> Objects:
    """A run's objects, without the PodDisruptionBudget where the server is older than its kind (1.21)."""
    return [item for item in rendered(tmp_path, "claim") if server.knows(item["apiVersion"])]
