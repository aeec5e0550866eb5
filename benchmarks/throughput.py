"""Tokens per second of outlast's step loop beside others': same model, batch and data, in one run, taking turns.

    python -m benchmarks.throughput [--quick] [--json FILE]

A GPT-2 of 2.1 million parameters, a global batch of 8 × 128 tokens in micro-batches of 2, on one worker and on two
(gloo processes of one thread). In each round every loop trains, in random order; all ratios are to the bare loop of the
same round. With --quick the model is a sixth of that, so whatever a step costs besides arithmetic weighs more. What the
columns say:

`over_bare`      by the clock: the bare loop's seconds per step over this loop's
`cpu_over_bare`  the same in CPU seconds of a rank, threads included. It is what to look at on a machine with others on
                 it, and does not see waiting
`rows_per_s`     preparing data: reading, tokenizing, packing and writing the rows of a file, our digests and fsync
                 included, in one process and on Ray Data (a Ray that is running; two cores show its cost, not what it
                 is for), beside `datasets.map`, and the tokenizer alone on the same rows at one go.
                 `over_datasets` is the ratio to `datasets.map` in the same round, `cpu_over_datasets` in CPU seconds
`seconds`        to have the first batch at a position of the run, in the middle of an epoch: ours, and skipping as
                 Trainer and accelerate do. At 10^9 there is only ours: the other would draw 2 × 10^9 numbers first
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from benchmarks.command import command
from benchmarks.loops import LOOPS, WARM_STEPS, Case, InMemory, timed
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.drills.demo import write_texts
from outlast.cluster.driver.ray_data_encode import encode_on_ray
from outlast.cluster.driver.ray_session import ray_session
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.batch_plan import BatchPlan
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.distributed.world import World
from outlast.trainers.preparation.encode import Encoder
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.tasks.causal_lm import CausalLM

BATCH, MICRO_BATCH, LENGTH = 8, 2, 128
#: Steps between two saves, so that the clock sees as many saves as it should.
PERIOD = 20
WORKERS = (1, 2)


def _config(folder: Path, num_steps: int, *, quick: bool) -> TrainingConfig:
    size = {"n_layer": 2, "n_embd": 96} if quick else {"n_layer": 3, "n_embd": 192}
    return TrainingConfig.model_validate(
        {
            "name": "data",
            "model": {
                "config": {"model_type": "gpt2", "n_head": 4, "n_positions": LENGTH, **size},
                "tokenizer": {"train_bpe": 1024 if quick else 4096},
            },
            "data": {"train": str(folder / "texts.jsonl"), "max_length": LENGTH},
            "train": {"steps": num_steps, "batch": BATCH, "micro_batch": MICRO_BATCH, "lr": 1e-3},
            "checkpoint": {"storage": str(folder)},
        }
    )


def _rank(rank: int, size: int, folder: str, rounds: int, config: TrainingConfig, answer: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:  # what torchrun says, which Trainer and accelerate ask for
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/group-{size}", rank=rank, world_size=size)
    storage = LocalStorage(Path(folder))
    case = Case(config, prepare(config, storage), storage, World())
    order = random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LOOPS}
    for _ in range(rounds):
        for name in order.sample(list(LOOPS), len(LOOPS)):
            found[name].append(timed(LOOPS[name], case))
    if rank == 0:
        answer.put(found)
    if size > 1:
        dist.destroy_process_group()


def _compete(size: int, folder: Path, rounds: int, config: TrainingConfig) -> list[dict[str, Any]]:
    """The rows of a number of workers."""
    answer = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (size, str(folder), rounds, config, answer), nprocs=size)  # type: ignore[no-untyped-call]
    found = answer.get()
    rows = []
    for name, samples in found.items():
        pairs = list(zip(found["bare PyTorch DDP"], samples, strict=True))
        rows.append(
            {
                "name": name,
                "workers": size,
                "tokens_per_s": config.train.batch * LENGTH / statistics.median(wall for wall, _ in samples),
                **_spread("over_bare", [bare / ours for (bare, _), (ours, _) in pairs]),
                **_spread("cpu_over_bare", [bare / ours for (_, bare), (_, ours) in pairs]),
            }
        )
    return rows


def _preparation(folder: Path, rounds: int, config: TrainingConfig) -> list[dict[str, Any]]:
    """The rows of preparing data, with a tokenizer that is there already."""
    tokenizer = prepare(config, LocalStorage(folder)).tokenizer(LocalStorage(folder))
    tokenizer.inner.save_pretrained(folder / "tokenizer")
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()] * 4
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    body = config.model_dump(mode="json")
    body["model"]["tokenizer"] = {"path": str(folder / "tokenizer")}
    body["data"]["train"] = str(folder / "many.jsonl")
    settings = TrainingConfig.model_validate(body)
    on_ray = settings.model_copy(update={"data": settings.data.model_copy(update={"prepare": "cluster"})})
    ways: dict[str, Callable[[Path], Any]] = {
        "outlast": lambda place: prepare(settings, LocalStorage(place)),
        "outlast on Ray Data": lambda place: prepare(on_ray, LocalStorage(place), _running_ray),
        "datasets.map": lambda place: _mapped(folder / "many.jsonl", place, tokenizer),
        "the tokenizer alone": lambda place: tokenizer.inner(texts),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with ray_session():
        ways["outlast on Ray Data"](folder / "first")  # starts Ray's workers
        for number in range(rounds):
            for name in random.Random(number).sample(list(ways), len(ways)):
                place = folder / f"prepared-{number}-{name}"
                cpu = time.process_time()
                wall = _seconds(lambda: ways[name](place))  # noqa: B023
                found[name].append((wall, time.process_time() - cpu))
    rows = []
    for name, samples in found.items():
        by_datasets = list(zip(found["datasets.map"], samples, strict=True))
        rows.append(
            {
                "name": f"data preparation: {name}",
                **_spread("rows_per_s", [len(texts) / wall for wall, _ in samples]),
                **_spread("over_datasets", [theirs / ours for (theirs, _), (ours, _) in by_datasets]),
                **_spread("cpu_over_datasets", [theirs / ours for (_, theirs), (_, ours) in by_datasets]),
            }
        )
        if "Ray" in name:  # its CPU seconds are other processes'
            del rows[-1]["cpu_over_datasets"], rows[-1]["cpu_over_datasets_quartiles"]
    return rows


@contextmanager
def _running_ray() -> Iterator[Encoder]:
    yield encode_on_ray


def _mapped(path: Path, cache: Path, tokenizer: Tokenizer) -> None:
    """As transformers' own examples do it: tokens, then pieces of one length, by the batch."""
    from datasets import load_dataset

    def packed(part: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for tokens in part["input_ids"] for token in tokens]
        return {"input_ids": [joined[at : at + LENGTH] for at in range(0, len(joined) - LENGTH + 1, LENGTH)]}

    rows = load_dataset("json", data_files=str(path), cache_dir=str(cache), split="train")
    rows = rows.map(lambda part: {"input_ids": tokenizer.encode(part["text"])}, batched=True, remove_columns=["text"])
    rows.map(packed, batched=True)


