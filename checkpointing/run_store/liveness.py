"""Liveness files: which launches of a run are running, by a heartbeat.

They only prevent that a second launch supersedes a running one by accident. Correctness never depends on them; the
claims ensure it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import is_litter
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.run_store.typed_json import Moment, fitting
from outlast.checkpointing.storage.base import Storage, read_object
from outlast.checkpointing.storage.retry import retry

HEARTBEAT_S = 5.0
GRACE_PERIOD_S = 15.0
_TYPES = {
    "beat": int,
    "began": Moment,
    "t": Moment,
    "host": str,
    "pid": int,
    "started": str,
    "ended": bool,
    "exit_code": int | None,
    "settings": str,
    "error": str,
    "progress": Mapping[str, Any],
    "root": str,
}


def find_active_launch(store: RunStore) -> str | None:
    """Return another launch of the run that is still running, or None. Takes up to 15 s if a heartbeat must be awaited.

    Two launches cannot damage the run, but the second would stop the first.
    """
    seen: dict[str, Any] = {}
    deadline = time.monotonic() + GRACE_PERIOD_S
    while True:
        open_launches = open_launch_files(store)
        for launch, body in open_launches.items():
            if seen.setdefault(launch, body.get("beat")) != body.get("beat"):
                return launch
        if not open_launches or time.monotonic() > deadline:
            return None
        time.sleep(0.5)
        store.refresh()


def open_launch_files(store: RunStore) -> dict[str, dict[str, Any]]:
    """Return the liveness files, by launch, of the launches that have recorded no end and are not known to be dead."""
    names = [entry.name for entry in store.storage.list(f"{store.run}/launches") if not is_litter(entry.name)]
    bodies = {name: read_liveness(store, name) for name in names}
    return {name: body for name, body in bodies.items() if body and not body.get("ended") and not is_dead(body)}


def is_dead(alive: Mapping[str, Any]) -> bool:
    """Return whether a liveness file belongs to an ended process of this machine; False for other machines."""
    started = alive.get("started")
    return alive.get("host") == _host() and bool(started) and process_start(alive.get("pid", 0)) != started


def _host() -> str:
    """Return host name, boot and PID namespace: containers may share any one of them."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def process_start(pid: int) -> str:
    """Return the kernel's start time of a process; empty if it does not exist.

    In ticks since the start of the machine, as in `alive.json`: psutil's time moves when the clock is set.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def is_process_alive(pid: int, started: str) -> bool:
    return bool(started) and process_start(pid) == started


class LivenessFile:
    """Keeps the liveness file of this launch up to date from a thread.

    `settings` is the `settings_digest` of the launch, `began` its start in seconds since the epoch; None is now.
    `progress` is written with each heartbeat: what the driver knows and a killed rank 0 left out of its journal.
    `root` is the name of the actor that runs the workers, if they outlive the driver.
    """

    def __init__(
        self, storage: Storage, path: str, settings: str = "", began: float | None = None, root: str = ""
    ) -> None:
        self._storage, self._path, self._settings, self._root = storage, path, settings, root
        self._is_handed_over = False
        self.began = time.time() if began is None else began
        self.progress: Mapping[str, Any] = {}
        self._beat = 0
        self._ended = threading.Event()
        self._put(None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _put(self, exit_code: int | None, error: str = "") -> None:
        body = {
            "beat": self._beat,
            "began": self.began,
            "t": time.time(),
            "host": _host(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "ended": exit_code is not None,
            "exit_code": exit_code,
            "settings": self._settings,
            "error": redact(error),
            "progress": dict(self.progress),
            "root": self._root,
        }
        self._storage.put(self._path, [json.dumps(body).encode()])

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._beat += 1
            with contextlib.suppress(StorageError):  # a second launch may then not see this one
                self._put(None)

    def apply(self, body: Mapping[str, Any]) -> None:
        """Keep the newest attempt's plan and last step, from a live event."""
        event, attempt = events.parse_event(body), body.get("sender")
        if not isinstance(attempt, str):
            return
        known = self.progress if self.progress.get("attempt") == attempt else {"attempt": attempt, "step": 0}
        if isinstance(event, events.PlanEvent):
            self.progress = {**known, "num_steps": event.num_steps}
        elif isinstance(event, events.StepEvent):
            self.progress = {**known, "step": event.step, "ended_at": event.ended_at}

    def hand_over(self) -> None:
        """Leave the file, from now on, to another process of the launch."""
        self._ended.set()
        self._thread.join()
        self._is_handed_over = True

    def end(self, exit_code: int | None, error: str = "") -> None:
        """Record the end, unless another process of the launch does."""
        self._ended.set()
        self._thread.join()
        if self._is_handed_over:
            return
        with contextlib.suppress(StorageError):
            self._put(1 if exit_code is None else exit_code, error)


def read_liveness(store: RunStore, launch: str) -> dict[str, Any]:
    """Read the liveness file of a launch; empty if it is missing, damaged, or recorded as unreadable.

    It has `t`, and no value of a wrong type.
    """
    path = f"{store.launch_dir(launch)}/alive.json"
    body: dict[str, Any] = {}
    with store.going_on(path):
        body |= retry(lambda: read_object(store.storage, path))
    body = fitting(body, _TYPES)
    return {"t": 0.0, **body} if body else {}


def end_for(store: RunStore, launch: str, exit_code: int, error: str) -> None:
    """Record the end of a launch whose own process could not, unless it did."""
    with contextlib.suppress(StorageError):
        body = read_liveness(store, launch)
        if body and not body.get("ended"):
            ended = {"t": time.time(), "ended": True, "exit_code": exit_code, "error": redact(error)}
            store.storage.put(f"{store.launch_dir(launch)}/alive.json", [json.dumps({**body, **ended}).encode()])
