"""Access to the Ray of `outlast train`: from other machines to nothing, and on this one with its token only."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import yaml

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.groups.worker_group import tiny_config

OUTLAST = str(Path(sys.executable).with_name("outlast"))
NUM_WORKERS = 2
#: A method of each of Ray's services.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/FreeObjects",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
)
SHUT = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
}
#: Prints those of the endpoints (arguments) that accept a connection.
PROGRAM = """
import socket, sys
found = []
for endpoint in sys.argv[1:]:
    host, port = endpoint.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        found.append(endpoint)
    except OSError:
        pass
print(*found)
"""


@dataclass(frozen=True)
class Listener:
    """A port that a process listens on."""

    process: str
    address: str
    port: int


@dataclass(frozen=True)
class Training:
    """A run under way: its driver, its token, and every TCP or UDP port of its processes."""

    driver: subprocess.Popen[str]
    token: str
    listeners: tuple[Listener, ...]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("access")
    body = tiny_config("run", str(folder), text_file, steps=100_000).model_dump(mode="json", exclude_defaults=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(body | {"scale": {"workers": NUM_WORKERS}}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "disabled"}  # as somebody may have set it for clusters of his own
    command = [OUTLAST, "train", str(folder / "run.yaml")]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 200
        while not any(event["event"] == "under-way" for _, event in run_events(RunStore(LocalStorage(folder), "run"))):
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline, "the run is not under way"
            time.sleep(0.2)
        processes = psutil.Process(driver.pid).children(recursive=True)
        tokens = {process.environ().get("RAY_AUTH_TOKEN") for process in processes} - {None}
        assert len(tokens) == 1
        [token] = tokens
        assert not any(token in " ".join(process.cmdline()) for process in processes)
        names = {process.pid: process.name() for process in processes} | {driver.pid: "driver"}
        found = [
            Listener(names[item.pid], item.laddr.ip, item.laddr.port)
            for item in psutil.net_connections("inet")
            if item.pid in names and (item.status == psutil.CONN_LISTEN or item.type == socket.SOCK_DGRAM)
        ]
        yield Training(driver, token, tuple(found))
        assert driver.poll() is None, "what was sent has ended the run"
    finally:
        driver.terminate()
        driver.communicate(timeout=120)


def post(listener: Listener) -> tuple[int, bytes] | None:
    """Asks the job agent's API to run a command. Returns status and answer; None if HTTP is not spoken there."""
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=3)
    try:
        body = json.dumps({"entrypoint": "true"})
        connection.request("POST", "/api/job_agent/jobs/", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def call(listener: Listener, method: str, token: str = "") -> grpc.StatusCode:
    """Calls a method of Ray's services, with a token if there is one."""
    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=3, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.ray
def test_every_listener_is_on_the_loopback(training: Training) -> None:
    assert len({listener.process for listener in training.listeners}) >= 5
    assert sum("Worker" in listener.process for listener in training.listeners) >= NUM_WORKERS, training.listeners
    beyond = [item for item in training.listeners if item.address.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert beyond == []


@pytest.mark.ray
def test_without_the_token_no_listener_answers(training: Training) -> None:
    answers = {listener: post(listener) for listener in training.listeners}
    assert all(answer is None or answer[0] == 401 for answer in answers.values()), answers
    assert any(answer is not None for answer in answers.values())
    refusing = 0
    for listener, answer in answers.items():
        if answer is not None:
            continue
        if call(listener, METHODS[0]) is grpc.StatusCode.DEADLINE_EXCEEDED:
            continue  # a socket of gloo
        without = [call(listener, method) for method in METHODS]
        assert set(without) <= SHUT, listener
        wrong = [call(listener, method, "0" * 64) for method in METHODS]
        assert set(wrong) <= SHUT, listener
        if grpc.StatusCode.UNAUTHENTICATED in without:
            refusing += 1
            assert {call(listener, method, training.token) for method in METHODS} - SHUT, f"{listener}: a wrong method"
    assert refusing >= 5


@pytest.mark.lab
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
def test_another_machine_reaches_no_listener(training: Training) -> None:
    """From a network namespace with a link to this one, at each address that this machine has."""
    name, here, there = f"acc{os.getpid()}", "10.98.76.1", "10.98.76.2"
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {name} type veth peer name other netns {name}",
            f"ip addr add {here}/24 dev {name}",
            f"ip link set {name} up",
            f"ip -n {name} addr add {there}/24 dev other",
            f"ip -n {name} link set other up",
            f"ip -n {name} link set lo up",
            f"ip -n {name} route add default via {here}",
        ):
            subprocess.run(command.split(), check=True)
        with socket.create_server(("", 0)) as control:
            open_port = str(control.getsockname()[1])
            own = [
                item.address
                for items in psutil.net_if_addrs().values()
                for item in items
                if item.family == socket.AF_INET
            ]
            targets = [address for address in own if not address.startswith("127.")]
            ports = {listener.port for listener in training.listeners} | {int(open_port)}
            endpoints = [f"{address}:{port}" for address in targets for port in sorted(ports)]
            program = ["ip", "netns", "exec", name, sys.executable, "-c", PROGRAM, *endpoints]
            found = subprocess.run(program, capture_output=True, text=True, check=True, timeout=200).stdout.split()
        assert {endpoint.rsplit(":", 1)[1] for endpoint in found} == {open_port}
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
