"""`transformers.Trainer` killed in the middle of a save: without seals it cannot resume, with seals it ends with the
same bits. About 30 s."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.hf_trainer_seals import newest_sealed
from outlast.trainers.hf_trainer_seal_callback import SealCheckpoints
from tests.support.groups.worker_group import start_script
from tests.support.hf_script import EXAMPLE

SCRIPT = Path(__file__).parents[1] / "support" / "hf_script.py"
STEPS = 40


def run(folder: Path, *, size: int = 1, steps: int = STEPS) -> None:
    """Train to the end, from the newest sealed checkpoint."""
    processes = start_script(SCRIPT, [str(folder), "sealed", str(steps), "0"], size)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size


def end_of(folder: Path) -> dict[str, Any]:
    """The final state of a run: digests of weights and optimizer, and all logged losses."""
    last = folder / f"checkpoint-{STEPS}"
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": (last / "model.safetensors").read_bytes(),
        "optimizer": {(i, name): value.tolist() for i, item in moments.items() for name, value in item.items()},
        "losses": [(item["step"], item["loss"], item["grad_norm"]) for item in history if "loss" in item],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    end = end_of(folder)
    assert len(end["losses"]) == STEPS // 5
    assert len(end["optimizer"]) > 60
    return end


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with sealed checkpoints 10 and 20, killed when half of the optimizer was written to checkpoint-30."""
    folder = tmp_path_factory.mktemp("killed")
    (process,) = start_script(SCRIPT, [str(folder), "sealed", str(STEPS), "30"], 1)
    deadline = time.monotonic() + 120
    while not (folder / "midway").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == {"checkpoint-10", "checkpoint-20", "checkpoint-30", "midway"}
    return folder


def test_trainer_without_seals_does_not_resume(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run")
    command = [sys.executable, "-m", "tests.support.hf_script", str(tmp_path / "run"), "plain", str(STEPS), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=SCRIPT.parents[2])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"FileNotFoundError: .*checkpoint-30/trainer_state\.json", last), done.stderr


@pytest.mark.parametrize("damage", ["", "checkpoint-20/model.safetensors", "checkpoint-20/optimizer.pt"])
def test_with_seals_it_ends_with_the_same_bits(
    damage: str, killed: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """With a flipped bit in checkpoint-20 it resumes from checkpoint-10."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    if damage:
        data = bytearray((folder / damage).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / damage).write_bytes(data)
    assert newest_sealed(folder) == str(folder / ("checkpoint-10" if damage else "checkpoint-20"))
    run(folder)
    assert end_of(folder) == undisturbed
    assert newest_sealed(folder) == str(folder / f"checkpoint-{STEPS}")


def test_a_seal_waits_for_every_process(tmp_path: Path) -> None:
    """Process 1 writes its generator state after process 0 has saved all of its own; the seal covers both."""
    run(tmp_path, size=2, steps=10)
    assert newest_sealed(tmp_path) == str(tmp_path / "checkpoint-10")
    manifest = Manifest.parse((tmp_path / "checkpoint-10" / "manifest.json").read_bytes())
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {entry.path for entry in manifest.files}
    assert manifest.world_size == 2


def test_a_limit_of_one_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), save_total_limit=1, use_cpu=True)
    with pytest.raises(ConfigError, match="save_total_limit=1"):
        SealCheckpoints().on_train_begin(args, TrainerState(), TrainerControl())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default")
def test_the_lines_of_docs(tmp_path: Path, docs_block: Callable[[str], str]) -> None:
    block = docs_block("tutorials/hf-trainer.md")
    assert len([line for line in block.splitlines() if line]) <= 5
    for steps in (10, 20):
        made = runpy.run_path(str(EXAMPLE))["make_trainer"](str(tmp_path), steps)
        scope = {"Trainer": Trainer, "model": made.model, "args": made.args, "data": made.train_dataset}
        exec(block, scope)
        assert newest_sealed(tmp_path) == str(tmp_path / f"checkpoint-{steps}")
    assert scope["trainer"].state.log_history[0]["step"] == 5, "the second went on with the first one's history"
