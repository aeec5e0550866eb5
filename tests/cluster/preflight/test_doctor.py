"""`outlast doctor` on real Ray clusters with real faults: two nodes, one with other mounts, another library and another
clock; and a cluster that requires a token. Two minutes with the slow tests, most of it Ray's starts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from outlast.checkpointing.errors import StorageRefused
from outlast.checkpointing.storage.base import walk
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.jobs.bundle import copy_package
from outlast.cluster.preflight import doctor, doctor_probe
from outlast.cluster.preflight import doctor_rules as rules
from outlast.cluster.preflight.doctor_rules import Requirements
from outlast.cluster.preflight.finding import Finding, Level
from tests.cluster.jobs.test_ray_jobs import Cluster, free_ports
from tests.support.groups.worker_group import tiny_config
from tests.support.s3_proxy import MANGLING, Mischief, proxy_to
from tests.support.s3_server import s3_server

CLOCK_AHEAD_S = 100
AHEAD = f"""import sys, time
if any("default_worker" in part for part in sys.orig_argv):
    real = time.time
    time.time = lambda: real() + {CLOCK_AHEAD_S}
"""


def outlast(
    *arguments: str, code: int, environment: dict[str, str] | None = None, wrapped: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*wrapped, sys.executable, "-m", "outlast.cluster.cli", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, **(environment or {})}, cwd="/"
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, list[tuple[str, str]]]:
    """Return level and text of each finding, by check."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads(done.stdout)["checks"]:
        assert row["level"] == "ok" or row["hint"]
        found.setdefault(row["check"], []).append((row["level"], row["text"]))
    return found


# -- one node ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_healthy_machine(tmp_path: Path, text_file: str) -> None:
    """Every check is reported and passes, and nothing is left in the storage."""
    run_file = tmp_path / "run.yaml"
    body = tiny_config("run", str(tmp_path / "runs"), text_file).model_dump(mode="json", exclude_defaults=True)
    run_file.write_text(yaml.safe_dump(body))
    found = checks(outlast("doctor", str(run_file), "--json", code=0))
    expected = {
        "access",
        "versions",
        "devices",
        "memory",
        "disk",
        "clock",
        "storage",
        "speed",
        "ports",
        "names",
        "all-reduce",
    }
    assert set(found) == expected
    assert all(level != "failed" for rows in found.values() for level, _ in rows)
    assert found["all-reduce"][0][1].startswith("gloo, 2 ranks")
    assert list((tmp_path / "runs").iterdir()) == []


# -- two nodes ---------------------------------------------------------------------------------------------------------


