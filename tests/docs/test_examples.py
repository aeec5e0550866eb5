"""Each example runs as a user would run it, and so do ten lines of the own-loop tutorial. 40 s; 25 s without Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import load_run
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.model_checks import check_model
from outlast.trainers.config.trust import Trust
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.predict import choose_checkpoint, load
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.user_code import make_importable
from tests.support.groups.worker_group import digests, newest, resumed, run_group, start_script
from tests.support.small_model import digests_of, small_model, train_step

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN_LOOP = EXAMPLES / "own_loop.py"


def options(folder: Path) -> list[str]:
    return ["--steps", "60", "--save-every", "5", "--storage", str(folder)]


@pytest.mark.faults  # a minute
@pytest.mark.ray
def test_classify(tmp_path: Path) -> None:
    """Learns something, keeps a checkpoint an epoch, publishes the best, predicts; a second time it only predicts."""
    command = [sys.executable, str(EXAMPLES / "classify.py"), "--epochs", "3", "--dir", str(tmp_path / "it")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    accuracies = [float(text) for text in re.findall(r"accuracy ([\d.]+)", done.stdout)]
    assert len(accuracies) == 4, "before the first step and after each epoch"
    assert max(accuracies) > 0.6, "four classes by chance would be about a third"
    found = read_catalog(LocalStorage(tmp_path / "it/runs"), "classify")
    assert len(found.accepted) == 3
    best = max(found.accepted, key=lambda item: (item.metrics["eval_accuracy"], -item.ref.step))
    published = (tmp_path / "it/runs/classify/model/model.safetensors").read_bytes()
    attempt = tmp_path / "it/runs/classify/attempts" / str(best.ref.attempt)
    assert published == (attempt / f"checkpoint-{best.ref.step}/model.safetensors").read_bytes()
    assert len(re.findall(r"^(asyncio|email|tkinter|unittest) +\d+%", done.stdout, re.MULTILINE)) == 4

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "accuracy" not in again.stdout
    assert again.stdout.splitlines()[-5:] == done.stdout.splitlines()[-5:]


def test_own_task(tmp_path: Path) -> None:
    """Learns what the heavy rows say, not what the light ones say; answers, and its run file is the one beside it."""
    words = [("good", 1), ("bad", 0)]
    rows: list[dict[str, Any]] = [
        {"text": f"a {word} one, {i}", "label": label, "importance": 1.0} for i in range(60) for word, label in words
    ]
    rows += [{**row, "label": 1 - row["label"], "importance": 0.01} for row in rows]
    (tmp_path / "own_task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [f"data.train={tmp_path / 'own_task.jsonl'}", f"checkpoint.storage={tmp_path / 'runs'}"]
    config, declared = load_run(str(EXAMPLES / "own_task.yaml"), places)
    storage = LocalStorage(tmp_path / "runs")
    make_importable(str(EXAMPLES))
    check_model(config, prepared := prepare(config, storage), storage)
    assignment = Assignment(config, declared, "first", prepared, code=str(EXAMPLES))
    assert [item.outcome for item in run_group(assignment, storage, 2)] == [Outcome.DONE] * 2
    assert 0.4 < newest(storage, "own-task").metrics["eval_accuracy"] < 0.6, "every text has both labels"
    found = choose_checkpoint(RunStore(storage, "own-task"), None, config.checkpoint.retention)
    task, model = load(config, found, trust=Trust(everything=True))
    answers = list(task.predict(model, [{"text": "a good one, 3"}, {"text": "a bad one, 7"}]))
    assert [answer["label"] for answer in answers] == [1, 0]


# -- a loop of one's own -----------------------------------------------------------------------------------------------


def after_first_commit(folder: Path, everyone: list[BaseProcess], number: signal.Signals) -> None:
    """Sends a signal to every rank as soon as the storage holds a commit."""
    storage, deadline = LocalStorage(folder), time.monotonic() + 120
    while not read_catalog(storage, "own-loop").accepted:
        assert all(process.is_alive() for process in everyone), "it ended before it saved"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in everyone:
        os.kill(process.pid or 0, number)


def endings(everyone: list[BaseProcess]) -> list[int | None]:
    for process in everyone:
        process.join(120)
    return [process.exitcode for process in everyone]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """`undisturbed(size)`: the digests that the example ends with on so many ranks; on one, as a user would run it."""

    def run(size: int) -> dict[str, str]:
        folder = tmp_path_factory.mktemp(f"undisturbed-{size}")
        if size == 1:
            done = subprocess.run(
                [sys.executable, OWN_LOOP, *options(folder)], capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            assert f"done at step 60; the weights lie in {folder}/own-loop/attempts/" in done.stdout
        else:
            assert endings(start_script(OWN_LOOP, options(folder), size)) == [0] * size
        return digests(LocalStorage(folder), "own-loop")

    return cache(run)


@pytest.mark.parametrize("size", [1, 2])
def test_own_loop_killed_ends_with_the_same_bits(
    size: int, tmp_path: Path, undisturbed: Callable[[int], dict[str, str]]
) -> None:
    storage = LocalStorage(tmp_path)
    everyone = start_script(OWN_LOOP, options(tmp_path), size)
    after_first_commit(tmp_path, everyone, signal.SIGKILL)
    assert endings(everyone) == [-signal.SIGKILL] * size
    killed_at = newest(storage, "own-loop").ref.step
    assert killed_at < 60

    assert endings(start_script(OWN_LOOP, options(tmp_path), size)) == [0] * size
    assert [event["step"] for event in resumed(storage, "own-loop")] == [killed_at]
    assert newest(storage, "own-loop").ref.step == 60
    assert newest(storage, "own-loop").world_size == size
    assert digests(storage, "own-loop") == undisturbed(size)
    assert len(undisturbed(size)) == 16 * 4, "each parameter, its two moments and its step"


def test_own_loop_superseded_ends_with_75(tmp_path: Path, undisturbed: Callable[[int], dict[str, str]]) -> None:
    """The older one is stopped, not killed: it wakes up when the newer one is done, and takes nothing from it."""
    storage = LocalStorage(tmp_path)
    older = start_script(OWN_LOOP, options(tmp_path), 1)
    after_first_commit(tmp_path, older, signal.SIGSTOP)
    try:
        assert endings(start_script(OWN_LOOP, options(tmp_path), 1)) == [0]
    finally:
        os.kill(older[0].pid or 0, signal.SIGCONT)
    assert endings(older) == [75]
    assert digests(storage, "own-loop") == undisturbed(1)


# -- the own-loop tutorial ---------------------------------------------------------------------------------------------


class Cut(BaseException):
    """The end of a script in the middle of a step."""


def test_ten_lines_of_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docs_block: Callable[[str], str]) -> None:
    monkeypatch.chdir(tmp_path)
    block = docs_block("tutorials/own-loop.md")
    assert len([line for line in block.splitlines() if line]) <= 10
    cuts = {333, 777}
    storage = LocalStorage(tmp_path / "runs")

    def step_of_mine(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        train_step(model, optimizer, step)
        if step in cuts:
            cuts.remove(step)
            while read_catalog(storage, "cut").accepted[0].ref.step < step // 100 * 100:  # the save in flight
                time.sleep(0.01)
            raise Cut

    for name, cut in [("cut", True), ("cut", True), ("cut", False), ("whole", False)]:
        model, optimizer = small_model()
        scope = {"torch": torch, "model": model, "optimizer": optimizer, "train_step": step_of_mine}
        with pytest.raises(Cut) if cut else nullcontext():
            exec(block.replace("my-loop", name), scope)
    assert cuts == set()
    assert [event["step"] for event in resumed(storage, "cut")] == [300, 700]
    assert digests(storage, "cut") == digests(storage, "whole") == digests_of(model, optimizer)
