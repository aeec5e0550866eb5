"""`outlast k8s lint`: whole files with all findings, one mutation for each rule, and malformed input."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.main import app
from outlast.cluster.kubernetes.lint.linter import lint, read_objects
from outlast.cluster.kubernetes.lint.secret_rules import is_credential
from outlast.cluster.preflight.finding import Level
from tests.support.kubernetes.manifests import ROOT, rendered

FILES = ROOT / "tests" / "golden" / "lint"
CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec")
HEAD_POD = (*HEAD, "template", "spec")
WORKERS = (*CLUSTER, "workerGroupSpecs", 0)
WORKER_POD = (*WORKERS, "template", "spec")
LOST = [
    {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}
    for key in ("unreachable", "not-ready")
]
SUBMITTER = ("spec", "submitterPodTemplate", "spec")


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_bad_files(path: Path) -> None:
    done = CliRunner().invoke(app, ["k8s", "lint", str(path)])
    assert done.stdout == path.with_suffix(".txt").read_text()
    assert done.exit_code == (2 if "failed" in done.stdout else 0)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "golden" / "manifests").glob("*.yaml")), ids=lambda path: path.stem
)
def test_good_files(path: Path) -> None:
    done = CliRunner().invoke(app, ["k8s", "lint", str(path), "--json"])
    assert [row["level"] for row in json.loads(done.stdout)] == ["ok"]
    assert done.exit_code == 0


def put(job: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set the value at `path`; `...` deletes it."""
    for key in path[:-1]:
        job = job[key]
    if value is ...:
        del job[path[-1]]
    else:
        job[path[-1]] = value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({("spec", "submissionMode"): "K8SJobMode"}, "not one of K8sJobMode, SidecarMode, HTTPMode, InteractiveMode"),
        ({("spec", "submissionMode"): "SidecarMode"}, "excludes submitterPodTemplate, submitterConfig"),
        ({("spec", "submissionMode"): "InteractiveMode"}, "must be 0 in InteractiveMode"),
        (
            {("spec", "suspend"): True, ("spec", "shutdownAfterJobFinishes"): False},
            "spec.suspend: is allowed only with",
        ),
        (
            {("spec", "shutdownAfterJobFinishes"): False},
            "ttlSecondsAfterFinished: is allowed only with shutdownAfterJobFinishes",
        ),
        ({("spec", "backoffLimit"): -1}, "must not be negative"),
        ({("spec", "activeDeadlineSeconds"): 0}, "must be positive"),
        ({("spec", "runtimeEnvYAML"): "pip: ["}, "is not YAML"),
        ({("spec", "clusterSelector"): {"ray.io/cluster": ""}, ("spec", "backoffLimit"): 0}, "has no ray.io/cluster"),
        ({("spec", "clusterSelector"): {"ray.io/cluster": "c"}}, "excludes backoffLimit"),
        ({CLUSTER: ...}, "is missing, and so is clusterSelector"),
        ({(*SUBMITTER, "restartPolicy"): "Always"}, "must be Never or OnFailure"),
        (
            {(*CLUSTER, "authOptions"): {"mode": "token", "enableK8sTokenAuth": True}},
            "enableK8sTokenAuth is not allowed",
        ),
        ({(*CLUSTER, "rayVersion"): ""}, "token needs rayVersion"),
        ({(*CLUSTER, "rayVersion"): "2.51.9"}, "token needs rayVersion"),
        ({(*CLUSTER, "tlsOptions"): {}}, "RayClusterMTLS"),
        ({(*CLUSTER, "upgradeStrategy"): {"type": "None"}}, "not allowed in a RayJob's cluster"),
        ({("metadata", "name"): "x" * 48}, "at most 47"),
        ({("metadata", "name"): "7b"}, "DNS-1035"),
        ({(*WORKERS, "maxReplicas"): 0}, "needs 0 <= minReplicas"),
        ({(*WORKERS, "maxReplicas"): -1}, "needs 0 <= minReplicas"),
        ({(*WORKERS, "minReplicas"): -1}, "needs 0 <= minReplicas"),
        ({(*WORKERS, "idleTimeoutSeconds"): 5}, "needs autoscaler v2"),
        ({(*WORKERS, "priority"): 5}, "needs autoscaler v2"),
        ({(*WORKERS, "resources"): {"CPU": "1"}, (*WORKERS, "rayStartParams", "num-cpus"): "1"}, "resources twice"),
        ({(*WORKERS, "rayStartParams", "labels"): "a=b"}, "rayStartParams must not set labels"),
        ({(*HEAD_POD, "containers"): []}, "has no container"),
        ({(*HEAD_POD, "containers", 0, "env", 1): {"name": "RAY_enable_autoscaler_v2", "value": "1"}}, "needs enable"),
        ({(*HEAD_POD, "containers", 0, "env", 1): {"name": "RAY_REDIS_ADDRESS", "value": "r"}}, "enables fault tol"),
        ({(*HEAD_POD, "containers", 0, "env", 1): {"name": "REDIS_USERNAME", "value": "r"}}, "redisUsername"),
        ({("spec", "deletionStrategy"): {}}, "give deletionRules, or both"),
        (
            {
                ("spec", "deletionStrategy"): {
                    "onSuccess": {"policy": "DeleteNone"},
                    "onFailure": {"policy": "DeleteSelf"},
                }
            },
            "DeleteNone contradicts",
        ),
    ],
)
def test_operator_errors(tmp_path: Path, changes: dict[tuple[Any, ...], Any], expected: str) -> None:
    failed = found_at(tmp_path, "claim", changes, Level.FAILED)
    assert any(expected in text for text in failed), failed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {(*CLUSTER, "autoscalerOptions", "version"): "v1", (*WORKERS, "idleTimeoutSeconds"): 5},
            "needs autoscaler v2",
        ),
        ({(*WORKERS, "suspend"): True}, "suspend is not allowed with"),
        ({(*HEAD_POD, "restartPolicy"): "Always"}, "must be Never or unset with autoscaler v2"),
        ({(*CLUSTER, "autoscalerOptions", "idleTimeoutSeconds"): -1}, "must not be negative"),
        (
            {
                ("spec", "shutdownAfterJobFinishes"): False,
                ("spec", "ttlSecondsAfterFinished"): 0,
                ("spec", "deletionStrategy"): {
                    "deletionRules": [{"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED"}}] * 2
                },
            },
            "a second rule of DeleteWorkers",
        ),
    ],
)
def test_operator_errors_of_elastic_runs(tmp_path: Path, changes: dict[tuple[Any, ...], Any], expected: str) -> None:
    failed = found_at(tmp_path, "elastic", changes, Level.FAILED)
    assert any(expected in text for text in failed), failed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({("spec", "backoffLimit"): 1}, "allows 1 retries"),
        ({("spec", "activeDeadlineSeconds"): 60}, "ends the run for good"),
        ({("spec", "entrypoint"): "outlast train x --take-over"}, "without `exec`"),
        ({("spec", "entrypoint"): "exec outlast train x"}, "without --take-over"),
        ({(*CLUSTER, "gcsFaultToleranceOptions"): {"redisAddress": "r:6379"}}, "keeps the job as failed"),
        ({(*HEAD, "rayStartParams", "num-cpus"): "1"}, "a worker may run on the head"),
        ({(*HEAD_POD, "nodeSelector"): {"karpenter.sh/capacity-type": "spot"}}, "runs on spot nodes"),
        ({(*HEAD_POD, "containers", 0, "livenessProbe"): ...}, "has no livenessProbe"),
        ({(*WORKERS, "minReplicas"): 0}, "starts only once all 1 pods run"),
        ({(*WORKER_POD, "tolerations"): []}, "stays 300 s or more on a lost node"),
        ({(*WORKER_POD, "volumes"): []}, "no volume for /dev/shm"),
        ({(*WORKER_POD, "hostPID"): True}, "hostPID"),
        ({(*WORKER_POD, "terminationGracePeriodSeconds"): 115}, "never runs"),
        ({(*WORKER_POD, "containers", 0, "image"): "registry:5000/outlast"}, "can change between pods"),
        ({(*SUBMITTER, "containers", 0, "securityContext", "allowPrivilegeEscalation"): ...}, "lacks allowP"),
        ({(*WORKER_POD, "containers", 0, "resources", "limits", "memory"): "17Gi"}, "must be set and equal"),
        ({(*CLUSTER, "authOptions"): ...}, "any client that reaches the pods"),
        ({(*HEAD, "template", "metadata", "labels", "app.kubernetes.io/name"): "x"}, "finds no head"),
        ({("spec", "submitterPodTemplate"): ...}, "submitter: securityContext lacks"),
        (
            {(*WORKERS, "template", "metadata", "annotations"): {"karpenter.sh/do-not-disrupt": "true"}},
            "worker: karpenter.sh/do-not-disrupt",
        ),
    ],
)
def test_reliability_warnings(tmp_path: Path, changes: dict[tuple[Any, ...], Any], expected: str) -> None:
    warned = found_at(tmp_path, "claim", changes, Level.WARNING)
    assert any(expected in text for text in warned), warned


