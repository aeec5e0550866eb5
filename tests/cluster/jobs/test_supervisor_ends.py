"""What ends a supervisor, and what it waits for: servers that refuse, fail or hang, and signals. Without a cluster."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.jobs import supervisor as module
from outlast.cluster.jobs.supervisor import Supervisor, supervise
from tests.cluster.jobs.test_job_server import JSON, NOWHERE, VERSION, Answer, web_server
from tests.support.groups.worker_group import tiny_config

BIN = Path(sys.executable).parent
SERVER: dict[str, Answer] = {
    "GET /api/version": (200, JSON, VERSION),
    "GET /api/jobs/": (200, JSON, "[]"),
    "GET /api/packages": (404, "", ""),
    "PUT /api/packages": (200, "", ""),
    "POST /api/jobs/": (200, JSON, '{"job_id": "far-1", "submission_id": "far-1"}'),
}


def make(tmp_path: Path, address: str | None, code: Path | None = None) -> Supervisor:
    config = tiny_config("far", str(tmp_path), "/data/text")
    return Supervisor(RunConfig.model_validate(config.model_dump()), {"name": "far"}, address, code)


@pytest.mark.parametrize(
    ("answers", "error", "text"),
    [
        ({"PUT /api/packages": (413, "text/html", "")}, ConfigError, "package of this size"),
        ({"POST /api/jobs/": (400, "", "ValueError: no such resource")}, PreflightError, "no such resource"),
        ({"GET /api/version": (401, "", "Unauthorized")}, PreflightError, "requires a token"),
        ({"POST /api/jobs/": (403, "", "Forbidden")}, PreflightError, "requires a token"),
    ],
    ids=["413", "refused-settings", "no-token", "refused-token"],
)
def test_a_supervisor_ends_on_what_no_cluster_can_mend(
    tmp_path: Path, answers: dict[str, Answer], error: type[OutlastError], text: str
) -> None:
    with web_server({**answers, **{key: item for key, item in SERVER.items() if key not in answers}}) as server:
        with pytest.raises(error, match=text):
            supervise([make(tmp_path, server.place)])
        assert server.requests


def test_a_supervisor_ends_on_code_and_addresses_that_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_server(SERVER) as server, pytest.raises(ConfigError, match="cannot be read"):
        supervise([make(tmp_path, server.place, tmp_path / "none")])
    with pytest.raises(ConfigError, match="is not the address of a job server"):
        supervise([make(tmp_path, "ray://head:10001")])
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(PreflightError, match="no Ray cluster was given"):
        supervise([make(tmp_path, None)])


@pytest.mark.parametrize(
    ("key", "answer", "text"),
    [
        ("GET /api/version", (404, "text/html", ""), "without Ray's API"),
        ("GET /api/version", (200, "text/html", ""), "a web server answers with a page"),
        ("POST /api/jobs/", (500, "", "No available agent to submit job"), "No available agent"),
        ("GET /api/jobs/far-1", (404, "", "Job far-1 does not exist"), "Job far-1 does not exist"),
        ("GET /api/jobs/", (503, "text/html", ""), "HTTP 503"),
    ],
)
def test_a_supervisor_keeps_trying_what_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, answer: Answer, text: str
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    said: list[str] = []
    supervisor = make(tmp_path, None)

    def say(self: Supervisor, line: str) -> None:
        said.append(line)
        if sum("trying again" in item for item in said) == 3:
            supervisor.ending.set()

    monkeypatch.setattr(Supervisor, "say", say)
    with web_server({key: answer, **{name: item for name, item in SERVER.items() if name != key}}) as server:
        supervisor.address = server.place
        assert supervise([supervisor]) == 130
    waits = [line for line in said if "trying again" in line]
    assert all(text in line for line in waits)
    assert sum(line.startswith("→ ") for line in said) == 1, "the remedy is shown once"


def test_a_supervisor_waits_for_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    supervisor = make(tmp_path, NOWHERE)
    waits = threading.Semaphore(0)
    monkeypatch.setattr(Supervisor, "say", lambda *_: waits.release())
    ended = threading.Thread(target=lambda: supervise([supervisor]))
    ended.start()
    for _ in range(4):
        waits.acquire()
    assert ended.is_alive()
    supervisor.ending.set()
    ended.join()


@pytest.mark.parametrize("number", [1, 2, 20])
def test_signals_at_once_end_supervisors_whose_server_hangs(tmp_path: Path, number: int) -> None:
    body = f"model: {{path: gpt2}}\ndata: {{train: /data/a.txt}}\ncheckpoint: {{storage: {tmp_path}}}\n"
    files = [tmp_path / f"{name}.yaml" for name in "ab"]
    for file in files:
        file.write_text(f"name: {file.stem}\n{body}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [str(BIN / "outlast"), "supervise", *map(str, files), "--address", address]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        connections = [server.accept()[0] for _ in files]  # of both, and never an answer
        for count in range(number):
            process.send_signal((signal.SIGTERM, signal.SIGINT)[count % 2])
        error = process.communicate(timeout=25)[1]  # the limit of a call is longer
        for connection in connections:
            connection.close()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error
