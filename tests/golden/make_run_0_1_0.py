"""Makes `tests/golden/run_0_1_0/`: a run that outlast 0.1.0 began, lost a worker of, and did not finish.

    python -m tests.golden.make_run_0_1_0 NEW_FOLDER

It was made once, with the code of commit 7e2f42f; made again by later code it would prove nothing. Everything goes
through the command line and through files, so that this page stays true when modules move. `text_lines` and
`tensor_digests` say what the data and the stored digests are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.golden.numerics import PINNED, numerics

OUTLAST = str(Path(sys.executable).with_name("outlast"))
ENVIRONMENT = {
    **os.environ,
    **PINNED,
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
}
KILL_WORKER_AFTER, KILL_ALL_AFTER = 10, 30  # steps that are committed by then
LOST_S = 0.2  # a few steps, which are lost
SETTINGS = {
    "name": "golden",
    "seed": 11,
    "model": {
        "config": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32},
        "tokenizer": {"train_bpe": 300},
    },
    "data": {"train": "texts.txt", "eval": "5%", "max_length": 16},
    "train": {"steps": 60, "batch": 32, "micro_batch": 1, "lr": 3e-3, "warmup": 10, "eval_every": 20},
    "scale": {"workers": 2, "cpus_per_worker": 0.5},
    "checkpoint": {"storage": "runs", "every": 10, "keep_last": 2},
}


def text_lines() -> Iterator[str]:
    """Sums in words: text that belongs to nobody and that a tiny model can learn something of."""
    words = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for first in range(100):
        number = f"{words[first // 10]} tens and {words[first % 10]}"
        for second in range(0, 10, 3):
            total = first + second
            yield f"{number} plus {words[second]} is {words[total // 10 % 10]} tens and {words[total % 10]}."


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of dtype, shape and bytes of every tensor of weights and optimizer state, read by `safetensors`."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, str] = {}
    for path in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("training_state/*.safetensors")]:
        for name, tensor in load_file(path).items():
            assert name not in found, f"{name} lies in two files"
            whole = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode() + whole).hexdigest()
    return dict(sorted(found.items()))


def step_losses(run: Path) -> dict[int, float]:
    """Every step's loss; a step that was done twice must have had the same loss both times."""
    found: dict[int, float] = {}
    for path in sorted(run.glob("attempts/*/events-0-*.jsonl")):
        for event in map(json.loads, path.read_text().splitlines()):
            if event["event"] == "step":
                assert found.setdefault(event["step"], event["loss"]) == event["loss"], f"step {event['step']} differs"
    return found


def outlast(folder: Path, *arguments: str) -> str:
    """What a command prints."""
    done = subprocess.run([OUTLAST, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within 90 s"
        time.sleep(0.02)


def make_inputs(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    (folder / "texts.txt").write_text("".join(f"{line}\n" for line in text_lines()))


def interrupt_run(folder: Path) -> None:
    """Starts the run in `folder`; kills one worker, and later, as when the machine goes, the driver and all workers."""
    attempts = folder / "runs/golden/attempts"

    def committed(number: int, step: int) -> bool:
        return any(
            int(path.parent.name.partition("-")[2]) >= step
            for path in attempts.glob(f"{number:04}-*/checkpoint-*/manifest.json")
        )

    def workers() -> list[dict[str, Any]]:
        return [item for path in attempts.glob("*/claim.json") for item in json.loads(path.read_text())["workers"]]

    def has_ended(pid: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return False
        return True

    driver = subprocess.Popen([OUTLAST, "train", "run.yaml"], cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: committed(1, KILL_WORKER_AFTER))
        time.sleep(LOST_S)
        os.kill(next(item["pid"] for item in workers() if item["rank"] == 1), signal.SIGKILL)
        wait_until(lambda: committed(2, KILL_ALL_AFTER))
        time.sleep(LOST_S)
    finally:
        driver.kill()
        for pid in [item["pid"] for item in workers() if not has_ended(item["pid"])]:
            os.kill(pid, signal.SIGKILL)
        driver.wait()
    wait_until(lambda: all(has_ended(item["pid"]) for item in workers()))


def make(target: Path) -> None:
    interrupted, undisturbed = target, target.with_name(f"{target.name}-undisturbed")
    for folder in (interrupted, undisturbed):
        make_inputs(folder)
    interrupt_run(interrupted)
    (interrupted / "status.json").write_text(outlast(interrupted, "status", "run.yaml", "--json"))
    (interrupted / "checkpoints.json").write_text(outlast(interrupted, "checkpoints", "ls", "run.yaml", "--json"))
    outlast(undisturbed, "train", "run.yaml")
    checkpoint = Path(outlast(undisturbed, "checkpoints", "path", "run.yaml", "newest").strip())
    body = {
        "numerics": numerics(),
        "losses": step_losses(undisturbed / "runs/golden"),
        "tensors": tensor_digests(checkpoint),
    }
    (interrupted / "undisturbed.json").write_text(json.dumps(body, indent=1) + "\n")
    shutil.rmtree(undisturbed)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
