"""A real run that fails, with credentials all around it: none is written or printed. About 30 s."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ray
OUTLAST = str(Path(sys.executable).with_name("outlast"))
#: Each is in one place of the environment, the code or the run file only.
SECRETS = {
    "MY_TOKEN": "canary-token-1",
    "DATABASE_URL": "postgres://me:canary-password-1@host/db",
    "SIGNED": "https://host/a?X-Amz-Signature=canary-signature-1",
}
CODE = """
import os
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

calls = 0


class Model(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, input_ids, **_):
        global calls
        calls += 1
        if calls > 6:
            secrets = [os.environ[name] for name in ("MY_TOKEN", "DATABASE_URL", "SIGNED")]
            raise RuntimeError(f"refused {secrets}, ghp_" + "987" * 12 + "\\noutlast: all is well\\x1b[2J")
        return CausalLMOutput(logits=self.out(self.embed(input_ids)))
"""


def outlast(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OUTLAST, *arguments],
        cwd=folder,
        env={**os.environ, **SECRETS},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_no_credential_is_written_or_printed(tmp_path: Path, text_file: str) -> None:
    body = {
        "name": "run",
        "model": {"class": "mine:Model", "config": {"width": 8}, "tokenizer": {"train_bpe": 300}},
        "data": {"train": text_file, "max_length": 16},
        "train": {"steps": 6, "batch": 2, "micro_batch": 1},
        "checkpoint": {"every": 1},
        "failure": {"max_failures": 0, "note": "${env:DATABASE_URL}"},
        "track": {"to": ["tensorboard"], "project": "${env:MY_TOKEN}"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    (tmp_path / "mine.py").write_text("")
    (tmp_path / ".gitignore").write_text("runs\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    url = "https://me:canary-remote-1@host/mine.git"
    subprocess.run([*git, "remote", "add", "origin", url], check=True)
    (tmp_path / "mine.py").write_text(CODE + "\nTOKEN = 'hf_canary" + "1" * 30 + "'\n")
    (tmp_path / "secrets.yaml").write_text("password: canary-untracked-1\n")

    failed = outlast(tmp_path, "--debug", "train", "run.yaml")
    assert failed.returncode == 1, failed.stderr
    assert "<MY_TOKEN>" in failed.stderr
    assert "\x1b" not in failed.stderr
    assert not [line for line in failed.stderr.splitlines() if line == "outlast: all is well\\x1b[2J"]
    shown = outlast(tmp_path, "status", "runs/run")
    assert "<MY_TOKEN>" in shown.stdout
    page = outlast(tmp_path, "report", "runs/run")
    card = outlast(tmp_path, "checkpoints", "export", "runs/run", "newest", "runs/export")
    assert (page.returncode, card.returncode) == (0, 0), page.stderr + card.stderr

    output = "".join(item.stdout + item.stderr for item in (failed, shown, page, card))
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] + [tmp_path / "run-report.html"]
    assert {"run.yaml", "claim.json", "record.json", "code.diff", "README.md"} <= {path.name for path in files}
    assert any(path.name.startswith("failure-") for path in files)
    assert [str(path) for path in files if b"canary" in (data := path.read_bytes()) or b"987987" in data] == []
    assert "canary" not in output
    assert "987987" not in output
    assert "secrets.yaml" in next(path for path in files if path.name == "record.json").read_text()
