"""A run's state as plain values, for `status --json` and `list`; read from its storage, so it needs no cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.events import GroupFailureEvent, ResizeEvent
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.tools.query import list_checkpoints, load_catalog
from outlast.cluster.formatting import finite
from outlast.cluster.monitoring.run_snapshot import RunSnapshot, take_snapshot
from outlast.cluster.monitoring.timeline import Timeline, TimelineReader


def read_status(store: RunStore) -> dict[str, Any]:
    """Read one run's state.

    Raises:
        ConfigError: There is no such run.
        StorageError: The storage could not be read.
    """
    timeline = TimelineReader(store).update()
    return as_values(store, timeline, take_snapshot(timeline, time.time()))


def as_values(store: RunStore, timeline: Timeline, summary: RunSnapshot) -> dict[str, Any]:
    """Return what `status --json` prints."""
    launch = timeline.newest_launch(summary.now)
    catalog = None if timeline.is_unclaimed else load_catalog(store)
    checkpoints = list_checkpoints(store, catalog) if catalog else []
    newest = {**checkpoints[0], "verified_at": summary.newest and summary.newest.verified_at} if checkpoints else None
    failures = timeline.failure_by_attempt
    body = {
        **summary.as_values(),
        "step": summary.step or (checkpoints[0]["step"] if checkpoints else 0),
        "attempts": summary.num_attempts,
        "failures": [{**event.to_json(), "launch": launch.id} for launch, event in timeline.failures],
        "slow": [] if timeline.current is None else [asdict(rank) for rank in timeline.current.slow],
        "sizes": [_size_change(event, failures) for item in timeline.launches_in_order for event in item.resizes],
        "launch": {"id": launch.id, **launch.alive} if launch else None,
        "newest_checkpoint": newest,
        "damaged": [str(item.ref) for item in catalog.rejected] if catalog else [],
        "storage": store.storage.url,
        "save": asdict(summary.save) if summary.save else None,
        "interruptions": [asdict(item) for item in summary.interruptions],
        "lost_steps": summary.num_lost_steps,
        "wall_s": round(summary.goodput.wall_s, 3),
        "ledger": {category.value: round(seconds, 3) for category, seconds in summary.goodput.seconds.items()},
    }
    return dict(finite(body))


def list_runs(storage: Storage) -> list[dict[str, Any]]:
    """Read the state of every run in a storage, by name."""
    names = [entry.name for entry in storage.list("") if entry.num_bytes is None and not entry.name.startswith(".")]
    stores = [RunStore(storage, name) for name in names]
    return [read_status(store) for store in stores if list_attempts(store) or list_launches(store)]


def _size_change(resize: ResizeEvent, failures: Mapping[str, GroupFailureEvent]) -> dict[str, Any]:
    """Return a change of the number of workers, with the cause of the previous attempt's end."""
    failure = failures.get(str(resize.attempt))
    cause = "resized" if resize.planned else failure.cause if failure else "unknown"
    return {"t": resize.t, "attempt": resize.attempt, "before": resize.before, "now": resize.now, "cause": cause}