def found_at(folder: Path, run: str, changes: dict[tuple[Any, ...], Any], level: Level) -> list[str]:
    objects = rendered(folder, run)
    for path, value in changes.items():
        put(objects[-1], path, value)
    return [finding.text for finding in lint(objects) if finding.level is level]


CONTEXT = (*WORKER_POD, "containers", 0, "securityContext")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({(*CONTEXT, "seccompProfile"): {"type": "Unconfined"}}, "has seccompProfile Unconfined"),
        ({(*CONTEXT, "runAsUser"): 0}, "has runAsUser 0"),
        ({(*CONTEXT, "privileged"): True}, "has privileged: true"),
        ({(*CONTEXT, "capabilities", "add"): ["SYS_ADMIN", "NET_BIND_SERVICE"]}, "has capabilities.add [SYS_ADMIN]:"),
        ({(*WORKER_POD, "securityContext", "runAsUser"): 0}, "has runAsUser 0"),
        ({(*CONTEXT, "runAsNonRoot"): False}, "lacks runAsNonRoot: true"),
    ],
)
def test_what_a_restricted_namespace_refuses(
    tmp_path: Path, changes: dict[tuple[Any, ...], Any], expected: str
) -> None:
    [text] = found_at(tmp_path, "claim", changes, Level.WARNING)
    assert text.startswith(f"worker: securityContext {expected}")


