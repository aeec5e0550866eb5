"""`outlast drill` of runs from pretrained models: real ones from packages, and small ones of other kinds.

About a minute each; SmolLM2 with all its weights takes three.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.pretrained_models import pretrained
from tests.support.tasks.cases import paragraphs

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "minilm": ("minilm", "sequence-classification", {}),
    "smollm2": ("smollm2", "causal-lm", {}),
    "smollm2-lora": ("smollm2", "causal-lm", {"lora": {"r": 4}}),
    "roberta": ("roberta", "sequence-classification", {}),
    "electra": ("electra", "sequence-classification", {}),
    "t5": ("t5", "seq2seq-lm", {}),
    "mixtral": ("mixtral", "causal-lm", {}),
}


def write_rows(path: Path) -> None:
    rows = [
        {"text": text, "label": "long" if len(text) > 70 else "short", "source": text[:20], "target": text[20:]}
        for text in paragraphs()
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def run_file(model: Path, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Micro-batches of one row: there the bits depend on the addresses of the weights."""
    columns = {"sequence-classification": {"text": "text", "label": "label"}, "causal-lm": {"text": "text"}}
    return {
        "name": "pretrained",
        "seed": 7,
        "model": {"path": str(model), "task": task, **settings},
        "data": {"train": "rows.jsonl", "max_length": 48, **columns.get(task, {})},
        "train": {"steps": 8, "batch": 4, "micro_batch": 1, "lr": 1e-4},
        "scale": {"workers": 2, "cpus_per_worker": 0.5},
        "checkpoint": {"storage": "runs", "keep_last": 2, "overlap": False},
    }


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_a_run_from_a_pretrained_model_resumes_exactly(case: str, tmp_path: Path) -> None:
    kind, task, settings = CASES[case]
    write_rows(tmp_path / "rows.jsonl")
    body = run_file(pretrained(kind, tmp_path / "model"), task, settings)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    command = [str(Path(sys.executable).with_name("outlast")), "drill", "run.yaml", "--json", "--steps", "8"]
    command += ["--fault", "kill", "--fault", "stop"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=880)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(item["kind"], item["different"], item["cause"]) for item in found] == [
        ("kill", [], None),
        ("stop", [], None),
    ]
    assert all(item["resumed_from"] for item in found), "not from the beginning"
