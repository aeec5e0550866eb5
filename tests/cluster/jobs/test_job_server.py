"""Addresses of job servers, and servers that are none, hang or refuse: small real servers on the loopback."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import main
from outlast.cluster.driver.ray_session import _check_answers
from outlast.cluster.jobs import job_server
from outlast.cluster.jobs.job_server import JobServer, JobServerUnavailable, is_job_server, server_url
from outlast.cluster.jobs.ray_jobs import connect, run_command
from tests.support.timelines import launch, write

Answer = tuple[int, str, str]  # status, type of content, content
JSON = "application/json"
VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
NOWHERE = "http://127.0.0.1:1"


class WebServer(ThreadingHTTPServer):
    """A web server on the loopback: by method and path it gives a fixed answer, and records the requests."""

    daemon_threads = True

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers, self.requests = answers, list[str]()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        assert isinstance(self.server, WebServer)
        key = f"{self.command} {self.path}"
        self.server.requests.append(key)
        self.rfile.read(int(self.headers.get("content-length", 0)))
        found = [answer for start, answer in self.server.answers.items() if key.startswith(start)]
        status, kind, text = found[0] if found else (404, "text/plain", "not here")
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text.encode())))
        if status == 302:
            self.send_header("location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def web_server(answers: dict[str, Answer] | None = None) -> Iterator[WebServer]:
    server = WebServer({"GET /api/version": (200, JSON, VERSION)} if answers is None else answers)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent_server(*, accepts: bool) -> Iterator[str]:
    """A port that accepts connections and never answers, or one whose queue is full: nothing there answers at all."""
    with socket.create_server(("127.0.0.1", 0), backlog=0 if not accepts else 100) as server:
        clients = [socket.socket() for _ in range(0 if accepts else 4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("HEAD:8265", "http://HEAD:8265"),
        ("head", "http://head:8265"),
        ("head:", "http://head:8265"),
        (" 10.0.0.1 ", "http://10.0.0.1:8265"),
        ("head:80", "http://head:80"),
        ("::1", "http://[::1]:8265"),
        ("[::1]:9", "http://[::1]:9"),
        ("head:8265/", "http://head:8265"),
        ("http://head", "http://head"),
        ("https://user:word@host/ray/", "https://user:word@host/ray"),
        ("http://head:8265/#/jobs", "http://head:8265"),
        ("HTTP://head:1", "http://head:1"),
    ],
)
def test_addresses_of_job_servers(address: str, url: str) -> None:
    assert server_url(address) == url


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("ray://head:10001", "http://head:8265"),
        ("ray://head", "http://head:8265"),
        ("head:10001", "http://head:8265"),
        ("head:6379", "http://head:8265"),
        ("::1:", "http://HEAD:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("local", "http://127.0.0.1:8265"),
        ("s3://bucket/runs", "http://HEAD:8265"),
        ("os://head", "http://HEAD:8265"),
        ("http://head:99999", "http://HEAD:8265"),
        ("http://[head", "http://HEAD:8265"),
        ("http://", "http://HEAD:8265"),
        ("a b", "http://HEAD:8265"),
        (" ", "http://HEAD:8265"),
    ],
)
def test_what_is_no_address_of_a_job_server(address: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a job server") as error:
        server_url(address)
    assert hint in error.value.hint


def test_addresses_that_doctor_reaches_through_a_job_server() -> None:
    job_servers = ["http://head:1", "https://head", "head:8265", "head"]
    assert [
        item for item in (*job_servers, "head:6379", "auto", "ray://head:10001", "local") if is_job_server(item)
    ] == (job_servers)


def test_the_address_that_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client would take these variables instead."""
    with web_server() as server:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", NOWHERE)
        assert connect(server.place).get_address() == f"http://{server.place}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.place)
        assert connect(None).get_address() == f"http://{server.place}"


VERBS = [
    ["list"],
    ["logs", "far"],
    ["logs", "far", "--follow"],
    ["stop", "far"],
    ["status", "{storage}/far"],
    ["submit", "{file}"],
    ["submit", "{file}", "--follow"],
    ["doctor"],
    ["doctor", "{file}"],
]


@pytest.fixture
def outlast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    body = f"name: far\nmodel: {{path: gpt2}}\ndata: {{train: /data/a.txt}}\ncheckpoint: {{storage: {tmp_path}}}\n"
    (tmp_path / "far.yaml").write_text(body)

    write(LocalStorage(tmp_path), "far", launch("20260101-120000-a", 0, 9))

    def call(*arguments: str) -> tuple[int, str]:
        words = [word.format(storage=tmp_path, file=tmp_path / "far.yaml") for word in arguments]
        monkeypatch.setattr("sys.argv", ["outlast", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return int(code or 0), capsys.readouterr().err

    return call


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_each_command_names_what_does_not_answer_as_a_job_server(
    verb: list[str], outlast: Callable[..., tuple[int, str]]
) -> None:
    with web_server({"GET /": (200, "text/html", "<html>Welcome</html>")}) as server:
        for address, code, text in [
            (f"http://{server.place}", 3, "a web server answers with a page"),
            (NOWHERE, 3, "Connection refused"),
        ]:
            found, error = outlast(*verb, "--address", address)
            assert found == code, error
            assert f"no job server answers at {address}: {text}" in error
            assert "→" in error
            assert "unexpected" not in error
            assert "Traceback" not in error


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({}, "without Ray's API"),
        ({"GET /": (200, JSON, "[]")}, "without Ray's version"),
        ({"GET /": (200, JSON, "{")}, "without Ray's version"),
        ({"GET /": (503, "text/html", "<html>no</html>")}, "HTTP 503 Service Unavailable"),
        ({"GET /api": (302, "", "/login"), "GET /login": (200, "text/html", "Log in")}, "a page after a redirection"),
        ({"GET /": (302, "", "/again")}, "endless redirections"),
    ],
)
def test_web_servers_that_are_no_job_server(answers: dict[str, Answer], text: str) -> None:
    with web_server(answers) as server, pytest.raises(JobServerUnavailable, match=text):
        connect(server.place)


