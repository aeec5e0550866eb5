"""How long a save holds up training, and what it costs besides: outlast and the others, side by side.

    python -m benchmarks.stall [--quick] [--json FILE]

One process trains a model whose weights and AdamW moments are 624 MB (156 MB with --quick). In each round every
competitor, in random order, saves once: a plain step, the save, one step trained meanwhile (for those that write in the
background), the wait until it is durable, and a load into another model after its files have left the page cache. The
first round is told apart. Ray's `report` only works inside a Ray worker, so its two rows come from a process of their
own, with memcpy and the raw disk measured again in there. What the columns say:

`blocked_over_memcpy`  seconds for which the main thread was held up: the save call, and what the next optimizer step
                       waited in its pre-hooks; over the median copy of the same bytes into kept buffers. Saves never
                       overlap, so nobody waits for the one before
`main_cpu_over_memcpy` CPU seconds of the main thread in those two
`step_s`               the plain step
`slowdown_s`           how much longer than that the step after the save took, the wait excluded: what the work in the
                       background takes from training
`commit_s`             from the call until the checkpoint is durable: fsync of every file and directory it wrote, by us
                       where the competitor calls none; that one step is in it for those that write in the background
`load_s`               into model and optimizer, the library's own way. Outlast's load verifies every byte, no other
                       does; whether what was loaded has the digest of what was saved is checked outside the clock
`extra_bytes`          what stays resident after the first save, and the peak above it in later ones, both less what a
                       plain step leaves and takes; children included
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command
from benchmarks.peers import Memcpy, Peer, RawWrite, all_peers, dcp_group
from benchmarks.training import Memory, Training, drop_cache, stacked

Sample = dict[str, float]


def once(peer: Peer, step: int, training: Training, twin: Training) -> Sample:
    """One save and one load, proven equal."""
    memory = Memory()
    memory.reset()
    before = memory.now()
    plain_s = training.step()[0]
    step_peak, step_kept = memory.peak() - before, memory.now() - before
    saved = training.digest()
    gc.collect()
    memory.reset()
    before = memory.now()
    began, cpu_began = time.perf_counter(), time.thread_time()
    peer.save(step)
    returned, cpu_returned = time.perf_counter(), time.thread_time()
    step_s, fence_s, fence_cpu_s = training.step() if peer.overlaps else (plain_s, 0.0, 0.0)
    directory = peer.finish()
    committed = time.perf_counter()
    peak, after = memory.peak(), memory.now()
    drop_cache(directory)
    twin.forget()
    loading = time.perf_counter()
    peer.load(twin)
    loaded = time.perf_counter()
    assert twin.digest() == saved, f"{peer.name} did not load what it saved"
    shutil.rmtree(directory, ignore_errors=True)
    return {
        "blocked_s": returned - began + fence_s,
        "main_cpu_s": cpu_returned - cpu_began + fence_cpu_s,
        "step_s": plain_s,
        "slowdown_s": step_s - fence_s - plain_s,
        "commit_s": committed - began,
        "load_s": loaded - loading,
        "kept_bytes": after - before - (step_kept if peer.overlaps else 0),
        "peak_bytes": peak - before - (step_peak if peer.overlaps else 0),
    }


def compete(peers: Sequence[Peer], rounds: int, width: int, folder: Path) -> list[dict[str, Any]]:
    """The rows: medians and quartiles over `rounds`, after a round that only `first_…` tells of.

    Args:
        peers: The competitors; `Memcpy` and `RawWrite` must be among them.
        rounds: How often each saves, the first time apart.
        width: Of the model's layers.
        folder: Where checkpoints lie, on the disk to measure.
    """
    training, twin = stacked(width), stacked(width)
    samples: dict[str, list[Sample]] = {peer.name: [] for peer in peers}
    for peer in peers:
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        peer.prepare(training, place)
    gc.freeze()
    for number in range(rounds + 1):
        for peer in random.sample(peers, len(peers)):
            samples[peer.name].append(once(peer, number + 1, training, twin))
    for peer in peers:
        peer.close()
    memcpy_s = statistics.median(sample["blocked_s"] for sample in samples[Memcpy.name][1:])
    raw = {
        key: statistics.median(sample[key] for sample in samples[RawWrite.name][1:]) for key in ("commit_s", "load_s")
    }
    return [row(name, found, memcpy_s, raw) for name, found in samples.items()]


def row(name: str, samples: Sequence[Sample], memcpy_s: float, raw: Sample) -> dict[str, Any]:
    """One competitor's medians, each with its quartiles."""
    first, *later = samples
    keys = ("step_s", "slowdown_s", "commit_s", "load_s")
    values = {
        "blocked_over_memcpy": [sample["blocked_s"] / memcpy_s for sample in later],
        "main_cpu_over_memcpy": [sample["main_cpu_s"] / memcpy_s for sample in later],
        **{key: [sample[key] for sample in later] for key in keys},
    }
    result: dict[str, Any] = {"name": name}
    for key, found in values.items():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        result |= {key: middle, f"{key}_quartiles": [low, high]}
    return result | {
        "commit_over_raw": result["commit_s"] / raw["commit_s"],
        "load_over_raw": result["load_s"] / raw["load_s"],
        "extra_bytes": max(0, int(first["kept_bytes"])) + int(statistics.median(item["peak_bytes"] for item in later)),
        "first_blocked_over_memcpy": first["blocked_s"] / memcpy_s,
        "first_commit_s": first["commit_s"],
    }


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark."""
    rounds, width = (3, 1140) if quick else (10, 2280)
    folder = Path(tempfile.mkdtemp(dir=".", prefix="stall-"))
    try:
        rows = _with_ray(rounds, width, folder)
        with dcp_group(folder):
            rows = compete(all_peers(), rounds, width, folder) + rows
    finally:
        shutil.rmtree(folder)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "state_bytes": stacked(width).num_bytes,
        "rounds": rounds,
        "rows": rows,
    }


def _with_ray(rounds: int, width: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of Ray's `report`, from a process that brings a Ray up and takes it down."""
    answer = folder / "ray.json"
    command = [sys.executable, "-m", "benchmarks.stall_ray", str(rounds), str(width), str(folder.absolute())]
    subprocess.run([*command, str(answer.absolute())], check=True, stdout=sys.stderr)
    rows: list[dict[str, Any]] = json.loads(answer.read_text())
    return rows


if __name__ == "__main__":
    command(measure)
