"""`outlast validate` of data whose first row or columns are wrong, of guesses, and of data of an existing run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import feather, parquet
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.cluster.config.run_file import load_run
from outlast.cluster.preflight import validate as validate_module
from outlast.cluster.preflight.estimate import describe, estimate_run
from outlast.cluster.preflight.validate import unverified, validate
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import run_group, tiny_config

ANSWERED = [{"prompt": f"What is {number} and one?", "response": f"It is {number + 1}."} for number in range(79)]
ALPACA = [{"instruction": "Add one.", "input": str(number), "output": str(number + 1)} for number in range(79)]
OUTLAST = str(Path(sys.executable).parent / "outlast")
NO_ROWS = pa.table({"text": pa.array([], pa.string())})


@pytest.fixture
def run_file(tmp_path: Path, text_file: str) -> str:
    body = tiny_config("run", str(tmp_path / "runs"), text_file).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b"\x80\x81\xff\x00\n" * 3, "a.jsonl, row 1: is not UTF-8 text"),
        ("a.jsonl", b'{"text": \n{"text": "good"}\n', "a.jsonl, row 1: cannot be read as .jsonl"),
        ("a.csv", b'text\n"not closed\nmore\n', "a.csv, row 1 (line 3): a quotation mark in line 2"),
        ("a.csv", b"text\n", "a.csv has no rows"),
        ("a.tsv", b"text\tother\n", "a.tsv has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.txt", b"\n\n", "a.txt has no rows"),
        ("a.parquet", lambda path: parquet.write_table(NO_ROWS, path), "a.parquet has no rows"),
        ("a.arrow", lambda path: feather.write_feather(NO_ROWS, str(path)), "a.arrow has no rows"),
    ],
)
@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_first_row_that_cannot_be_read(
    key: str, name: str, content: bytes | Callable[[Path], None], text: str, run_file: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    [found] = validate(run_file, [f"data.{key}={path}"])
    assert text in found.finding.message
    assert found.option == f"data.{key}={path}"


def test_rows_may_follow_in_the_next_file(run_file: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "b.csv").write_text("text\n" + "words and more words\n" * 99)
    assert validate(run_file, [f"data.train={tmp_path}/*.csv"]) == []


def test_a_bad_first_row_that_may_be_skipped(run_file: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xff\n{"text": "good"}\n')
    assert validate(run_file, [f"data.train={tmp_path / 'a.jsonl'}", "data.max_bad_rows=1"]) == []


def test_a_guessed_column_is_reported_each_time(run_file: str, tmp_path: Path) -> None:
    rows = "".join(f"the film was number {number},{number % 2}\n" for number in range(60))
    (tmp_path / "a.csv").write_text("review,sentiment\n" + rows)
    given = ["model.task=sequence-classification", f"data.train={tmp_path / 'a.csv'}", "data.text=review"]
    guess, notes = "no column 'label'; using 'sentiment' as data.label", list[str]()
    assert unverified(run_file, given) == [guess]
    for _ in range(2):  # the second time, the data has been prepared
        assert validate(run_file, given, deep=True, note=notes.append) == []
        assert guess in notes
        assert "classes: 0 0, 1 1" in notes
        notes.clear()
        assert f"note: {guess}" in describe(estimate_run(load_run(run_file, given)[0]))
    assert unverified(run_file, [*given, "data.label=sentiment"]) == []


def test_more_cpus_than_this_machine_has(run_file: str) -> None:
    [found] = unverified(run_file, ["scale.cpus_per_worker=4000"])
    assert "the workers need 4000 CPUs, and this machine has" in found
    assert unverified(run_file, ["scale.cpus_per_worker=0.1"]) == []


def test_a_start_on_a_storage_that_is_not_writable_ends_at_once(run_file: str) -> None:
    command = [OUTLAST, "train", run_file, "-s", "checkpoint.storage=/proc/runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "checkpoint.storage /proc/runs: /proc is not writable" in done.stderr
    assert "preparing data" not in done.stderr


def test_storage_that_holds_no_files(run_file: str) -> None:
    """Root may write there by its permissions, and cannot."""
    [found] = validate(run_file, ["checkpoint.storage=/proc/runs"])
    assert "/proc is not writable" in found.finding.message


def test_an_option_at_fault_is_named(run_file: str) -> None:
    [found] = validate(run_file, ["trian.lr=1"])
    assert str(found) == "-s trian.lr=1: trian: unknown key; did you mean 'train'?"
    [found] = validate(run_file, ["model.config.n_head=3"], deep=True)
    assert found.finding.key == "model"
    assert found.option == "model.config.n_head=3"
    line = Path(run_file).read_text().splitlines().index("model:") + 1
    assert str(found).startswith(f"line {line} with -s model.config.n_head=3: model: the model cannot be built")
    assert ".;" not in str(found)
    assert ")." not in str(found)


def test_data_of_an_existing_run(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = assign("begun", steps=3)
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    declared: dict[str, Any] = dict(assignment.declared)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(declared))
    path = str(tmp_path / "run.yaml")
    rows = [json.dumps({"text": f"other words, number {number}, " * 20}) for number in range(40)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    other = [f"data.train={tmp_path / 'other.jsonl'}"]
    [found] = validate(path, other)
    assert "the data is not the same" in found.finding.message
    assert found.option == other[0]
    assert unverified(path) == []
    monkeypatch.setattr(validate_module, "_QUICK_BYTES", 10)
    assert validate(path, other) == []
    assert unverified(path, other) == ["run 'begun' exists; whether its data is the same is checked with --deep only"]
    [found] = validate(path, other, deep=True)
    assert "the data is not the same" in found.finding.message
    [found] = validate(path, ["model.config.n_heads=2"])  # not valid, and another value than that of the run
    assert "did you mean 'n_head'" in found.finding.message
    [found] = validate(path, ["model.config.n_inner=128"])
    assert "model.config.n_inner was not set, is 128" in found.finding.message


@pytest.mark.parametrize("key", ["train", "eval"])
def test_the_line_of_a_file_in_a_list(key: str, run_file: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("words\n")
    path = Path(run_file)
    body = yaml.safe_load(path.read_text())
    body["data"][key] = [str(tmp_path / "good.txt"), str(tmp_path / "gone.txt")]
    path.write_text(yaml.safe_dump(body))
    [found] = validate(run_file)
    [line] = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "gone.txt" in text]
    assert (found.line, found.finding.key) == (line, f"data.{key}.1")
    [found] = validate(run_file, [f"data.{key}=[{tmp_path}/lost.txt]"])
    assert (found.line, found.option) == (None, f"data.{key}=[{tmp_path}/lost.txt]")


@pytest.mark.parametrize("name", ["123", "1.5", "2026-01-01"])
def test_a_name_that_yaml_reads_as_something_else(name: str, run_file: str) -> None:
    path = Path(run_file)
    path.write_text(path.read_text().replace("name: run\n", f"name: {name}\n"))
    [found] = validate(run_file)
    assert found.finding.key == "name"
    assert found.finding.message.startswith("must be a text")
    assert found.finding.suggestion == f'put it in quotes: "{name}"'
    path.write_text(path.read_text().replace(f"name: {name}\n", f'name: "{name}"\n'))
    assert validate(run_file) == []


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ANSWERED, "for prompts with answers: -s data.prompt=prompt -s data.completion=response; for texts"),
        (ALPACA, "-s data.completion=output (without the input; model.task: chat reads all three)"),
    ],
)
def test_prompts_with_answers_are_led_to_the_settings_that_learn_the_answers(
    rows: list[dict[str, str]], words: str, run_file: str, tmp_path: Path
) -> None:
    train = written(tmp_path / "rows.jsonl", rows)
    first, *_, answer = rows[0]
    [found] = validate(run_file, [f"data.train={train}", "data.eval=20%"])
    assert words in found.finding.suggestion
    pair = [f"data.prompt={first}", f"data.completion={answer}"]
    alone = [f"data.train={train}", "data.eval=20%", f"data.text={first}"]
    assert validate(run_file, alone) == []
    [note] = [text for text in unverified(run_file, alone) if "is not read" in text]
    assert note.startswith(f"column {answer!r} is not read: only {first!r} is learned")
    assert all(option in note for option in pair)
    assert validate(run_file, [*alone[:2], *pair]) == []
    assert not any("is not read" in text for text in unverified(run_file, [*alone[:2], *pair]))


@pytest.mark.parametrize(
    ("share", "max_length", "message"),
    [
        ("0.1%", 8, "data.eval: 0.1% of the 79 rows of {} are held out: none of them for eval"),
        ("4%", 512, "for eval, with at most {tokens} tokens, less than one sample (data.max_length 512)"),
        ("99.9%", 8, "data.eval: 99.9% of the 79 rows of {} are held out: none of them for train"),
    ],
)
def test_a_share_that_leaves_a_split_empty_is_found_before_the_preparation(
    share: str, max_length: int, message: str, run_file: str, tmp_path: Path
) -> None:
    rows = [{"text": f"row {number:04}"} for number in range(79)]
    train = written(tmp_path / "rows.jsonl", rows)
    given = [f"data.train={train}", f"data.eval={share}", f"data.max_length={max_length}"]
    [found] = validate(run_file, given)
    head, _, rest = message.partition("{tokens}")
    assert head.format(train) in found.finding.message
    assert rest in found.finding.message
    assert f"set a {'smaller' if share == '99.9%' else 'larger'} share" in found.finding.suggestion
    with pytest.raises(ConfigError, match="are held out"):  # as the preparation finds
        estimate_run(load_run(run_file, given)[0])
    assert validate(run_file, [*given[:1], "data.eval=20%", "data.max_length=8"]) == []


def test_a_tokenizer_without_a_chat_template_is_found_before_the_preparation(run_file: str, tmp_path: Path) -> None:
    given = [f"data.train={written(tmp_path / 'rows.jsonl', ALPACA)}", "data.eval=20%", "model.task=chat"]
    [found] = validate(run_file, given)
    assert found.finding.message == "the tokenizer has no chat template, which conversations need"
    template = "data.chat_template='{% for m in messages %}{{ m.content }}{% endfor %}'"
    assert validate(run_file, [*given, template]) == []
    [found] = validate(run_file, [*given, "data.chat_template=chat.jinja"])
    assert found.finding.message.startswith("'chat.jinja' is not a Jinja template: write its text")
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    for body, errors in (({"tokenizer_class": "GPT2Tokenizer"}, 1), ({"chat_template": "x"}, 0)):
        (model / "tokenizer_config.json").write_text(json.dumps(body))
        found_here = validate(run_file, [*given, "model.tokenizer=null", f"model.path={model}", "model.config=null"])
        assert sum("no chat template" in item.finding.message for item in found_here) == errors


def test_rows_of_an_error_are_shown_line_by_line(run_file: str, tmp_path: Path) -> None:
    given = [f"data.train={written(tmp_path / 'rows.jsonl', ALPACA)}", "data.eval=20%", "model.task=chat"]
    given.append("data.chat_template='{{ bos_token }}'")
    options = [part for item in given for part in ("-s", item)]
    lines = CliRunner().invoke(app, ["validate", run_file, "--deep", *options]).stdout.splitlines()
    assert lines[0].endswith("; the first ones:")
    assert lines[1] == f"  {tmp_path}/rows.jsonl, row 1: the chat template does not show the answer in message 2"
