"""The state of a run, read from its own storage: works when the cluster that trained it has gone."""

from __future__ import annotations

import json
import time
from enum import Enum
from typing import Any

from outlast.checkpointing.commands import list_checkpoints, look
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.journal import read_events
from outlast.checkpointing.layout import AttemptId, attempt_dir, launch_dir
from outlast.checkpointing.lineage import list_attempts, read_claim
from outlast.checkpointing.storage import Storage, read_bytes

SILENCE_S = 30.0


class State(Enum):
    """What a run is doing, as far as its storage tells."""

    DONE = "done"
    STARTING = "starting"  #: its driver is alive; no worker has claimed the run yet
    RUNNING = "running"
    STOPPED = "stopped"  #: it was interrupted, and can be resumed
    FAILED = "failed"
    LOST = "lost"  #: its driver fell silent without a word
    UNATTENDED = "unattended"  #: checkpoints of a loop of one's own, which has no driver to tell


def read_status(storage: Storage, run: str) -> dict[str, Any]:
    """One run at a glance, as plain values.

    Raises:
        ConfigError: There is no such run.
        StorageError: The storage could not be read.
    """
    attempts = list_attempts(storage, run)
    launch = newest_launch(storage, run)
    is_new = not attempts and launch is not None
    checkpoints = [] if is_new else list_checkpoints(storage, run)
    events = _newest_events(storage, run, attempts)
    steps = [event for event in events if event["event"] == "step"]
    plan: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "plan"), {})
    done = any(event["event"] == "done" for event in events)
    return {
        "run": run,
        "state": (State.DONE if done else _state(launch, is_new)).value,
        "step": steps[-1]["step"] if steps else (checkpoints[0]["step"] if checkpoints else 0),
        "num_steps": plan.get("num_steps"),
        "loss": steps[-1]["loss"] if steps else None,
        "world_size": plan.get("world_size"),
        "attempts": len(attempts),
        "failures": [event for name in _launches(storage, run) for event in _failures(storage, run, name)],
        "launch": launch,
        "newest_checkpoint": checkpoints[0] if checkpoints else None,
        "damaged": [] if is_new else [str(item.ref) for item in look(storage, run).rejected],
        "storage": storage.url,
    }


def list_runs(storage: Storage) -> list[dict[str, Any]]:
    """The state of every run in a storage, by name."""
    names = [entry.name for entry in storage.list("") if entry.num_bytes is None and not entry.name.startswith(".")]
    return [read_status(storage, name) for name in names if list_attempts(storage, name) or _launches(storage, name)]


def _launches(storage: Storage, run: str) -> list[str]:
    return [entry.name for entry in storage.list(f"{run}/launches") if entry.num_bytes is None]


def newest_launch(storage: Storage, run: str) -> dict[str, Any] | None:
    """The newest launch's id, and its last sign of life."""
    for name in reversed(_launches(storage, run)):
        try:
            body = json.loads(read_bytes(storage, f"{launch_dir(run, name)}/alive.json"))
        except (FileNotFoundError, ValueError):
            continue
        return {"id": name, **body}
    return None


def _newest_events(storage: Storage, run: str, attempts: list[AttemptId]) -> list[dict[str, Any]]:
    """The events of the newest attempt that has any."""
    for attempt in reversed(attempts):
        if events := list(read_events(storage, attempt_dir(run, attempt))):
            return events
    return []


def _failures(storage: Storage, run: str, launch: str) -> list[dict[str, Any]]:
    events = read_events(storage, launch_dir(run, launch))
    return [{"launch": launch, **event} for event in events if event["event"] == "failure"]


def _state(launch: dict[str, Any] | None, is_new: bool) -> State:
    if launch is None:
        return State.UNATTENDED
    if launch["ended"]:
        return {0: State.DONE, 75: State.STOPPED, 130: State.STOPPED}.get(launch["exit_code"], State.FAILED)
    if time.time() - launch["t"] >= SILENCE_S:
        return State.LOST
    return State.STARTING if is_new else State.RUNNING


def declared_settings(storage: Storage, run: str) -> dict[str, Any]:
    """The settings of the run's newest claim, as their user wrote them.

    Raises:
        StorageError: No claim can be read.
    """
    for attempt in reversed(list_attempts(storage, run)):
        if settings := read_claim(storage, run, attempt).get("settings"):
            return dict(settings)
    raise StorageError(f"run {run!r} in {storage.url} holds no claim with settings", hint="give the run file instead")