def test_a_pods_security_context_applies_to_its_containers(tmp_path: Path) -> None:
    changes: dict[tuple[Any, ...], Any] = {(*CONTEXT, key): ... for key in ("runAsNonRoot", "runAsUser")}
    changes |= {(*CONTEXT, "seccompProfile"): ..., (*CONTEXT, "capabilities", "add"): ["NET_BIND_SERVICE"]}
    assert found_at(tmp_path, "claim", changes, Level.WARNING) == []
    changes[*WORKER_POD, "securityContext", "runAsNonRoot"] = ...
    [text] = found_at(tmp_path, "claim", changes, Level.WARNING)
    assert "lacks runAsNonRoot: true:" in text


def test_kueue_and_the_autoscaler(tmp_path: Path) -> None:
    changes = {("metadata", "labels", "kueue.x-k8s.io/queue-name"): "research"}
    [text] = found_at(tmp_path, "elastic", changes, Level.WARNING)
    assert "Kueue admits only RayJobs with a fixed number of pods" in text


def test_mismatch_with_the_run_file(tmp_path: Path) -> None:
    assert (
        "maxReplicas allows 1 workers" in found_at(tmp_path, "gpus", {(*WORKERS, "maxReplicas"): 1}, Level.FAILED)[-1]
    )
    gpu = {(*WORKER_POD, "containers", 0, "resources", "limits", "nvidia.com/gpu"): ...}
    assert "scale.gpus_per_worker is 1" in found_at(tmp_path, "gpus", gpu, Level.FAILED)[-1]
    cpu = {(*WORKER_POD, "containers", 0, "resources", "requests", "cpu"): "7500m"}
    assert found_at(tmp_path, "gpus", cpu, Level.FAILED) == []  # counted as 8
    cpu = {(*WORKER_POD, "containers", 0, "resources", "requests", "cpu"): "4"}
    assert "4 CPUs in each pod, but scale.cpus_per_worker is 8" in found_at(tmp_path, "gpus", cpu, Level.FAILED)[-1]
    start = {(*WORKERS, "rayStartParams", "num-cpus"): "2"}
    assert "2 CPUs in each pod" in found_at(tmp_path, "gpus", start, Level.FAILED)[-1]
    mount = {(*WORKER_POD, "containers", 0, "volumeMounts", 2): ...}
    assert "are lost with the pod" in found_at(tmp_path, "claim", mount, Level.FAILED)[-1]