class Pair:
    """A head and a second node on this machine, which has its own library, clock and mounts.

    Args:
        folder: Folder of the storages that the two nodes see differently, and of the second node's packages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.head = folder, Cluster()
        packages = folder / "packages"
        (packages / "transformers").mkdir(parents=True)
        (packages / "transformers/__init__.py").write_text('__version__ = "4.57.6"\n')
        (packages / "transformers-4.57.6.dist-info").mkdir()
        about = "Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.6\n"
        (packages / "transformers-4.57.6.dist-info/METADATA").write_text(about)
        (packages / "sitecustomize.py").write_text(AHEAD)
        for name in ("shared", "apart", "readonly", "full"):
            (folder / name).mkdir()
        mounts = [
            f"mount -t tmpfs none {folder}/apart",
            f"mount -t tmpfs -o size=64k none {folder}/full",
            f"(cat /dev/zero >{folder}/full/filler 2>/dev/null || true)",
            f"mount --bind {folder}/readonly {folder}/readonly",
            f"mount -o remount,ro,bind {folder}/readonly",
        ]
        [agent] = free_ports(1)
        options = f"--address={self.head.ray_address} --node-name=other --num-cpus=2 --object-store-memory=100000000"
        ray = f"exec ray start {options} --dashboard-agent-listen-port={agent} --disable-usage-stats --block"
        path = f"{packages}:{os.environ.get('PYTHONPATH', '')}"
        self.log = (folder / "other.log").open("w")
        self.other = subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", " && ".join([*mounts, ray])],
            env={**self.head.environment, "PYTHONPATH": path},
            stdout=self.log,
            stderr=self.log,
        )

    def storage(self, name: str) -> str:
        return str(self.folder / name)

    def shut_down(self) -> None:
        self.other.send_signal(signal.SIGTERM)
        try:
            self.other.wait(20)
        except subprocess.TimeoutExpired:
            self.other.kill()
            self.other.wait()
        self.log.close()
        self.head.shut_down()


def why_not() -> str | None:
    if shutil.which("unshare") is None:
        return "needs unshare (package util-linux)"
    made = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return None if made.returncode == 0 else f"mount namespaces are not allowed here: {made.stderr.decode().strip()}"


reason = why_not()
needs_mounts = pytest.mark.skipif(reason is not None, reason=reason or "")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("pair"))
    deadline = time.monotonic() + 90
    code = f"import ray; ray.init('{made.head.ray_address}', logging_level='ERROR'); print(len(ray.nodes()))"
    try:
        while time.monotonic() < deadline:
            assert made.other.poll() is None, (made.folder / "other.log").read_text()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.stdout.strip() == "2":
                break
        yield made
    finally:
        made.shut_down()


@needs_mounts
@pytest.mark.ray
@pytest.mark.faults  # two minutes together
def test_two_nodes_that_differ(pair: Pair) -> None:
    """Library and clock of the second node are reported; the rest is measured, despite the wrong clock."""
    storage = ("--storage", pair.storage("shared"))
    found = checks(outlast("doctor", "--address", pair.head.ray_address, *storage, "--json", code=3))
    [(level, text)] = found["versions"]
    assert level == "failed"
    assert text.startswith("transformers differs: ")
    assert "4.57.6 on other" in text
    [(level, text)] = found["clock"]
    assert level == "warning"
    assert text.startswith(f"other is {CLOCK_AHEAD_S}.0 s ahead")
    assert found["storage"][0][0] == found["listing lag"][0][0] == "ok"
    assert found["all-reduce"][0][0] == found["ports"][0][0] == "ok"
    assert found["all-reduce"][0][1].startswith("gloo, 2 ranks")
    assert list(Path(pair.storage("shared")).iterdir()) == []


@needs_mounts
@pytest.mark.ray
@pytest.mark.faults  # two minutes together
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apart", "is not shared: head and other do not see each other's files"),
        ("readonly", "other cannot write to"),
        ("full", "No space left on device"),
    ],
)
def test_an_unusable_storage(pair: Pair, name: str, expected: str) -> None:
    storage = pair.storage(name)
    done = outlast("doctor", "--quick", "--address", pair.head.ray_address, "--storage", storage, "--json", code=3)
    failed = [text for level, text in checks(done)["storage"] if level == "failed"]
    assert any(expected in text for text in failed), failed
    assert [path.name for path in Path(storage).iterdir()] == []


@needs_mounts
@pytest.mark.ray
@pytest.mark.faults  # two minutes together
@pytest.mark.slice
def test_train_refuses_a_storage_that_is_not_shared(pair: Pair, tmp_path: Path, text_file: str) -> None:
    body = tiny_config("run", pair.storage("apart"), text_file).model_dump(mode="json", exclude_defaults=True)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(body | {"scale": {"workers": 2}}))
    done = outlast("train", str(run_file), "--address", pair.head.ray_address, code=3)
    assert "is not shared: head and other do not see each other's files" in done.stderr
    assert "for details: `outlast doctor RUN.yaml`" in done.stderr
    assert not Path(pair.storage("apart"), "run/attempts").exists()


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.faults  # a minute
@pytest.mark.timeout(500)
def test_a_cluster_that_requires_a_token(tmp_path: Path, text_file: str) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-token-of-this-test-and-of-nothing-else"}
    cluster = Cluster(token)
    try:
        body = tiny_config("run", str(tmp_path / "runs"), text_file, steps=2).model_dump(
            mode="json", exclude_defaults=True
        )
        run_file = tmp_path / "run.yaml"
        run_file.write_text(yaml.safe_dump(body))
        at = ("--address", cluster.address)
        none = {"RAY_AUTH_MODE": "disabled"}
        wrong = token | {"RAY_AUTH_TOKEN": "another-token-altogether"}
        for name in ("submit", "doctor"):
            for given, expected in ((none, "Missing authentication token"), (wrong, "Invalid authentication token")):
                err = outlast(name, str(run_file), *at, code=3, environment=given).stderr
                assert "requires a token" in err
                assert expected in err
                assert "RAY_AUTH_MODE=token" in err
        err = outlast("doctor", "--address", cluster.ray_address, code=3, environment=wrong).stderr
        assert "cannot be joined: it requires a token" in err
        found = checks(outlast("doctor", str(run_file), *at, "--quick", "--json", code=0, environment=token))
        assert found["storage"][0][0] == "ok"
        [(level, text)] = found["job server"]
        assert level == "ok"
        assert "requires a token" in text
        followed = outlast("submit", str(run_file), *at, "--follow", code=0, environment=token)
        assert followed.stdout.strip() == "run-1"
    finally:
        cluster.shut_down()


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mischief", MANGLING)
def test_a_store_that_changes_bytes_is_found(mischief: Mischief, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as bucket, proxy_to(os.environ["AWS_ENDPOINT_URL"]) as (proxy, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        probe = doctor_probe.Probe(f"{bucket}/runs", ".doctor/x")
        proxy.add("PUT", "token", mischief, 2)
        with pytest.raises(StorageRefused, match="does not read back"):
            probe.write("token")
        proxy.add("PUT", "large", mischief)
        probe.write_speed("large", 2**24)
        with pytest.raises(StorageRefused, match="does not read back"):
            probe.read_speed("large", 2**24)
        proxy.rules.clear()
        probe.write_speed("large", 2**24)
        assert probe.read_speed("large", 2**24)["read"] > 0
        assert probe.write("token")["token"]
        probe.clean()
        assert not [entry for entry in walk(open_storage(f"{bucket}/runs"), "") if entry.num_bytes]


@pytest.mark.ray
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_no_command_relies_on_a_store_that_changes_bytes(
    command: str, tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as bucket, proxy_to(os.environ["AWS_ENDPOINT_URL"]) as (proxy, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        proxy.add("PUT", "", Mischief.FRAME, 10_000)
        run_file = tmp_path / "run.yaml"
        body = tiny_config("run", f"{bucket}/runs", text_file).model_dump(mode="json", exclude_defaults=True)
        run_file.write_text(yaml.safe_dump(body))
        done = outlast(command, str(run_file), code=3)
        assert "kept the framing of a chunked upload as content" in done.stdout + done.stderr
        assert "attempts" not in "".join(entry.name for entry in walk(open_storage(f"{bucket}/runs"), ""))


def test_nodes_probe_one_storage_at_the_same_time(tmp_path: Path) -> None:
    """A deletion takes empty directories along; that of one node must not fail the write of another."""
    for number in range(10):
        probes = [doctor_probe.Probe(str(tmp_path), f".doctor/{number}") for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(lambda item: item[1].write(f"node-{item[0]}"), enumerate(probes)))
            assert all(item["token"] for item in written)
            list(pool.map(lambda probe: probe.clean(), probes))
    assert not list(tmp_path.iterdir())


def test_lags() -> None:
    def lag_finding(lag: float | None, settle_s: float) -> Finding:
        [finding] = rules.check_lag({("a", "b"): 0.001, ("b", "a"): lag}, Requirements(settle_s=settle_s))
        return finding

    assert lag_finding(0.01, 0).level is Level.OK
    assert lag_finding(3.2, 5).level is Level.OK
    late = lag_finding(3.2, 0)
    assert late.level is Level.FAILED
    assert "appears on a 3.2 s later" in late.text
    assert "checkpoint.settle_s to 5" in late.hint
    assert lag_finding(None, 600).level is Level.FAILED


def test_unshared_storage_names_the_outlier() -> None:
    """One of three nodes sees another storage: it is named, not the other two."""
    tokens = {node: {"token": node.upper()} for node in ("a", "b", "c")}
    seen = {
        "a": {"read": {"a": "A", "b": "B"}},
        "b": {"read": {"a": "A", "b": "B"}},
        "c": {"read": {"c": "C"}},
    }
    facts: dict[str, dict[str, Any]] = {node: {"storage": {"kind": "nfs4", "source": "far:/runs"}} for node in tokens}
    facts["c"] = {"storage": {"kind": "ext4", "source": "/dev/sda1"}}
    [finding] = rules.check_shared(facts, Requirements(storage="/runs"), tokens, seen)
    assert finding.text == "/runs is not shared: c does not see files of a and b (ext4 from /dev/sda1 on c)"


def test_a_loopback_address_fails_the_ports_check() -> None:
    fact = {
        "host": "h",
        "address": "10.0.0.1",
        "interface": "eth0",
        "gloo_interface": None,
        "gloo_address": "127.0.1.1",
    }
    other = {**fact, "address": "10.0.0.2", "gloo_address": "10.0.0.2"}
    [finding] = rules.check_ports({"a": fact, "b": other}, {})
    assert finding.level is Level.FAILED
    assert "GLOO_SOCKET_IFNAME=eth0" in finding.hint


def test_closed_ports_are_reported_once_per_pair() -> None:
    facts = {node: {"address": "10.0.0.1", "gloo_address": "10.0.0.1"} for node in "abc"}
    found = rules.check_ports(facts, {"a": {"b": "10.0.0.2:4: timed out"}, "b": {"a": "…"}, "c": {"a": "refused"}})
    assert [finding.text for finding in found] == [
        "a and b cannot reach each other: 10.0.0.2:4: timed out",
        "c cannot reach a: refused",
    ]


def test_slow_name_lookups() -> None:
    [finding] = rules.check_name_lookup({"a": 6.13, "b": 0.01, "c": {"fault": "no answer"}})
    assert (finding.level, finding.text.split(":")[0]) == (Level.WARNING, "a")
    assert rules.check_name_lookup({"a": 0.01})[0].level is Level.OK
    assert rules.check_name_lookup({"c": {"fault": "no answer"}}) == []


# -- a node's facts ----------------------------------------------------------------------------------------------------


def test_the_file_system_is_the_one_that_df_names(tmp_path: Path) -> None:
    found = doctor_probe._file_system(str(tmp_path / "not/there/yet"))
    assert found is not None
    said = subprocess.run(
        ["df", "--output=source,target,fstype", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[1].split() == [found["source"], found["mount"], found["kind"]]
    assert doctor_probe._file_system("s3://bucket/runs") is None


def test_the_digest_of_the_code_covers_every_folder(tmp_path: Path) -> None:
    def digest() -> str:
        code = "from outlast.cluster.preflight.doctor_probe import _code_digest; print(_code_digest())"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return done.stdout.strip()

    package = copy_package(tmp_path)
    before = digest()
    with (package / "cluster/preflight/doctor_rules.py").open("a") as file:
        file.write("# changed\n")
    assert digest() not in (before, "missing")


def test_a_probe_travels_to_a_node_without_outlast(tmp_path: Path) -> None:
    for module in doctor._BY_VALUE:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        (tmp_path / "probe").write_bytes(ray.cloudpickle.dumps(doctor_probe.Probe))
    finally:
        for module in doctor._BY_VALUE:
            ray.cloudpickle.unregister_pickle_by_value(module)
    code = (
        "import pickle, sys\nsys.modules['outlast'] = None\n"
        f"facts = pickle.load(open({str(tmp_path / 'probe')!r}, 'rb'))().facts(gpus=False)\n"
        "print(facts['versions']['outlast'], facts['disk']['path'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["missing", tempfile.gettempdir()]), done.stderr


@pytest.mark.parametrize(
    ("free", "newest", "expected"),
    [
        (500_000_000, 1_000_000, "has 500.0 MB free (seen from a); a run needs at least 1.1 GB"),
        (2_000_000_000, 1_000_000_000, "has 2.0 GB free (seen from a); 4 checkpoints need about 4.0 GB"),
        (500_000_000, 900_000_000, "has 500.0 MB free (seen from a); one checkpoint needs about 900.0 MB"),
    ],
)
def test_a_warning_about_space_states_more_than_is_free(free: int, newest: int, expected: str) -> None:
    disk = {"path": "/tmp", "free": 10**12, "total": 10**12}
    facts = {"a": {"disk": disk, "storage": {"kind": "ext4", "source": "/dev/a", "free": free}}}
    [finding] = rules.check_disk(facts, Requirements(storage="/runs", newest_bytes=newest))
    assert finding.text == f"/runs {expected}"
