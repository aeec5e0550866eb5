"""`${env:…}` of variables that only the cluster has: submit does not require them, all that runs here does."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.main import main
from outlast.cluster.config.run_file import deferred, load_run
from outlast.cluster.config.run_reference import run_name

BODY = """
name: far
model: {path: "${env:MODEL_DIR}/gpt2"}
data: {train: ["${env:DATA_DIR}/a.txt", /data/b.txt]}
train: {steps: "${env:NUM_STEPS}", lr: 1e-3}
checkpoint: {storage: "${env:PLACE}/runs"}
"""
AT = "127.0.0.1:1"
NAMES = ("MODEL_DIR", "DATA_DIR", "NUM_STEPS", "PLACE")


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*NAMES, "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "far.yaml").write_text(BODY)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "far.yaml"


def test_a_run_for_elsewhere_needs_no_variable_of_here(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"uses \$\{env:MODEL_DIR\}, but MODEL_DIR is not set"):
        load_run(str(run_file))
    config, declared = load_run(str(run_file), elsewhere=True)
    assert deferred(declared) == {
        "model.path": "MODEL_DIR",
        "data.train.0": "DATA_DIR",
        "train.steps": "NUM_STEPS",
        "checkpoint.storage": "PLACE",
    }
    assert config.name == run_name(str(run_file)) == "far"
    assert config.checkpoint.storage == "${env:PLACE}/runs" or "storage" not in config.checkpoint.model_fields_set
    monkeypatch.setenv("NUM_STEPS", "7")
    config, declared = load_run(str(run_file), elsewhere=True)
    assert config.train.steps == 7
    assert config.data.train == ["${env:DATA_DIR}/a.txt", "/data/b.txt"]
    assert "train.steps" not in deferred(declared)


@pytest.mark.parametrize(
    ("override", "expected", "other"),
    [
        ("name=${env:NAME_OF_RUN}", "the run file uses ${env:NAME_OF_RUN}, but NAME_OF_RUN is not set", "MODEL_DIR"),
        ("train.lr=fast", "train.lr", "MODEL_DIR"),
    ],
)
def test_what_is_needed_here_or_wrong_anyhow_is_found(run_file: Path, override: str, expected: str, other: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(str(run_file), [override], elsewhere=True)
    assert expected in error.value.message
    assert other not in error.value.message


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["submit", "far.yaml", "--dry-run"], 0, "sends  run.yaml"),
        (
            ["submit", "far.yaml", "--address", AT],
            3,
            "data.train.0 uses ${env:DATA_DIR}, which is not",
        ),
        (
            ["submit", "far.yaml", "--address", AT, "--follow"],
            2,
            "checkpoint.storage uses ${env:PLACE}, but",
        ),
        (["supervise", "far.yaml", "--address", AT], 2, "checkpoint.storage uses ${env:PLACE}, but"),
        (["logs", "far.yaml", "--address", AT], 3, "no job server answers"),
        (["stop", "far.yaml", "--address", AT], 3, "no job server answers"),
        (["validate", "far.yaml"], 2, "MODEL_DIR is not set"),
    ],
)
def test_commands(
    run_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["outlast", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    assert text in printed.out + printed.err
    assert not list(run_file.parent.glob("*env*")), "nothing is made at a path with a variable"