AFFINITY = (*HEAD_POD, "affinity")


@pytest.mark.parametrize(
    ("run", "changes", "expected"),
    [
        ("spot, then others", {AFFINITY: ...}, "head: may run on a spot node"),
        ("spot, then others", {AFFINITY: ..., (*HEAD_POD, "nodeSelector"): {"pool": "steady"}}, None),
        ("claim", {AFFINITY: ...}, None),
        ("claim", {(*WORKERS, "replicas"): 3}, "replicas (3) exceeds maxReplicas (1)"),
        (
            "spot, then others",
            {(*WORKER_POD, "tolerations"): LOST},
            "does not tolerate their taint: cloud.google.com/gke-spot, kubernetes.azure.com/scalesetpriority",
        ),
        ("spot, then others", {(*WORKER_POD, "tolerations"): [*LOST, {"operator": "Exists"}]}, None),
        (
            "claim",
            {(*WORKER_POD, "tolerations"): LOST, (*WORKER_POD, "nodeSelector"): {"karpenter.sh/capacity-type": "spot"}},
            None,
        ),
        ("claim", {(*HEAD_POD, "volumes", 0, "configMap", "name"): "another"}, "head: mounts ConfigMap another"),
        ("claim", {(*HEAD_POD, "volumes", 0, "configMap"): {"name": "another", "optional": True}}, None),
    ],
)
def test_where_pods_land(tmp_path: Path, run: str, changes: dict[tuple[Any, ...], Any], expected: str | None) -> None:
    warned = found_at(tmp_path, run, changes, Level.WARNING)
    assert any(expected in text for text in warned) if expected else warned == []


def test_a_config_map_may_be_in_the_cluster(tmp_path: Path) -> None:
    assert [finding.level for finding in lint(rendered(tmp_path, "claim")[-1:])] == [Level.OK]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({(*WORKER_POD, "containers", 0, "image"): ...}, "worker: container ray-worker has no image"),
        ({(*CLUSTER, "workerGroupSpecs", 1, "groupName"): "spot"}, "several groups are named spot"),
    ],
)
def test_invalid_groups(tmp_path: Path, changes: dict[tuple[Any, ...], Any], expected: str) -> None:
    [text] = found_at(tmp_path, "spot, then others", changes, Level.FAILED)
    assert expected in text


