"""Tokens per second of outlast's step loop, beside a bare PyTorch DDP loop: same model, batch and data, one run.

    python -m benchmarks.throughput [--quick] [--json FILE]

Both run in the same two gloo processes, in turns, so that a machine that speeds up or slows down does so for both.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.command import command
from outlast.checkpointing.lineage import run_events
from outlast.checkpointing.storage import LocalStorage
from outlast.cluster.demo import write_texts
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.config import TrainingConfig
from outlast.trainers.data import prepare
from outlast.trainers.models import build_model
from outlast.trainers.tasks import CausalLM
from outlast.trainers.world import World, make_deterministic

RANKS = 2
WARM_STEPS = 5


class _Silent:
    def stop_requested(self) -> bool:
        return False

    def save_requested(self) -> str | None:
        return None

    def claimed(self, attempt: str) -> None:
        pass

    def progress(self, event: dict[str, Any]) -> None:
        pass


def _config(storage: LocalStorage, name: str, num_steps: int, exactness: str, every: int) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "name": name,
            "model": {
                "config": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 128},
                "tokenizer": {"train_bpe": 4096},
            },
            "data": {"train": f"{storage.url}/texts.jsonl", "max_length": 128},
            "train": {"steps": num_steps, "batch": 16, "micro_batch": 4, "lr": 1e-3},
            "checkpoint": {"storage": storage.url, "every": every},
            "exactness": exactness,
        }
    )


def _ours(assignment: Assignment, storage: LocalStorage, world: World) -> float:
    """Seconds per step, from the end of the warm-up to the last step."""
    run_attempt(assignment, storage, world, _Silent())
    found: dict[int, float] = {}
    if world.rank == 0:
        events = [event for _, event in run_events(storage, assignment.config.name) if event["event"] == "step"]
        found = {event["step"]: event["ended_at"] for event in events}
    found = world.broadcast(found)
    last = max(found)
    return (found[last] - found[WARM_STEPS]) / (last - WARM_STEPS)


def _bare(assignment: Assignment, storage: LocalStorage, world: World) -> float:
    """The loop that one would write by hand: DDP, accumulation under no_sync, fused AdamW, clipping."""
    config, prepared = assignment.config, assignment.prepared
    make_deterministic(False, 1)
    tokenizer = prepared.tokenizer(storage)
    task = CausalLM(config.data, tokenizer, {})
    model, _ = build_model(config.model, task, tokenizer, 0, fresh=True)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = prepared.split(storage, "train")
    num_micro = config.train.batch // config.train.micro_batch // world.size
    wrapped.train()
    ended = []
    for step in range(config.train.steps or 0):
        for micro in range(num_micro):
            begin = ((step * num_micro + micro) * world.size + world.rank) * config.train.micro_batch
            ids = task.collate(data.take(range(begin, begin + config.train.micro_batch)), [])["input_ids"]
            wrapped.require_backward_grad_sync = micro == num_micro - 1
            (wrapped(input_ids=ids, labels=ids, use_cache=False).loss / num_micro).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended.append(time.time())
    return (ended[-1] - ended[WARM_STEPS - 1]) / (len(ended) - WARM_STEPS)


def _rank(rank: int, folder: str, rounds: int, num_steps: int, answer: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    world, storage = World(), LocalStorage(Path(folder))
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, exactness, every in (
            ("bare PyTorch DDP", "fast", 0),
            ("outlast same-world", "same-world", 10**6),
            ("outlast same-world, a save every 20 steps", "same-world", 20),
            ("outlast fast", "fast", 10**6),
        ):
            config = _config(storage, f"{exactness}-{every}-{number}", num_steps, exactness, every or 10**6)
            assignment = Assignment(config, {}, "bench", prepare(config, storage))
            run = _ours if every else _bare
            seconds.setdefault(name, []).append(run(assignment, storage, world))
    if rank == 0:
        answer.put(seconds)
    dist.destroy_process_group()


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark. Rows: tokens/s, and the ratio to the bare loop, medians over the rounds."""
    rounds, num_steps = (2, 25) if quick else (5, 45)
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder) / "texts.jsonl")
        prepare(_config(LocalStorage(Path(folder)), "data", 1, "fast", 1), LocalStorage(Path(folder)))
        mp.spawn(_rank, (folder, rounds, num_steps, answer), nprocs=RANKS)  # type: ignore[no-untyped-call]
        seconds = answer.get()
    bare = seconds["bare PyTorch DDP"]
    tokens = 16 * 128
    rows = [
        {
            "name": name,
            "tokens_per_s": tokens / statistics.median(values),
            "over_bare": statistics.median(b / v for b, v in zip(bare, values, strict=True)),
        }
        for name, values in seconds.items()
    ]
    return {"machine": f"{platform.machine()}, {mp.cpu_count()} cores", "ranks": RANKS, "rounds": rounds, "rows": rows}


if __name__ == "__main__":
    command(measure)