def _resume(folder: Path, rounds: int, config: TrainingConfig) -> list[dict[str, Any]]:
    """The rows of getting to a position, in the middle of an epoch."""
    from accelerate import skip_first_batches

    storage, batch = LocalStorage(folder), config.train.batch
    prepared = prepare(config, storage)
    samples = prepared.split(storage, "train")
    task = CausalLM(config.data, prepared.tokenizer(storage), {})

    def ours(position: int) -> None:
        plan = BatchPlan(0, 2 * position, batch, batch, 2 * position)
        task.collate(samples.take(plan.samples(plan.positions(position // batch)) % len(samples)), [])

    def skipping(position: int) -> None:
        rows = torch.zeros(1, LENGTH, dtype=torch.int64).expand(2 * position, LENGTH)
        loader = DataLoader(InMemory(rows), batch, shuffle=True)
        next(iter(skip_first_batches(loader, position // batch)))

    ways: list[tuple[str, Callable[[int], None], Sequence[int]]] = [
        ("outlast", ours, (3, 6, 9)),
        ("accelerate's skip_first_batches, as HF Trainer", skipping, (3, 6)),
    ]
    return [
        {
            "name": f"first batch at sample 10^{power}: {name}",
            **_spread("seconds", [_seconds(lambda: way(10**power)) for _ in range(rounds)]),  # noqa: B023
        }
        for name, way, powers in ways
        for power in powers
    ]


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _spread(key: str, values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {key: middle, f"{key}_quartiles": [low, high]}


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark: medians and quartiles over the rounds."""
    rounds = 2 if quick else 3
    num_steps = WARM_STEPS + PERIOD + 1  # the clock runs until the last step begins
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.jsonl")
        config = _config(folder, num_steps, quick=quick)
        prepare(config, LocalStorage(folder))
        rows = [row for size in WORKERS for row in _compete(size, folder, rounds, config)]
        rows += _preparation(folder, rounds, config) + _resume(folder, rounds, config)
    return {"machine": f"{platform.machine()}, {mp.cpu_count()} cores", "rounds": rounds, "rows": rows}


if __name__ == "__main__":
    command(measure)