def test_references_to_secrets_are_allowed(tmp_path: Path) -> None:
    reference = {"name": "API_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    path = (*WORKER_POD, "containers", 0, "env", 1)
    assert found_at(tmp_path, "object store", {path: reference}, Level.FAILED) == []
    [text] = found_at(tmp_path, "object store", {path: {"name": "API_TOKEN", "value": "abc"}}, Level.FAILED)
    assert "API_TOKEN is in plain text" in text
    assert "abc" not in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("AWS_SECRET_ACCESS_KEY", "abc", True),
        ("AWS_ACCESS_KEY_ID", "AKIA", True),
        ("HF_TOKEN", "hf_abc", True),
        ("hf-token", "hf_abc", True),
        ("WANDB_API_KEY", "abc", True),
        ("PGPASSWORD_PASSWORD", "abc", True),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("MAX_NEW_TOKENS", "32", False),
        ("MAX_TOKEN", "32", False),
        ("USE_TOKEN", "true", False),
        ("TOKENIZER_NAME", "gpt2", False),
        ("pad_token", "<pad>", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/key.json", False),
        ("HF_TOKEN", "$(OTHER)", False),
        ("HF_TOKEN", "${env:HF_TOKEN}", False),
        ("HF_TOKEN", "", False),
        ("HF_TOKEN", None, False),
        ("PARTITION_KEY", "abc", False),
    ],
)
def test_what_is_a_credential(name: str, value: Any, expected: bool) -> None:
    assert is_credential(name, value) is expected


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({("spec", "runtimeEnvYAML"): "env_vars: {AWS_SECRET_ACCESS_KEY: abcd}"}, "spec.runtimeEnvYAML: AWS_SECRET_A"),
        ({("spec", "entrypoint"): "exec env HF_TOKEN=abcd outlast train x --take-over"}, "spec.entrypoint: HF_TOKEN"),
        ({("spec", "entrypoint"): 'HF_TOKEN="abcd" outlast train x --take-over'}, "spec.entrypoint: HF_TOKEN"),
        ({("spec", "entrypoint"): "outlast train x --hf-token=abcd"}, "spec.entrypoint: hf-token"),
        ({(*WORKER_POD, "containers", 0, "args"): ["-c", "export API_KEY=abcd; run"]}, "worker: API_KEY"),
    ],
)
def test_credentials_outside_the_environment(tmp_path: Path, changes: dict[tuple[Any, ...], Any], where: str) -> None:
    [text] = found_at(tmp_path, "claim", changes, Level.FAILED)
    assert text.startswith(where)
    assert "abcd" not in text


