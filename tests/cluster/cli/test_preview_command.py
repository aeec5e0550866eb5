"""`outlast preview`: what it prints, and that it writes nothing unless all rows are prepared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.main import app
from outlast.cluster.cli.preview import NUM_ROWS
from tests.support.command import OUTLAST
from tests.support.tasks.cases import CASES
from tests.support.terminal import on_terminal


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, rows: list[dict[str, Any]], **data: Any) -> Path:
        sections = CASES[name].sections(tmp_path, 1)
        train = tmp_path / "rows.jsonl"
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = {**sections["model"], "tokenizer": {"train_bpe": 300}}
        body = {"name": "run", "model": model, "data": {**sections["data"], "eval": None, "train": str(train), **data}}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(body))
        return path

    return make


def preview(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["preview", *map(str, arguments)])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


ROWS = [{"text": f"row {at}", "label": "good" if at % 2 else "bad"} for at in range(6)]


def test_what_is_printed(run_file: Callable[..., Path], tmp_path: Path) -> None:
    path = run_file("classes", [*ROWS, {"text": "", "label": "bad"}])
    assert preview(path, "--rows", 2).splitlines() == [
        "task sequence-classification, columns: text, label",
        "problem: single-label",
        "classes: 0 bad, 1 good",
        "train: 7 rows, 7 samples, 13 tokens, at most 2 in a sample",
        "train: 0 rows cut at data.max_length 40 (0 %), 1 row without text (14.3 %)",
        "",
        "train sample 0, 2 tokens",
        "  text: row 0",
        "  label: ⟦bad⟧",
        "",
        "train sample 1, 2 tokens",
        "  text: row 1",
        "  label: ⟦good⟧",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_guessed_column_and_overrides(run_file: Callable[..., Path]) -> None:
    path = run_file("classes", [{"review": f"x{at} y{at} z{at}", "label": at % 2, "idx": at} for at in range(6)])
    printed = preview(path, "-s", "data.text=review", "-s", "data.max_length=2", "--rows", 0)
    assert "columns: text = review, label; not used: idx\n" in printed
    assert "6 rows cut at data.max_length 2 (100 %)" in printed
    assert "sample 0" not in printed


def test_only_the_first_rows_unless_all_are_wanted(run_file: Callable[..., Path], tmp_path: Path) -> None:
    path = run_file("classes", ROWS * 200)
    printed = preview(path)
    assert printed.startswith(f"from the first {NUM_ROWS:,} rows of the train split; --all prepares all rows\n")
    assert "train: 1,000 rows, 1,000 samples" in printed
    assert json.loads(preview(path, "--json"))["first_rows_only"] == NUM_ROWS
    assert not (tmp_path / "runs").exists()
    whole = json.loads(preview(path, "--json", "--all"))
    assert (whole["first_rows_only"], whole["splits"]["train"]["rows"]) == (None, 1200)
    assert (tmp_path / "runs").exists(), "it is kept for the run"


def test_the_evaluation_split(run_file: Callable[..., Path]) -> None:
    path = run_file("classes", ROWS * 20, eval="20%")
    found = json.loads(preview(path, "--json", "--split", "eval", "--rows", 1))
    assert list(found["splits"]) == ["eval"]
    assert [sample["number"] for sample in found["samples"]] == [0]
    with pytest.raises(ConfigError, match=r"data\.eval is not set"):
        preview(path, "-s", "data.eval=null", "--split", "eval")


def test_unusable_rows_are_named(run_file: Callable[..., Path], tmp_path: Path) -> None:
    path = run_file("classes", [*ROWS, {"text": None, "label": "bad"}])
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 7: column 'text' holds no value"):
        preview(path)
    assert "note: skipped 1 unusable rows" in preview(path, "-s", "data.max_bad_rows=1")


def test_what_would_act_on_a_terminal_is_escaped(run_file: Callable[..., Path]) -> None:
    hostile = "a\x1b[2Jb\u202ec\rd\x07 [red]e[/red] :smile:"
    path = run_file("classes", [{"text": hostile, "label": f"{at % 2}\x1b[0m"} for at in range(6)])
    printed = preview(path, "--rows", 1)
    assert "a\\x1b[2Jb\\u202ec\\rd\\x07 [red]e[/red] :smile:" in printed
    assert "⟦0\\x1b[0m⟧" in printed
    assert not {"\x1b", "\r", "\x07", "\u202e"} & set(printed)
    body = json.loads(preview(path, "--rows", 1, "--json"))
    assert body["samples"][0]["passages"][0]["segments"][0]["text"] == hostile


def test_line_breaks_are_shown_and_made(run_file: Callable[..., Path]) -> None:
    path = run_file("chat", [CASES["chat"].row("What is the answer to it? It is 42, as we all know.")] * 3)
    lines = preview(path, "--rows", 1).splitlines()
    at = lines.index("train sample 0, 45 tokens") if "train sample 0, 45 tokens" in lines else 0
    shown = [line for line in lines[at:] if "⟦" in line or "⟧" in line]
    assert [line.strip() for line in shown[:2]] == ["<a>⟦answer to it\\n", "⟧<u>on?\\n"]


def read_terminal(*command: str, **environment: str) -> str:
    """Output of a command on a terminal."""
    code, screen = on_terminal(command, environment={"TERM": "xterm-256color", **environment})
    assert code == 0, screen
    return screen


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="terminals behave so on Linux")
def test_colour_on_a_terminal(run_file: Callable[..., Path]) -> None:
    path = str(run_file("classes", ROWS))
    coloured = read_terminal(OUTLAST, "preview", path, "--rows", "1")
    assert "\x1b[1;32mbad\x1b[0m" in coloured
    assert "⟦" not in coloured
    assert "⟦bad⟧" in read_terminal(OUTLAST, "preview", path, "--rows", "1", NO_COLOR="1")
