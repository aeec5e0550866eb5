"""Timelines made by hand: launches and attempts with the events of their journals. Times are seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from outlast.checkpointing.format.layout import CLAIM, AttemptId, attempt_dir, launch_dir
from outlast.checkpointing.run_store.journal import EVENTS
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.monitoring.timeline import Timeline

Event = dict[str, Any]


def name_of(number: int) -> str:
    return f"{number:04d}-{number:04x}"


def start(t: float) -> Event:
    return {"event": "start", "t": t}


def resume(t: float, step: int, of: int = 1) -> Event:
    return {"event": "resume", "t": t, "step": step, "source": f"{name_of(of)}/checkpoint-{step}", "rejected": []}


def regrouped(t: float, step: int, of: int = 1, *, ranks: Sequence[int] = (1,), source: int = 0) -> Event:
    """Make the event of an attempt that continues in memory; the loss was noticed half a second before it."""
    times = {"noticed": t - 0.5, "seat": t - 0.45, "group": t - 0.4, "state": t - 0.2}
    event = {"event": "regrouped", "t": t, "step": step, "attempt": name_of(of), "noticed_at": t - 0.5, "marks": times}
    return {**event, "lost": [f"process-{rank}" for rank in ranks], "ranks": list(ranks), "source": source}


def under_way(t: float, step: int) -> Event:
    return {"event": "under-way", "t": t, "step": step, "marks": {"first_step": t}}


def plan(t: float, num_steps: int = 100, world_size: int = 2) -> Event:
    return {"event": "plan", "t": t, "num_steps": num_steps, "world_size": world_size, "batch": 8}


def steps(first: int, last: int, begin: float, seconds: float = 1.0, t: float | None = None) -> list[Event]:
    """Make consecutive steps of equal length; each is journaled after the next one began."""
    ends = [(step, begin + (step - first + 1) * seconds) for step in range(first, last + 1)]
    body = {"lr": 0.001, "grad_norm": 1.0, "count": 70, "tokens": 80, "seconds": seconds, "event": "step"}
    return [{**body, "step": step, "loss": 10 / step, "ended_at": end, "t": t or end + 0.1} for step, end in ends]


def evaluated(step: int, begin: float, end: float) -> Event:
    return {"event": "eval", "step": step, "eval_loss": 2.0, "seconds": end - begin, "t": end}


def saved(step: int, t: float, fenced_s: float = 0.0) -> list[Event]:
    """Make a commit event, and the event of its duration."""
    commit = {"event": "commit", "step": step, "t": t, "digest": "d1", "num_bytes": 1000, "seconds": 0.5}
    costs = {"event": "save", "step": step, "t": t, "blocked_s": 0.1, "fenced_s": fenced_s, "commit_s": 0.5}
    return [commit, costs]


def done(t: float, step: int = 100) -> Event:
    return {"event": "done", "t": t, "step": step, "model": f"0001-0001/checkpoint-{step}"}


def stopped(t: float, step: int) -> Event:
    return {"event": "stop", "t": t, "step": step}


def failure(of: int | str, noticed: float, cause: str = "worker died", reached: Any = None) -> Event:
    attempt = of if isinstance(of, str) else name_of(of)
    event: Event = {"event": "failure", "t": noticed + 1, "noticed_at": noticed, "attempt": attempt}
    event |= {"cause": cause, "rank": 1, "message": "it was killed", "where": "rank 1"}
    return {**event, "reached": reached} if reached else event


def resized(after: int, t: float, before: int, now: int, *, planned: bool) -> Event:
    return {"event": "resize", "t": t, "attempt": name_of(after), "before": before, "now": now, "planned": planned}


def launch(name: str, began: float, last: float, code: int | None = None, *events: Event) -> tuple[str, Event, Any]:
    """Make a launch whose last heartbeat is at `last`, which is its end if there is a `code`."""
    alive = {"began": began, "t": last, "ended": code is not None, "exit_code": code, "error": ""}
    return name, alive, events


def attempt(
    number: int, claimed_at: float, *events: Event | Sequence[Event], launch: str = "a", **claim: Any
) -> tuple[int, Event, list[Event]]:
    journal = [event for item in events for event in ([item] if isinstance(item, Mapping) else item)]
    return number, {"claimed_at": claimed_at, "launch": launch, "world_size": 2, **claim}, journal


def make_timeline(*parts: tuple[Any, Event, Any], run: str = "run") -> Timeline:
    timeline = Timeline(run)
    for name, body, events in parts:
        if isinstance(name, str):
            timeline.launch(name).alive = body
            for event in events:
                timeline.apply_launch_event(name, event)
        else:
            item = timeline.attempt(AttemptId(name, f"{name:04x}"))
            item.claim = body
            for event in events:
                timeline.apply_attempt_events(item, event)
    return timeline


def write(storage: LocalStorage, run: str, *parts: tuple[Any, Event, Any]) -> None:
    """Write a timeline as the journals, claims and liveness files of a run."""
    for name, body, events in parts:
        is_launch = isinstance(name, str)
        directory = launch_dir(run, name) if is_launch else attempt_dir(run, AttemptId(name, f"{name:04x}"))
        storage.put(f"{directory}/{'alive.json' if is_launch else CLAIM}", [json.dumps(body).encode()])
        lines = [json.dumps(event).encode() + b"\n" for event in events]
        storage.put(f"{directory}/{EVENTS}-0-000000.jsonl", lines)
