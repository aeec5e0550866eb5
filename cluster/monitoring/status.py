"""The state of a run as plain values, read from its own storage: works when the cluster that trained it has gone."""

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
from outlast.cluster.monitoring.run_summary import RunSummary, summarize
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_reader import TimelineReader


def read_status(store: RunStore) -> dict[str, Any]:
    """One run at a glance, as plain values.

    Raises:
        ConfigError: There is no such run.
        StorageError: The storage could not be read.
    """
    story = TimelineReader(store).look()
    return as_values(store, story, summarize(story, time.time()))


def as_values(store: RunStore, story: Timeline, seen: RunSummary) -> dict[str, Any]:
    """What `status --json` prints."""
    launch = story.newest_launch(seen.now)
    catalog = None if story.is_new else load_catalog(store)
    checkpoints = list_checkpoints(store, catalog) if catalog else []
    newest = {**checkpoints[0], "verified_at": seen.newest and seen.newest.verified_at} if checkpoints else None
    ledger, failures = seen.ledger, story.failures_of
    body = {
        "run": store.run,
        "state": seen.state.value,
        "step": seen.step or (checkpoints[0]["step"] if checkpoints else 0),
        "num_steps": seen.num_steps,
        "loss": seen.loss,
        "world_size": seen.world_size,
        "attempts": seen.num_attempts,
        "failures": [{**event.to_json(), "launch": launch.id} for launch, event in story.failures],
        "slow": [] if story.current is None else [asdict(rank) for rank in story.current.slow],
        "sizes": [_size_change(event, failures) for item in story.launches_in_order for event in item.resizes],
        "launch": {"id": launch.id, **launch.alive} if launch else None,
        "newest_checkpoint": newest,
        "damaged": [str(item.ref) for item in catalog.rejected] if catalog else [],
        "storage": store.storage.url,
        "lr": seen.lr,
        "scores": dict(seen.scores),
        "tokens_per_s": seen.tokens_per_s,
        "samples_per_s": seen.samples_per_s,
        "seconds_per_step": seen.seconds_per_step,
        "left_s": seen.left_s,
        "save": asdict(seen.save) if seen.save else None,
        "interruptions": [asdict(item) for item in seen.interruptions],
        "lost_steps": seen.num_lost,
        "wall_s": round(ledger.wall_s, 3),
        "goodput": ledger.goodput,
        "ledger": {kind.value: round(seconds, 3) for kind, seconds in ledger.seconds.items()},
    }
    return dict(finite(body))


def list_runs(storage: Storage) -> list[dict[str, Any]]:
    """The state of every run in a storage, by name."""
    names = [entry.name for entry in storage.list("") if entry.num_bytes is None and not entry.name.startswith(".")]
    stores = [RunStore(storage, name) for name in names]
    return [read_status(store) for store in stores if list_attempts(store) or list_launches(store)]


def _size_change(resize: ResizeEvent, failures: Mapping[str, GroupFailureEvent]) -> dict[str, Any]:
    """A change of the number of workers, with its cause: the end of the attempt before, or a resize on purpose."""
    failure = failures.get(str(resize.attempt))
    cause = "resized" if resize.planned else failure.cause if failure else "unknown"
    return {"t": resize.t, "attempt": resize.attempt, "before": resize.before, "now": resize.now, "cause": cause}
