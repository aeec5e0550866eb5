"""Which launches are at work: each keeps a small file whose beat goes on.

For courtesy alone, so that a second launch does not stop the first by accident; the claims are the safety.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage, read_bytes

HEARTBEAT_S = 5.0
GRACE_PERIOD_S = 15.0


def find_active_launch(store: RunStore) -> str | None:
    """Another launch of the run that is still at work, or None. Takes up to 15 s when it cannot be told at once.

    This is courtesy: two launches cannot harm the run, but the second would stop the first.
    """
    seen: dict[str, Any] = {}
    deadline = time.monotonic() + GRACE_PERIOD_S
    while True:
        open_launches = dict(_open_launches(store))
        for launch, beat in open_launches.items():
            if seen.setdefault(launch, beat) != beat:
                return launch
        if not open_launches or time.monotonic() > deadline:
            return None
        time.sleep(0.5)
        store.refresh()  # whatever was read of the run is old now


def _open_launches(store: RunStore) -> Iterator[tuple[str, Any]]:
    for entry in store.storage.list(f"{store.run}/launches"):
        body = read_liveness(store, entry.name)
        if body and not body.get("ended") and not is_dead(body):
            yield entry.name, body.get("beat")


def is_dead(alive: Mapping[str, Any]) -> bool:
    """Whether a driver of this machine, by its sign of life, is no process any more; of other machines nobody knows."""
    started = alive.get("started")
    return alive.get("host") == _host() and bool(started) and process_start(alive.get("pid", 0)) != started


def _host() -> str:
    """This machine, this start of it, and what numbers its processes: containers may share the rest."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def process_start(pid: int) -> str:
    """The kernel's mark of when a process began, or nothing when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def is_process(pid: int, started: str) -> bool:
    return bool(started) and process_start(pid) == started


class LivenessFile:
    """Shows that this launch is at work: a small file whose beat goes on.

    Args:
        storage: The storage root.
        path: The file.
        settings: Which settings the launch has, see `history.settings_mark`.
        began: When the launch began, in seconds since the epoch; now if nobody says so.
    """

    def __init__(self, storage: Storage, path: str, settings: str = "", began: float | None = None) -> None:
        self._storage, self._path, self._settings = storage, path, settings
        self._began = time.time() if began is None else began
        self._beat = 0
        self._ending = threading.Event()
        self._put(None)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _put(self, exit_code: int | None, error: str = "") -> None:
        body = {
            "beat": self._beat,
            "began": self._began,
            "t": time.time(),
            "host": _host(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "ended": exit_code is not None,
            "exit_code": exit_code,
            "settings": self._settings,
            "error": error,
        }
        self._storage.put(self._path, [json.dumps(body).encode()])

    def _keep(self) -> None:
        while not self._ending.wait(HEARTBEAT_S):
            self._beat += 1
            with contextlib.suppress(StorageError):  # a missed beat only makes a second launch less polite
                self._put(None)

    def end(self, exit_code: int | None, error: str = "") -> None:
        self._ending.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            self._put(1 if exit_code is None else exit_code, error)


def read_liveness(store: RunStore, launch: str) -> dict[str, Any]:
    """A launch's last sign of life; empty when there is none that can be read."""
    try:
        body = json.loads(read_bytes(store.storage, f"{store.launch_dir(launch)}/alive.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
