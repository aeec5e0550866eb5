"""What a save costs on a GPU, and tokens per second there: outlast beside the others, on one device.

    python -m benchmarks.gpu [--quick] [--json FILE]

Llama's architecture with 1.1 billion parameters (TinyLlama's sizes; a toy with --quick), fp32 weights, bf16 autocast,
fused AdamW. What the columns of the first rows say:

`step_s`               a plain step
`saving_over_step`     the step in which a save begins, from before the call until the device is done with the step,
                       over a plain one
`in_flight_over_step`  a step while the save is being written, over a plain one
`blocked_over_memcpy`  how much longer than a plain step that first one took, over a copy of the state from the device
                       into locked host memory
`commit_s`             from the call until the checkpoint is durable, the steps made meanwhile (one, or nine) included
`load_s`               into model and optimizer on the device, after its files have left the page cache; outlast alone
                       verifies. What was loaded is compared with what was saved, outside the clock

In the other rows every loop trains the same pretrained directory in a process of its own; `over_bare` is the bare
loop's seconds per step over this loop's, `mfu` the model's floating-point operations (six a parameter and token, and
twelve a layer, token pair and unit of width) over what the device could do in that time by its data sheet.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.command import command
from benchmarks.loops import Case, Laps, Loop, accelerate, bare, outlast, trainer
from benchmarks.peers import DcpAsync, Memcpy, Outlast, Peer, RawWrite, TorchSave, dcp_group
from benchmarks.training import Training, drop_cache
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.drills.demo import write_texts
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.distributed.world import World
from outlast.trainers.preparation.prepare import prepare

DEVICE = "cuda:0"
#: Dense bf16, in FLOP/s, by their data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
TOY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
VOCABULARY, LENGTH, MICRO_BATCH, NUM_MICRO = 32_000, 1024, 8, 2
#: Steps that are timed one by one, before a save and while it is written.
STEPS = 8
WARM_STEPS, TIMED_STEPS = 5, 20
#: A save every so many steps, in the rows that save.
EVERY = 20


def _architecture(quick: bool) -> LlamaConfig:
    return LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **(TOY if quick else SIZES))


# -- saving ------------------------------------------------------------------------------------------------------------


def _training(quick: bool) -> Training:
    torch.manual_seed(7)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(_architecture(quick))
        tokens = torch.randint(VOCABULARY, (MICRO_BATCH, LENGTH))

    def loss() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(NUM_MICRO - 1):
                (model(input_ids=tokens, labels=tokens, use_cache=False).loss / NUM_MICRO).backward()
            last: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss / NUM_MICRO
            return last

    return Training(model, loss)


def _timed(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _save_once(peer: Peer, number: int, training: Training, twin: Training | None) -> dict[str, float]:
    step_s = statistics.median(_timed(training.step) for _ in range(STEPS))
    before = {name: tensor.clone() for name, tensor in training.state.items()} if twin else {}
    torch.cuda.synchronize()
    began = time.perf_counter()
    peer.save(number)
    save_s = time.perf_counter() - began
    training.step()
    torch.cuda.synchronize()
    found = {"step_s": step_s, "save_s": save_s, "saving_s": time.perf_counter() - began}
    if peer.overlaps:
        found["in_flight_s"] = statistics.median(_timed(training.step) for _ in range(STEPS))
    directory = peer.finish()
    found["commit_s"] = time.perf_counter() - began
    if twin is not None and peer.name != Memcpy.name:
        drop_cache(directory)
        twin.forget()
        found["load_s"] = _timed(lambda: peer.load(twin))
        loaded = twin.state
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in before.items()), f"{peer.name}: other bits"
    shutil.rmtree(directory, ignore_errors=True)
    return found


def _saving(folder: Path, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """The rows of the savers: medians over `rounds`, after one in which all loads are timed and compared."""
    peers: list[Peer] = [
        Memcpy(),
        RawWrite(),
        Outlast("overlapped"),
        Outlast("blocking"),
        TorchSave(),
        DcpAsync("thread", "thread"),
        DcpAsync("process, kept locked memory, staged aside", "process", kept=True, staged_aside=True),
    ]
    training, twin = _training(quick), _training(quick)
    samples: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
    failures: dict[str, str] = {}
    for number, peer in enumerate(peers):
        (folder / str(number)).mkdir()
        peer.prepare(training, folder / str(number))
    for number in range(rounds + 1):
        for peer in peers:
            if peer.name not in failures:
                try:
                    samples[peer.name].append(_save_once(peer, number + 1, training, None if number else twin))
                except Exception as error:  # noqa: BLE001 - the others' rows are worth having; its own says so
                    failures[peer.name] = f"{type(error).__name__}: {error}"[:300]
    memcpy_s = statistics.median(item["save_s"] for item in samples[Memcpy.name][1:])
    return [_saver_row(name, samples[name], memcpy_s, failures.get(name)) for name in samples]


def _saver_row(name: str, samples: Sequence[dict[str, float]], memcpy_s: float, failure: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    if failure:
        return row | {"failed": failure}
    first, *later = samples
    row["step_s"] = statistics.median(item["step_s"] for item in later)
    row["saving_over_step"] = statistics.median(item["saving_s"] / item["step_s"] for item in later)
    if "in_flight_s" in first:
        row["in_flight_over_step"] = statistics.median(item["in_flight_s"] / item["step_s"] for item in later)
    row["blocked_over_memcpy"] = statistics.median((item["saving_s"] - item["step_s"]) / memcpy_s for item in later)
    row["commit_s"] = statistics.median(item["commit_s"] for item in later)
    if "load_s" in first:
        row["load_s"] = first["load_s"]
    return row


# -- training ----------------------------------------------------------------------------------------------------------

LOOPS: dict[str, tuple[Loop, bool]] = {
    "bare PyTorch": (bare, True),
    "HF Trainer": (trainer(0), True),
    "accelerate": (accelerate, True),
    "outlast fast, not deterministic": (outlast("fast", deterministic=False), True),
    "outlast same-world": (outlast("same-world"), True),
    "outlast elastic": (outlast("elastic"), True),
    f"HF Trainer, a save every {EVERY} steps": (trainer(EVERY), False),
    f"outlast same-world, a save every {EVERY} steps": (outlast("same-world", EVERY), False),
}


class _Over(Exception):
    """The last step that is timed has been."""


class _Cut(Laps):
    """Laps that end the loop after the last, so that nobody waits for its last save."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps, WARM_STEPS, torch.cuda.synchronize)

    def begin(self) -> None:
        super().begin()
        if len(self._at) == self._num_steps:
            raise _Over


