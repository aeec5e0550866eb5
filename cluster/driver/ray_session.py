"""The Ray that a command uses: embedded, or an existing cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import AuthenticationError

from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.checkpointing.run_store.liveness import is_process_alive, process_start
from outlast.checkpointing.storage.retry import call_with_retries, constant_pauses
from outlast.cluster.driver.signals import _signals, interrupt_on_sigterm
from outlast.cluster.fault_tolerance.failure_cause import OWN_RAY
from outlast.cluster.preflight.finding import TOKEN_HINT

OBJECT_STORE_BYTES = 200 * 2**20


CONNECT_TIMEOUT_S = 2.0


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[bool]:
    """Ray for the duration: the one that is running in this process, the one at `address`, or one of our own.

    Yields whether it is somebody else's.

    `RAY_ADDRESS` counts as `address`. Ours has a folder of its own, which goes with it; folders of drivers that were
    killed go with the next one.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    folder = None
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        folder = _ray_folder()
        quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": folder}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # raylet prints obituaries there
            with contextlib.chdir(
                folder or "."
            ):  # workers import first from here: a folder `outlast` must not be found
                _init(address=address or "local", **quiet)
            interrupt_on_sigterm()
            yield bool(address)
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _init(address: str, **options: Any) -> None:
    """Starts or joins Ray.

    Raises:
        ConfigError: It is the address of something else.
        PreflightError: There is no such cluster, it has another Ray or Python, or it wants a token.
        KeyboardInterrupt: SIGINT or SIGTERM came meanwhile.
    """
    _check_answers(address)
    try:
        with _signals() as stopping:  # Ray forks: an interruption in the middle of that leaves a lock locked for good
            ray.init(address=address, **options)
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        if address == "local":
            raise
        said, hint = " ".join(str(error).split()), "check the address, and that Ray and Python are the same there"
        if "AuthenticationError" in f"{error!r} {error.__cause__} {error.__context__}":  # Ray wraps it as text
            said, hint = "it wants a token, and got none or another", TOKEN_HINT
        raise PreflightError(f"the Ray cluster at {address} cannot be joined: {said}", hint=hint) from error
    if stopping.is_set():
        raise KeyboardInterrupt


def _check_answers(address: str) -> None:
    """Connects once: Ray itself tries for minutes where nothing answers. Raises as `_init`."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "ray"):
        hint = f"give HEAD:6379; or through the job server: outlast submit RUN.yaml --address {address}"
        raise ConfigError(f"{address} is no address of a Ray cluster that a driver can join", hint=hint)
    if not port.isdecimal():
        return  # such as local or auto
    target = (host.strip("[]"), int(port))
    try:
        call_with_retries(
            lambda: socket.create_connection(target, CONNECT_TIMEOUT_S).close(),
            constant_pauses(0.5, CONNECT_TIMEOUT_S),
            lambda error: isinstance(error, OSError) and not isinstance(error, socket.gaierror),
        )
    except OSError as error:
        said = f"no Ray cluster answers at {address}: {error.strerror or error}"
        raise PreflightError(said, hint="check the address, and that `ray start --head` runs there") from error


def _ray_folder() -> str:
    """A new folder for a Ray of our own; removes those whose driver is gone."""
    for other in Path(tempfile.gettempdir()).glob(f"{OWN_RAY}*"):
        with contextlib.suppress(OSError, ValueError):
            pid, started = (other / "driver").read_text().split()
            if not is_process_alive(int(pid), started):
                shutil.rmtree(other, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=OWN_RAY)
    Path(folder, "driver").write_text(f"{os.getpid()} {process_start(os.getpid())}")
    return folder