def test_other_values_are_not_credentials(tmp_path: Path) -> None:
    changes = {
        (*WORKER_POD, "containers", 0, "env", 1): {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
        ("spec", "runtimeEnvYAML"): "env_vars: {MAX_NEW_TOKENS: '32'}",
        ("spec", "entrypoint"): "exec outlast train x --take-over -s model.tokenizer=gpt2 --key=$HF_TOKEN",
    }
    assert found_at(tmp_path, "claim", changes, Level.FAILED) == []


def test_credentials_in_a_config_map() -> None:
    run = "name: r\nmodel: {options: {HF_TOKEN: hf_abcd, pad_token: <pad>}}\ntrack: {API_KEY: '${env:KEY}'}\n"
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "r"},
        "data": {"run.yaml": run, "PASSWORD": "p"},
    }
    found = lint([body])
    assert [finding.level for finding in found] == [Level.WARNING] * 2
    assert found[0].text.startswith("data.run.yaml: model.options.HF_TOKEN looks like a credential")
    assert found[1].text.startswith("data.PASSWORD")
    assert "hf_abcd" not in str(found)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield every path in an object."""
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in rows:
        yield (*path, key)
        yield from paths(item, (*path, key))


#: `...` for: the key is not there.
ODD: tuple[Any, ...] = (None, 7, "x", [], {}, [None], ...)


def test_lint_survives_malformed_objects(tmp_path: Path) -> None:
    """Lint never raises, whatever the value at any path."""
    objects = rendered(tmp_path, "spot, then others")
    found = list(paths(objects[-1]))
    assert len(found) > 300
    for path in found:
        for value in ODD:
            if value is ... and isinstance(path[-1], int):
                continue
            changed = copy.deepcopy(objects[-1])
            put(changed, path, value)
            lint([*objects[:-1], changed])


def test_invalid_input() -> None:
    for empty in ("", "---\n---\n", "{apiVersion: v1, kind: List, items: []}"):
        with pytest.raises(ConfigError, match="holds no objects"):
            read_objects(empty)
    with pytest.raises(ConfigError, match="not YAML"):
        read_objects("a: 2026-13-45")
    with pytest.raises(ConfigError, match="not YAML"):
        read_objects("a: [")
    with pytest.raises(ConfigError, match="apiVersion or kind is missing"):
        read_objects("name: my-run\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apiVersion: v1\nkind: [x]\n", "kind .* is not a text"),
        ("apiVersion: 1\nkind: x\n", "apiVersion 1 of an object is not a text"),
        ("&a\napiVersion: v1\nkind: List\nitems: [*a]\n", "contains itself"),
        ("apiVersion: v1\nkind: x\na: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
    ids=["kind", "version", "cycle", "depth"],
)
def test_odd_documents(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_objects(text)


def test_a_config_map_whose_yaml_contains_itself() -> None:
    data = {"run.yaml": "&a {b: *a, api_key: abc}", "deep.yaml": "[" * 3000}
    item = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "odd"}, "data": data}
    [finding] = lint([item])
    assert "api_key looks like a credential" in finding.text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*WORKER_POD, "containers", 0, "resources", "requests", "cpu"), "9" * 400),
        ((*WORKER_POD, "containers", 0, "env"), [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": 10**400}]),
    ],
)
def test_numbers_beyond_every_limit_are_read(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    objects = rendered(tmp_path, "claim")
    put(objects[-1], path, value)
    lint(objects)


def test_lists_are_unpacked(tmp_path: Path) -> None:
    objects = rendered(tmp_path, "claim")
    nested = {"apiVersion": "v1", "kind": "List", "items": objects[1:]}
    text = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [objects[0], nested]})
    assert read_objects(text) == objects


def test_a_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\xff\xfe\x00")
    done = CliRunner().invoke(app, ["k8s", "lint", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert "model.bin is not a text file" in done.exception.message


def test_objects_without_rules_are_named(tmp_path: Path) -> None:
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "serve"}}
    text = yaml.safe_dump_all([*rendered(tmp_path, "claim"), service])
    done = CliRunner().invoke(app, ["k8s", "lint", "-"], input=text)
    assert done.stdout == "ok       rayjob/my-run  no problems found\n"
    assert done.stderr == "outlast: rules of KubeRay 1.7\noutlast: not checked, no rules for: rayservice/serve\n"


@pytest.mark.parametrize(("name", "is_right"), [("my-run-", True), ("x" * 42, True), ("x" * 43, False), ("7-", False)])
def test_generated_names(tmp_path: Path, name: str, is_right: bool) -> None:
    failed = found_at(tmp_path, "claim", {("metadata", "name"): ..., ("metadata", "generateName"): name}, Level.FAILED)
    assert (failed == []) is is_right


@pytest.mark.parametrize("run", ["scale: {workers: [1, x]}", "scale: {workers: [x]}", "scale: {workers: {}}", 7])
def test_malformed_values_in_a_run_file(tmp_path: Path, run: Any) -> None:
    [config_map, *rest] = rendered(tmp_path, "claim")
    config_map["data"]["run.yaml"] = run
    assert lint([config_map, *rest])


def test_malformed_values_in_a_deletion_rule(tmp_path: Path) -> None:
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": {"a": 1}, "ttlSeconds": [1]}}
    assert found_at(tmp_path, "claim", {("spec", "deletionStrategy"): {"deletionRules": [rule]}}, Level.FAILED)


def test_from_stdin(tmp_path: Path) -> None:
    text = yaml.safe_dump_all(rendered(tmp_path, "claim"))
    done = CliRunner().invoke(app, ["k8s", "lint", "-"], input=io.StringIO(text).read())
    assert done.stdout == "ok       rayjob/my-run  no problems found\n"


@pytest.mark.parametrize(
    ("content", "words"), [("a: [1\nb: }", "not YAML"), ("hello", "not a Kubernetes object"), ("", "holds no objects")]
)
def test_a_file_without_objects_is_named(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    result = CliRunner().invoke(app, ["k8s", "lint", str(path)])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.message.startswith(f"{path}: ")
    assert words in result.exception.message
    result = CliRunner().invoke(app, ["k8s", "lint", "-"], input=content)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.message.startswith("stdin: ")
