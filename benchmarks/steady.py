"""What it costs, step by step, to be ready to go on in memory: two workers with and without, in turns.

    python -m benchmarks.steady [--quick] [--json FILE]

Plain processes without Ray. With it, a worker keeps heartbeats with the roster, shares the losses of a step before its
weights change, and keeps what the others would need of the last steps' records. A step's seconds are the median over a
round without its first ten; the ratio is the median over the rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.command import command
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.drills.demo import write_texts
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.in_place_group import in_place_group
from tests.support.groups.worker_group import run_group, tiny_config

LIMIT_S = 600.0
SIZES: Mapping[str, Mapping[str, int]] = {
    "0.03 M parameters": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32},
    "4 M parameters": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 32},
}


def assignment(folder: Path, name: str, sizes: Mapping[str, int], steps: int) -> Assignment:
    """Return the work of one round."""
    sections = {"model": {"config": {"model_type": "gpt2", **sizes}}, "checkpoint": {"every": steps}}
    texts = str(folder / "texts.jsonl")
    config = tiny_config(name, str(folder / "runs"), texts, sections=sections, steps=steps, eval_every=steps)
    declared = config.model_dump(mode="json", exclude_defaults=True)
    return Assignment(config, declared, "first", prepare(config, LocalStorage(folder / "runs")))


def train(work: Assignment, storage: LocalStorage, *, is_ready: bool) -> list[Outcome | None]:
    """Run two workers to the end. Returns how each ended."""
    if not is_ready:
        return [item.outcome for item in run_group(work, storage, 2, limit_s=LIMIT_S)]
    with in_place_group(work, storage, 2) as group:
        return [None if item is None else item.outcome for item in group.ended(LIMIT_S)]


def step_s(folder: Path, name: str) -> float:
    """Return the median seconds of a step."""
    events = run_events(RunStore(LocalStorage(folder / "runs"), name))
    ends = sorted(event["ended_at"] for _, event in events if event["event"] == "step")
    return float(statistics.median(later - before for before, later in pairwise(ends[10:])))


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark."""
    rounds, steps = (2, 100) if quick else (6, 200)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="outlast-steady-", dir=os.environ.get("TMPDIR", "/var/tmp")) as place:
        folder = Path(place)
        write_texts(folder / "texts.jsonl")
        storage = LocalStorage(folder / "runs")
        for model, sizes in SIZES.items():
            found: dict[bool, list[float]] = {False: [], True: []}
            for number in range(rounds):
                for is_ready in (False, True) if number % 2 else (True, False):
                    name = f"{len(rows)}-{number}-{'ready' if is_ready else 'plain'}"
                    work = assignment(folder, name, sizes, steps)
                    outcomes = train(work, storage, is_ready=is_ready)
                    assert outcomes == [Outcome.DONE] * 2, outcomes
                    found[is_ready].append(step_s(folder, name))
            ratios = [ready / plain for ready, plain in zip(found[True], found[False], strict=True)]
            rows.append(
                {
                    "model": model,
                    "plain_s": statistics.median(found[False]),
                    "ready_s": statistics.median(found[True]),
                    "ready_over_plain": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                }
            )
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rounds": rounds, "rows": rows}


if __name__ == "__main__":
    command(measure)
