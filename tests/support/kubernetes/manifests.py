"""What the tests of manifests share: run files, KubeRay's CRDs, Kubernetes' schemas, and ways into a RayJob."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import kubernetes_validate
import pytest
import yaml

from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_file import load_run
from outlast.cluster.kubernetes.render import render
from outlast.cluster.kubernetes.settings import k8s_settings

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("OUTLAST_SHARED", ROOT.parent / "shared"))
CRDS, TOOL = SHARED / "kuberay-crds", SHARED / "tools" / "validate_crd.py"
KUBERNETES = ("1.29", "1.34")
RELEASE = {"image": "registry.example/outlast:1", "ray_version": "2.60.0"}

Objects = list[dict[str, Any]]
Read = Callable[..., tuple[RunConfig, dict[str, Any]]]


def read_run(folder: Path, storage: str, name: str = "my-run", **sections: Any) -> tuple[RunConfig, dict[str, Any]]:
    """Writes a run file and loads it as the command line does."""
    body = {
        "name": name,
        "model": {"path": "org/model"},
        "data": {"train": "s3://bucket/train.jsonl"},
        "checkpoint": {"storage": storage},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(body | sections))
    return load_run(str(path))


#: Representative runs: storage, sections of the run file, options of `render`.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "claim": ("/data/runs", {}, {}),
    "old claim above the data": ("/data/runs", {}, {"claim": "team", "mount": "/data", "namespace": "ml"}),
    "object store": ("s3://bucket/runs", {}, {"secret": "store"}),
    "object store, data on a claim": ("s3://bucket/runs", {}, {"claim": "team", "mount": "/data", "secret": "store"}),
    "cloud role": ("s3://bucket/runs", {}, {"service_account": "with-a-role"}),
    "gpus": ("/data/runs", {"scale": {"workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 8}}, {}),
    "many, on spot": (
        "file:///data/runs",
        {"scale": {"workers": 512}, "name": "Llama_3.1-SFT." + "x" * 32},
        {
            "worker_nodes": ["cloud.example/spot=true"],
            "head_nodes": ["cloud.example/spot=false"],
            "worker_taints": ["spot=true:NoSchedule", "dedicated:NoExecute", "shared"],
            "storage_class": "nfs",
            "claim_size": "2.5Ti",
            "grace_s": 30,
        },
    ),
    "a name that looks like a number": ("/data/runs", {"name": "1e5"}, {"name": "y"}),
    "elastic": ("/data/runs", {"scale": {"workers": [2, 8]}, "exactness": "elastic"}, {"pull_secret": "registry"}),
    "spot, then others": ("s3://bucket/runs", {"scale": {"workers": 4}}, {"spot": True, "fallback": True}),
    "queued": ("/data/runs", {}, {"queue": "research", "labels": ["team=nlp"], "egress_ports": [9000]}),
    "queued, elastic": (
        "/data/runs",
        {"scale": {"workers": [2, 8]}, "exactness": "elastic"},
        {"queue": "research", "elastic_queue": True},
    ),
    "open network": ("/data/runs", {}, {"network_policy": False}),
}


def rendered(folder: Path, name: str) -> Objects:
    """What one of `RUNS` is rendered to."""
    storage, sections, options = RUNS[name]
    return render(*read_run(folder, storage, **sections), k8s_settings(**RELEASE, **options))


def _quickly(file: TextIO) -> Any:
    """The pure Python loader takes half a minute for the CRDs."""
    with file:
        return yaml.load(file, Loader=yaml.CSafeLoader)


def crd_checker(folder: Path, kind: str = "rayjobs") -> Callable[[str], list[str]]:
    """What a strict API server that knows one of KubeRay's CRDs would say to a stream of objects."""
    if not (CRDS.is_dir() and TOOL.is_file()):
        pytest.skip(f"KubeRay's CRDs are not at {SHARED} (OUTLAST_SHARED says where)")
    spec = importlib.util.spec_from_file_location("validate_crd", TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (folder / "crd.yaml").symlink_to(CRDS / f"ray.io_{kind}.yaml")  # reading all four takes seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "safe_load", _quickly)
        known = tool.load_crds(str(folder))

    def check(text: str) -> list[str]:
        found = [tool.validate(body, known) for body in yaml.load_all(text, tool.StrictLoader)]
        assert any(item is not None for item in found), "no Ray resource in it"
        return [line for item in found for line in item or []]

    return check


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of a RayJob by role."""
    cluster = job["spec"]["rayClusterSpec"]
    workers = {f"worker {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    first = {"worker": next(iter(workers.values()))}
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **(first if len(workers) == 1 else first | workers),
    }


def variables(pod: dict[str, Any]) -> dict[str, str]:
    [container] = pod["spec"]["containers"]
    return {item["name"]: item["value"] for item in container["env"]}


def mounts(pod: dict[str, Any]) -> dict[str, str]:
    [container] = pod["spec"]["containers"]
    return {item["name"]: item["mountPath"] for item in container.get("volumeMounts", [])}


def check_core(objects: Objects) -> None:
    """Every core object, and every pod that the RayJob describes, against Kubernetes' strict schemas."""
    *core, job = objects
    for role, pod in pods(job).items():
        core.append({"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": role, **pod["metadata"]}})
    for release in KUBERNETES:
        for item in core:
            kubernetes_validate.validate(item, release, strict=True)