def test_a_server_that_accepts_and_never_answers_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "ANSWER_TIMEOUT_S", 0.3)
    with (
        silent_server(accepts=True) as url,
        pytest.raises(JobServerUnavailable, match=r"does not answer within 0\.3 s"),
    ):
        connect(url)


def test_a_host_that_never_answers_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_server.CONNECT_TIMEOUT_S < 5
    monkeypatch.setattr(job_server, "CONNECT_TIMEOUT_S", 0.3)
    with (
        silent_server(accepts=False) as url,
        pytest.raises(JobServerUnavailable, match="no connection within") as error,
    ):
        connect(url)
    assert "ssh -L 8265:localhost:8265" in error.value.hint


def test_what_speaks_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            client.recv(1000)
            client.sendall(b"\0\1\2\n")
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(JobServerUnavailable, match="what answers is not a web server"):
            connect(f"127.0.0.1:{server.getsockname()[1]}")


def test_names_that_are_unknown() -> None:
    with pytest.raises(JobServerUnavailable, match=r"the host head\.invalid is unknown"):
        connect("head.invalid")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*map(str, command), *names], check=True, capture_output=True)
    return cert, key


def test_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cert, key = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with web_server() as server:
        with pytest.raises(JobServerUnavailable, match="it has no TLS at this port") as error:
            connect(f"https://{server.place}")
        assert f"--address http://{server.place}" in error.value.hint
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://{server.place}"
        with pytest.raises(JobServerUnavailable, match="its TLS certificate is not trusted: self-signed") as error:
            connect(url)
        assert "export REQUESTS_CA_BUNDLE=" in error.value.hint
        for path, problem in ((key, "no certificate"), (tmp_path / "none.pem", "No such file")):
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
            with pytest.raises(ConfigError, match=f"REQUESTS_CA_BUNDLE is .*(?i:{problem})"):
                connect(url)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
        assert connect(url).get_address() == url


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with web_server() as server, web_server({"GET http": (502, "text/plain", "busy")}) as proxy:
        for place, text in ((NOWHERE, "Connection refused"), (f"http://{proxy.place}", "busy")):
            monkeypatch.setenv("HTTP_PROXY", place)
            monkeypatch.setenv("http_proxy", place)
            with pytest.raises(PreflightError, match=f"{text}.*through the proxy {place}") as error:
                connect("http://head.invalid:8265")
            assert "NO_PROXY=head.invalid" in error.value.hint
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert not connect(server.place).has_proxy


TRACEBACK = 'Traceback (most recent call last):\n  File "job.py", line 1\nValueError: the last line\n'

#: As the head of Ray 2.60 answers for the agent of its node.
WRAPPED = f"Traceback\nRuntimeError: Request failed with status code 400: {TRACEBACK}.\n"


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        ((413, "text/html", "<html>413</html>"), ConfigError, "package of this size: HTTP 413"),
        ((500, "text/plain", "E: Maximum request body size 104857600 exceeded"), ConfigError, "package of this size"),
        ((500, "text/plain", TRACEBACK), JobServerUnavailable, "ValueError: the last line"),
        ((400, "text/plain", TRACEBACK), PreflightError, "ValueError: the last line"),
        ((500, "text/plain", WRAPPED), PreflightError, "ValueError: the last line"),
        ((401, "text/plain", "Unauthorized"), PreflightError, "requires a token"),
        ((403, "text/plain", "Forbidden"), PreflightError, "requires a token"),
        ((429, "text/plain", "slow down"), JobServerUnavailable, "slow down"),
    ],
)
def test_refusals(answer: Answer, error: type[OutlastError], text: str) -> None:
    """Those that a retry may pass are no others: a supervisor ends on the rest."""
    answers = {"GET /api/version": (200, JSON, VERSION), "PUT /": answer, "GET /api/packages": (404, "", "")}
    with web_server(answers) as server, pytest.raises(error, match=text) as caught:
        run_command(JobServer(server.place), ["version"], None)
    assert caught.value.permanent is not (error is JobServerUnavailable)
    assert "Traceback" not in caught.value.message
    assert any(request.startswith("PUT /api/packages") for request in server.requests)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_is_no_cluster_for_a_driver_is_named_before_ray_tries(scheme: str) -> None:
    """Ray itself tries for two minutes, and then ends the process."""
    with web_server() as server, pytest.raises(PreflightError, match="what answers has no gRPC") as error:
        _check_answers(f"{scheme}{server.place}")
    assert f"--address http://{server.place}" in error.value.hint
