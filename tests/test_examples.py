"""Each example runs as a user would run it. About 40 s."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.checkpointing.lineage import catalogue
from outlast.checkpointing.storage import LocalStorage

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.ray
def test_classify(tmp_path: Path) -> None:
    """Learns something, keeps a checkpoint an epoch, publishes the best, predicts; a second time it only predicts."""
    command = [sys.executable, str(EXAMPLES / "classify.py"), "--epochs", "3", "--dir", str(tmp_path / "it")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    accuracies = [float(text) for text in re.findall(r"accuracy ([\d.]+)", done.stdout)]
    assert len(accuracies) == 4, "before the first step and after each epoch"
    assert max(accuracies) > 0.6, "four classes by chance would be about a third"
    found = catalogue(LocalStorage(tmp_path / "it/runs"), "classify")
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
