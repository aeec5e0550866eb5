"""The command line without Ray: help, errors with their exit codes and next steps, and the `checkpoints` verbs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from outlast.checkpointing.storage import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop import Outcome
from tests.group import run_group, tiny_config

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


@pytest.fixture
def run_file(tmp_path: Path, text_file: str) -> Path:
    body = tiny_config("run", str(tmp_path / "runs"), text_file).model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['outlast', '--help']\n"
        "from outlast.cluster.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'accelerate', 'pyarrow', 'numpy', 'pydantic', 'yaml', 'rich'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpoints" in done.stdout


def test_version_for_a_bug_report() -> None:
    found = json.loads(outlast("version", "--json").stdout)
    assert found.keys() >= {"outlast", "python", "platform", "ray", "torch", "torch_cuda", "gpus", "transformers"}
    assert found.keys() >= {"accelerate", "pyarrow", "safetensors", "peft", "tensorboard", "mlflow", "wandb"}
    assert found["torch"].startswith("2.")
    assert isinstance(found["gpus"], list)
    code = (
        "import sys\nfrom outlast.cluster.versions import versions\nversions()\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (["train.stepz=3"], "did you mean 'steps'"),
        (["train.batch=7", "train.micro_batch=2"], "must divide"),
        (["name=../elsewhere"], "'..'"),
        (["checkpoint.every=soon"], "not an interval"),
        (["checkpoint.every=1.5"], "'1.5' is not an interval: write 200"),
        (["checkpoint.every=0"], "more steps than it has"),
        (["train.eval_every=0"], "leave it out"),
        (["checkpoint.keep_last=1"], "checkpoint.keep_last"),
        (["model.task=juggling"], "model.task"),
        (["data.train=${env:OUTLAST_NOT_SET}"], "OUTLAST_NOT_SET is not set"),
        (["nonsense"], "write key=value"),
    ],
)
def test_wrong_settings(run_file: Path, edit: list[str], said: str) -> None:
    options = [part for item in edit for part in ("-s", item)]
    assert said in outlast("train", str(run_file), *options, code=2).stderr


def test_run_file_missing_or_not_yaml(tmp_path: Path) -> None:
    missing = outlast("train", str(tmp_path / "none.yaml"), code=2).stderr
    assert "cannot be read" in missing
    assert "→" in missing
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    assert "line" in outlast("train", str(broken), code=2).stderr


def test_data_file_missing(run_file: Path) -> None:
    done = outlast("train", str(run_file), "-s", "data.train=/no/such.txt", code=2)
    assert "/no/such.txt is not there" in done.stderr


def test_storage_is_a_file(run_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("something of mine")
    done = outlast("train", str(run_file), "-s", f"checkpoint.storage={place}", code=3)
    assert "a file stands where a directory is needed" in done.stderr
    assert place.read_text() == "something of mine"


@pytest.mark.faults
def test_workers_that_do_not_fit(run_file: Path) -> None:
    done = outlast("train", str(run_file), "-s", "scale.workers=2", "-s", "scale.gpus_per_worker=64", code=3)
    assert "GPU: 128 wanted" in done.stderr


def test_ls_and_show_and_path(finished: Path) -> None:
    rows = json.loads(outlast("checkpoints", "ls", str(finished), "--json").stdout)
    assert [row["step"] for row in rows] == [10, 9, 6]
    for row in rows:
        assert {"step", "path", "attempt", "committed_at", "bytes", "metrics"} <= row.keys()
        assert Path(row["path"], "model.safetensors").is_file()
    by_name = outlast("checkpoints", "ls", "looked-at", "--storage", str(finished.parent), "--json").stdout
    assert json.loads(by_name) == rows
    assert "eval_loss" in outlast("checkpoints", "ls", str(finished)).stdout
    shown = json.loads(outlast("checkpoints", "show", str(finished), "--step", "9", "--json").stdout)
    assert shown["world_size"] == 2
    assert {"model.safetensors", "config.json"} <= {entry["path"] for entry in shown["files"]}
    assert outlast("checkpoints", "path", str(finished)).stdout.strip() == rows[0]["path"]
    assert outlast("checkpoints", "path", str(finished), "9").stdout.strip() == rows[1]["path"]
    model = Path(outlast("checkpoints", "path", str(finished), "model").stdout.strip())
    assert (model / "tokenizer.json").is_file()
    assert "it has: 10, 9, 6" in outlast("checkpoints", "show", str(finished), "--step", "7", code=5).stderr


def test_no_such_run(tmp_path: Path) -> None:
    assert "there is no run" in outlast("checkpoints", "ls", "nobody", "--storage", str(tmp_path), code=2).stderr


def test_verify_names_what_is_wrong(finished: Path, tmp_path: Path) -> None:
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
    assert "whole" in outlast("checkpoints", "verify", str(copy), "--step", "6").stdout
