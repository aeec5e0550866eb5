"""The command line without Ray: help, versions, and the `checkpoints` commands. Errors: `test_user_errors.py`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import run_group

OUTLAST = str(Path(sys.executable).with_name("outlast"))


def outlast(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([OUTLAST, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def finished(assign: Callable[..., Assignment], storage: LocalStorage) -> Path:
    """The directory of a finished run of two ranks, with checkpoints at 6, 9 and 10."""
    assert run_group(assign("looked-at"), storage, 2)[0].outcome is Outcome.DONE
    return storage.path("looked-at")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['outlast', '--help']\n"
        "from outlast.cluster.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'accelerate', 'pyarrow', 'numpy', 'pydantic', 'yaml', 'rich'}\n"
        "heavy |= {'outlast.checkpointing.run_store', 'outlast.cluster.monitoring'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpoints List, verify, compare, keep, delete and export a run's checkpoints." in " ".join(
        done.stdout.split()
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_before_anything_runs_is_answered(signum: signal.Signals, tmp_path: Path) -> None:
    """While it imports, and once more later."""
    (tmp_path / "a.yaml").write_text("name: a\nmodel: {path: gpt2}\ndata: {train: none.txt}\n")
    process = subprocess.Popen(
        [OUTLAST, "train", str(tmp_path / "a.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "a: starting\n"
    process.send_signal(signum)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("a: stop requested; ending before the first step (press Ctrl-C again to quit immediately)\n")
    assert "outlast: interrupted" in err


def test_version_for_a_bug_report() -> None:
    found = json.loads(outlast("version", "--json").stdout)
    assert found.keys() >= {"outlast", "python", "platform", "ray", "torch", "torch_cuda", "gpus", "transformers"}
    assert found.keys() >= {"accelerate", "pyarrow", "safetensors", "peft", "tensorboard", "mlflow", "wandb"}
    assert found["torch"].startswith("2.")
    assert isinstance(found["gpus"], list)
    code = (
        "import sys\nfrom outlast.cluster.cli.version_report import versions\nversions()\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ls_and_show_and_path(finished: Path) -> None:
    rows = json.loads(outlast("checkpoints", "ls", str(finished), "--json").stdout)
    assert [row["step"] for row in rows] == [10, 9, 6]
    for row in rows:
        assert {"step", "path", "attempt", "committed_at", "bytes", "metrics"} <= row.keys()
        assert Path(row["path"], "model.safetensors").is_file()
    by_name = outlast("checkpoints", "ls", "looked-at", "--storage", str(finished.parent), "--json").stdout
    assert json.loads(by_name) == rows
    assert "eval_loss" in outlast("checkpoints", "ls", str(finished)).stdout
    shown = json.loads(outlast("checkpoints", "show", str(finished), "9", "--json").stdout)
    assert shown["world_size"] == 2
    assert {"model.safetensors", "config.json"} <= {entry["path"] for entry in shown["files"]}
    assert outlast("checkpoints", "path", str(finished)).stdout.strip() == rows[0]["path"]
    assert outlast("checkpoints", "path", str(finished), "9").stdout.strip() == rows[1]["path"]
    model = Path(outlast("checkpoints", "path", str(finished), "model").stdout.strip())
    assert (model / "tokenizer.json").is_file()
    assert f"{model} is a model, not a run" in outlast("checkpoints", "ls", str(model), code=2).stderr
    best = min(rows, key=lambda row: row["metrics"].get("eval_loss", 99.0))
    assert [row["best"] for row in rows] == [row is best for row in rows]


def test_verify_names_the_damage(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    assert outlast("checkpoints", "verify", str(copy)).stdout.count("whole") == 4  # three checkpoints and the model
    [attempt] = (copy / "attempts").iterdir()
    weights = attempt / "checkpoint-9/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (attempt / "checkpoint-10/manifest.json").unlink()
    out = outlast("checkpoints", "verify", str(copy), code=5).stdout
    assert "model.safetensors: bytes changed" in out
    assert "manifest.json: missing, although this checkpoint was committed" in out
    verdicts = json.loads(outlast("checkpoints", "verify", str(copy), "--json", code=5).stdout)
    assert {item["step"] for item in verdicts if item["faults"]} == {9, 10}
    assert "damaged: " in outlast("checkpoints", "ls", str(copy)).stderr
    assert "whole" in outlast("checkpoints", "verify", str(copy), "6").stdout
    assert "damaged" in outlast("checkpoints", "verify", str(copy), "10", code=5).stdout
    assert "/checkpoint-9" in outlast("checkpoints", "verify", str(copy), "newest", code=5).stdout
    assert "/model" in outlast("checkpoints", "verify", str(copy), "model").stdout


def test_a_storage_that_does_not_exist_has_no_runs(tmp_path: Path) -> None:
    assert outlast("list", "--storage", str(tmp_path)).stderr.strip() == f"no runs in {tmp_path}"
    missing = tmp_path / "typo"
    assert outlast("list", "--storage", str(missing)).stderr.strip() == f"no runs in {missing}, which is no directory"
