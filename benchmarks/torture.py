"""A worker killed every 15 seconds for half an hour: what of the time is training, beside bare Ray Train.

    python -m benchmarks.torture [--quick] [--json FILE]

A 30,000-weight GPT-2 on two workers and one spare, of so many steps that it takes about half an hour (five minutes with
`--quick`). The rank to kill is drawn anew each time, rank 0 included; the seed and each kill are in the result.
Weights, optimizer state and losses must be those of the same run undisturbed. Bare Ray Train is under the same kills
for as long, with a checkpoint as often.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

from benchmarks.command import command
from benchmarks.recovery import read_steps
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.drills.comparison import final_state
from outlast.cluster.drills.demo import write_texts
from tests.support.groups.worker_group import tiny_config

SEED, PERIOD_S, EVERY = 20, 15.0, 500
OUTLAST = str(Path(sys.executable).with_name("outlast"))


def run_file(folder: Path, name: str, steps: int) -> Path:
    """Write the run file of a torture or of its undisturbed copy."""
    body = tiny_config(name, str(folder / "runs"), str(folder / "texts.jsonl"), steps=steps, eval_every=None)
    declared = body.model_dump(mode="json", exclude_defaults=True)
    declared["data"].pop("eval")
    declared["checkpoint"] |= {"every": EVERY, "overlap": True}
    declared["scale"] = {"workers": 2, "spares": 1, "cpus_per_worker": 0.5}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(declared))
    return path


def kill_until(find: Callable[[], dict[int, int]], is_over: Callable[[], bool]) -> list[dict[str, Any]]:
    """Kill a random rank every `PERIOD_S` seconds. `find` returns the process of each rank. Returns the kills."""
    chance, kills, due = random.Random(SEED), [], time.time() + PERIOD_S
    while not is_over():
        time.sleep(0.05)
        if time.time() < due:
            continue
        rank = chance.randrange(2)
        if pid := find().get(rank):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills.append({"t": round(time.time(), 3), "rank": rank})
        due += PERIOD_S
    return kills


def train(folder: Path, name: str, steps: int, *, with_kills: bool = False) -> tuple[float, list[dict[str, Any]]]:
    """Run outlast to the end. Returns the seconds from the first step to the last, and the kills."""
    store = RunStore(LocalStorage(folder / "runs"), name)

    def made() -> list[float]:
        return [event["ended_at"] for _, event in run_events(store.fresh()) if event["event"] == "step"]

    def ranks() -> dict[int, int]:
        for attempt in list_attempts(store.fresh())[-1:]:
            return {worker["rank"]: worker["pid"] for worker in read_claim(store.fresh(), attempt)["workers"]}
        return {}

    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([OUTLAST, "train", str(run_file(folder, name, steps))], stdout=log, stderr=log)
        while not made() and process.poll() is None:
            time.sleep(0.5)
        kills = kill_until(ranks, lambda: process.poll() is not None) if with_kills else []
        if code := process.wait():
            raise RuntimeError(f"outlast train ended with {code}: {(folder / f'{name}.log').read_text()[-2000:]}")
    return max(made()) - min(made()), kills


def ours(folder: Path, seconds: float) -> dict[str, Any]:
    """A run that takes about `seconds`, undisturbed and under the kills."""
    calibrated, _ = train(folder, "calibration", 500)
    steps = int(500 / calibrated * seconds)
    quiet_s, _ = train(folder, "undisturbed", steps)
    tortured_s, kills = train(folder, "torture", steps, with_kills=True)
    storage = LocalStorage(folder / "runs")
    tortured, quiet = (final_state(RunStore(storage, name)) for name in ("torture", "undisturbed"))
    events = [event for _, event in run_events(RunStore(storage, "torture"))]
    made = Counter(event["step"] for event in events if event["event"] == "step")
    first = {event["step"]: event["marks"]["first_step"] for event in events if event["event"] == "under-way"}
    groups = [event for event in events if event["event"] == "regrouped"]
    stood = []
    for group in groups:
        struck = max((kill["t"] for kill in kills if kill["t"] <= group["marks"]["noticed"]), default=None)
        if struck is not None and group["step"] + 1 in first:
            stood.append(first[group["step"] + 1] - struck)
    return {
        "steps": steps,
        "steps_twice": sum(number > 1 for number in made.values()),
        "resumes": sum(event["event"] == "resume" for event in events),
        "kills": kills,
        "regroupings": len(groups),
        "stood_median_s": median(stood),
        "stood_most_s": max(stood),
        "tortured_s": tortured_s,
        "undisturbed_s": quiet_s,
        "goodput": 1 - sum(stood) / tortured_s,
        "equal_weights": bool(quiet.weights) and tortured.weights == quiet.weights,
        "equal_optimizer": bool(quiet.optimizer) and tortured.optimizer == quiet.optimizer,
        "equal_losses": len(quiet.losses) == steps and tortured.losses == quiet.losses,
    }


def bare(folder: Path, seconds: float) -> dict[str, Any]:
    """Bare Ray Train under the same kills."""
    place = folder / "bare"
    place.mkdir()
    script = Path(__file__).with_name("recovery_bare.py")
    arguments = [str(place), str(10**6), str(EVERY), "-1"]
    with (folder / "bare.log").open("w") as log:
        process = subprocess.Popen([sys.executable, str(script), *arguments], stderr=log, stdout=log)

    def ranks() -> dict[int, int]:
        found = [
            each for each in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in each.name()
        ]
        return dict(enumerate(each.pid for each in found))

    while not read_steps(place) and process.poll() is None:
        time.sleep(0.5)
    began = time.time()
    kills = kill_until(ranks, lambda: process.poll() is not None or time.time() > began + seconds)
    made = read_steps(place)
    process.kill()
    process.wait()
    counts = Counter(step for _, step in made)
    steps = max(counts)
    return {
        "seconds": time.time() - began,
        "kills": len(kills),
        "steps": steps,
        "steps_twice": sum(counts.values()) - len(counts),
    }


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark."""
    seconds = 300.0 if quick else 1800.0
    with tempfile.TemporaryDirectory(prefix="outlast-torture-", dir=os.environ.get("TMPDIR", "/var/tmp")) as place:
        folder = Path(place)
        write_texts(folder / "texts.jsonl")
        found = ours(folder, seconds)
        print(json.dumps(found), file=sys.stderr)
        peer = bare(folder, found["tortured_s"])
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": SEED,
        "period_s": PERIOD_S,
        "goodput": "share of the time that is not between a kill and the end of the next step",
        "rows": [{"name": "outlast", **found}, {"name": "bare Ray Train", **peer}],
    }


if __name__ == "__main__":
    command(measure)