def _loop(name: str, folder: str, body: dict[str, Any], pipe: Any) -> None:
    """In a process of its own: sends the seconds of a step, and the device's memory at its peak."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make_deterministic(False, 8)
    loop, is_cut = LOOPS[name]
    config = TrainingConfig.model_validate(body)
    storage = LocalStorage(Path(folder))
    case = Case(config, prepare(config, storage), storage, World(torch.device(DEVICE)))
    laps = _Cut(case.num_steps) if is_cut else Laps(case.num_steps, WARM_STEPS, torch.cuda.synchronize)
    try:
        loop(case, laps)
    except _Over:
        pass
    pipe.send((laps.per_step()[0], torch.cuda.max_memory_allocated()))


def _training_rows(folder: Path, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """The rows of the loops."""
    config = _config(folder, quick)
    prepare(config, LocalStorage(folder))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu"])
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in LOOPS}
    for _ in range(rounds):
        for name in LOOPS:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_loop, args=(name, str(folder), config.model_dump(mode="json"), theirs))
            process.start()
            theirs.close()
            try:
                found[name].append(mine.recv())
            except EOFError:
                print(f"{name}: ended without an answer")
            process.join()
            for left in folder.glob("*-*/attempts"):
                shutil.rmtree(left)
    rows = []
    bare_s = statistics.median(seconds for seconds, _ in found["bare PyTorch"])
    for name, samples in found.items():
        if samples:
            seconds = statistics.median(seconds for seconds, _ in samples)
            tokens_per_s = MICRO_BATCH * NUM_MICRO * LENGTH / seconds
            row = {"name": name, "step_s": seconds, "tokens_per_s": tokens_per_s, "over_bare": bare_s / seconds}
            rows.append(row | {"mfu": _mfu(tokens_per_s, quick), "peak_bytes": samples[0][1]})
    return rows


def _config(folder: Path, quick: bool) -> TrainingConfig:
    """A pretrained directory in `folder`, and the run that goes on training it."""
    write_texts(folder / "texts.jsonl")
    body: dict[str, Any] = {
        "name": "data",
        "model": {"config": {"model_type": "llama"}, "tokenizer": {"train_bpe": 4096}},
        "data": {"train": str(folder / "texts.jsonl"), "max_length": LENGTH},
        "train": {
            "steps": WARM_STEPS + TIMED_STEPS + 1,
            "batch": MICRO_BATCH * NUM_MICRO,
            "micro_batch": MICRO_BATCH,
            "lr": 1e-5,
            "precision": "bf16",
        },
        "checkpoint": {"storage": str(folder)},
    }
    prepared = prepare(TrainingConfig.model_validate(body), LocalStorage(folder))
    with torch.device(DEVICE):
        LlamaForCausalLM(_architecture(quick)).save_pretrained(folder / "pretrained")
    prepared.tokenizer(LocalStorage(folder)).inner.save_pretrained(folder / "pretrained")
    body["model"] = {"path": str(folder / "pretrained")}
    return TrainingConfig.model_validate(body)


def _mfu(tokens_per_s: float, quick: bool) -> float | None:
    peak = next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    if peak is None:
        return None
    sizes = _architecture(quick)
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes)
    count = sum(item.numel() for item in model.parameters()) - model.get_input_embeddings().weight.numel()
    attention = 12 * sizes.num_hidden_layers * sizes.hidden_size * LENGTH
    return float(tokens_per_s * (6 * count + attention) / peak)


def measure(*, quick: bool = False, parts: Sequence[str] = ("saving", "training")) -> dict[str, Any]:
    """Runs the benchmark."""
    folder = Path(tempfile.mkdtemp(dir=".", prefix="gpu-"))
    rows: list[dict[str, Any]] = []
    try:
        if "training" in parts:
            rows += _training_rows(folder, 1 if quick else 2, quick)
        if "saving" in parts:
            (folder / "saves").mkdir()
            with dcp_group(folder / "saves"):
                rows += _saving(folder / "saves", 1 if quick else 2, quick)
    finally:
        shutil.rmtree(folder)
    name = torch.cuda.get_device_name()
    return {"machine": f"{name}, {os.cpu_count()} cores, torch {torch.__version__}", "rows": rows}


if __name__ == "__main__":
    command(measure)
