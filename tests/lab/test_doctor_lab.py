"""`outlast doctor` through a job server, on three hosts: one does not share a storage, two cannot reach each other.

One more asks a name server that does not answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import HEAD, Lab
from tests.lab.runs import Run
from tests.lab.test_lab import reason

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(400),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shared/runs` is one directory; at `apart/runs` host 2 has another one."""
    made = tmp_path_factory.mktemp("doctor")
    for name in ("shared", "apart/runs", "hidden"):
        (made / name).mkdir(parents=True)
    return made


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Lab]:
    with Lab() as made:
        made.start(HEAD, cpus=0)
        made.wait_for_nodes(1)
        made.start(1)
        made.start(2, mounts={str(folder / "apart/runs"): folder / "hidden"})
        made.wait_for_nodes(3)
        yield made


def doctor(lab: Lab, run: Run, *options: str, code: int) -> dict[str, list[tuple[str, str]]]:
    """Level and text of each finding, by what was examined."""
    command = [sys.executable, "-m", "outlast.cluster.cli", "doctor", str(run.file), "--address", lab.address, "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads(done.stdout)["checks"]:
        found.setdefault(row["check"], []).append((row["level"], row["text"]))
    return found


def test_a_host_that_does_not_share_the_storage(cluster: Lab, folder: Path, text_file: str) -> None:
    run = Run(folder / "apart", "run", text_file, 10, 2)
    found = doctor(cluster, run, "--quick", code=3)
    [(level, text)] = found["storage"]
    assert level == "failed"
    here, one, two = (cluster.name(host) for host in range(3))
    assert f"is not shared: {two} does not see files of {here} and {one}" in text
    assert found["versions"][0][0] == "ok"
    [(level, text)] = found["job server"]
    assert level == "ok"
    assert "requires a token" in text


def test_two_hosts_that_cannot_reach_each_other(cluster: Lab, folder: Path, text_file: str) -> None:
    """Ray is content with that, as both reach the head. Once mended, the all-reduce crosses the network."""
    run = Run(folder / "shared", "run", text_file, 10, 2)
    one, two = cluster.name(1), cluster.name(2)
    cluster.between(1, 2, up=False)
    found = doctor(cluster, run, code=3)
    [(level, text)] = found["ports"]
    assert level == "failed"
    assert f"{one} and {two} cannot reach each other: {cluster.ip(2)}:" in text
    assert found["storage"][0][0] == "ok"
    cluster.between(1, 2, up=True)
    found = doctor(cluster, run, code=0)
    assert found["ports"] == [("ok", "2 nodes reach each other")]
    [(level, text)] = found["all-reduce"]
    assert level != "failed"
    assert "gloo" in text
    assert list((folder / "shared/runs").iterdir()) == []


def test_a_host_whose_name_server_does_not_answer(cluster: Lab, folder: Path, text_file: str) -> None:
    """Each start of a group waits for that, and nothing else would tell."""
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{cluster.ip(3)} {cluster.name(3)}\n")
    (folder / "resolv.conf").write_text(f"nameserver {cluster.ip(200)}\n")
    cluster.start(3, mounts={f"/etc/{name}": folder / name for name in ("hosts", "resolv.conf")})
    cluster.wait_for_nodes(4)
    try:
        found = doctor(cluster, Run(folder / "shared", "run", text_file, 10, 2), code=0)
    finally:
        cluster.kill(3)
    [(level, text)] = found["names"]
    assert level == "warning"
    assert text.startswith(f"{cluster.name(3)}: a reverse name lookup takes up to")
