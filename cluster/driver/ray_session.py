"""The Ray that a command uses: embedded, or an existing cluster.

It must never leave an embedded Ray or its folder behind, nor shut down a cluster that it only joined.
"""

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.checkpointing.run_store.liveness import is_process_alive, process_start
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.checkpointing.storage.retry import call_with_retries, constant_pauses
from outlast.cluster.driver.embedded_ray import embedded_ray_environment
from outlast.cluster.driver.signals import interrupt_on_sigterm, stop_flag
from outlast.cluster.preflight.finding import TOKEN_HINT

OBJECT_STORE_BYTES = 200 * 2**20
CONNECT_TIMEOUT_S = 2.0
_SETTINGS_TIMEOUT_S = 10.0
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty frame of HTTP/2
_SOCKET_BYTES = 107  # of the path of a Unix socket
_SOCKET = "/sockets/plasma_store"
#: Ray lets every user write to its directory, so it gets one inside that of this user.
_INNER = "/r"


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[bool]:
    """Run the body with Ray: the one of this process, the one at `address`, or an embedded one.

    `RAY_ADDRESS` counts as `address`. Yields whether an existing cluster was joined. An embedded Ray can be reached
    from this machine only, with a random token. It has a folder of its own, which is removed with it; the next one
    removes the folders of drivers that were killed.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield bool(address)
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    with contextlib.ExitStack() as stack:
        folder = "."
        if not address:
            stack.enter_context(embedded_ray_environment())
            folder = _ray_folder()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            quiet |= {
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": f"{folder}{_INNER}",
            }
        stack.callback(ray.shutdown)
        # The raylet prints messages of dead workers on standard output.
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        # Workers import first from the working directory: a folder `outlast` must not be found there.
        with contextlib.chdir(folder):
            _init(address=address or "local", **quiet)
        interrupt_on_sigterm()
        yield bool(address)


def _init(address: str, **options: Any) -> None:
    """Start or join Ray.

    Raises:
        ConfigError: The address is not a Ray cluster's.
        PreflightError: There is no such cluster, it has another Ray or Python, or it requires a token.
        KeyboardInterrupt: SIGINT or SIGTERM arrived meanwhile.
    """
    _check_answers(address)
    try:
        with stop_flag() as stopping:  # Ray forks: an interruption during that leaves a lock held forever
            ray.init(address=address, **options)
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        if address == "local":
            raise
        reason, hint = " ".join(str(error).split()), "check the address, and that Ray and Python are the same there"
        if "AuthenticationError" in f"{error!r} {error.__cause__} {error.__context__}":  # Ray wraps it as text
            reason, hint = "it requires a token, and none or a wrong one was given", TOKEN_HINT
        raise PreflightError(f"the Ray cluster at {address} cannot be joined: {reason}", hint=hint) from error
    if stopping.is_set():
        raise KeyboardInterrupt


def _check_answers(address: str) -> None:
    """Connect once, because Ray itself retries for minutes where nothing answers. Raises as `_init`."""
    scheme, _, target = address.rpartition("://")
    host, _, port = target.rpartition(":")
    if scheme not in ("", "ray"):
        hint = f"give HEAD:6379; or through the job server: outlast submit RUN.yaml --address {address}"
        raise ConfigError(f"{address} is not the address of a Ray cluster that a driver can join", hint=hint)
    if not port.isdecimal():
        return  # such as local or auto
    endpoint = (host.strip("[]"), int(port))
    try:
        call_with_retries(
            lambda: socket.create_connection(endpoint, CONNECT_TIMEOUT_S).close(),
            constant_pauses(0.5, CONNECT_TIMEOUT_S),
            lambda error: isinstance(error, OSError) and not isinstance(error, socket.gaierror),
        )
    except OSError as error:
        message = f"no Ray cluster answers at {address}: {error.strerror or error}"
        raise PreflightError(message, hint="check the address, and that `ray start --head` runs there") from error
    if not _has_grpc(endpoint):
        hint = f"give HEAD:6379; or, if it is a job server: --address http://{target}"
        raise PreflightError(f"no Ray cluster answers at {address}: what answers has no gRPC", hint=hint)


def _has_grpc(endpoint: tuple[str, int]) -> bool:
    """Check whether a server answers the preface of HTTP/2 with its settings (RFC 9113, 3.4), as gRPC does."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", "false", "False"):
        return True
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(endpoint, CONNECT_TIMEOUT_S) as connection:
        connection.settimeout(_SETTINGS_TIMEOUT_S)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
        while len(answer) < 4 and (part := connection.recv(16)):
            answer += part
    return answer[3:4] == _SETTINGS[3:4]  # the type of a frame


def _ray_folder() -> str:
    """Make the folder of an embedded Ray, in `RAY_TMPDIR` if it is set; remove those whose driver is gone.

    Raises PreflightError if Ray cannot work in that directory.
    """
    from outlast.cluster.fault_tolerance.failure_cause import (
        OWN_RAY,
    )  # it imports torch, which joining a cluster need not

    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    root = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    longest = _SOCKET_BYTES - len(
        f"/{OWN_RAY}12345678/session_2026-01-01_00-00-00_000000_{os.getpid()}{_INNER}{_SOCKET}"
    )
    if len(os.fsencode(root)) > longest:
        message = f"{variable} {root} is too long: the path of a socket has at most {_SOCKET_BYTES} bytes"
        raise PreflightError(message, hint=f"set {variable} to a directory of at most {longest} characters")
    for other in root.glob(f"{OWN_RAY}*"):
        with contextlib.suppress(OSError, ValueError):
            found, driver = other.lstat(), other / "driver"
            if not stat.S_ISDIR(found.st_mode) or {found.st_uid, driver.lstat().st_uid} != {os.geteuid()}:
                continue  # a link, or of another user
            pid, started = read_small_file(driver, follow=False).split()
            if not is_process_alive(int(pid), started.decode()):
                shutil.rmtree(other, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=OWN_RAY, dir=root)
    except OSError as error:
        message = f"no local Ray can be started in {variable} {root}: {error.strerror}"
        raise PreflightError(message, hint=f"set {variable} to a writable directory") from error
    Path(folder, "driver").write_text(f"{os.getpid()} {process_start(os.getpid())}")
    return folder
