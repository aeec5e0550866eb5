"""`outlast try`: a run's model answers by its task, with nothing but what the run's directory holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.storage import LocalStorage
from outlast.cluster.cli import app
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop import Outcome
from tests.group import run_group
from tests.task_cases import CASES
from tests.test_custom import PLAIN


@pytest.fixture
def finished(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> Callable[[str], str]:
    """`finished(case)`: the directory of a short run of that case; its data is gone."""

    def make(name: str) -> str:
        sections = CASES[name].sections(tmp_path)
        sections["train"] |= {"steps": 4, "eval_every": None}
        run = f"try-{name}"
        assert run_group(assign(run, sections=sections), storage, 1)[0].outcome is Outcome.DONE
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()
        return str(storage.path(run))

    return make


def ask(*arguments: str) -> list[Any]:
    result = CliRunner().invoke(app, ["try", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_classes_of_texts_and_of_a_file(finished: Callable[[str], str], tmp_path: Path) -> None:
    run = finished("classes")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    answers = ask(run, "--text", "a", "--text", "b", "--file", str(tmp_path / "rows.jsonl"))
    assert [answer["text"] for answer in answers] == ["a", "b", "one", "two"]
    assert all(answer["scores"].keys() == {"long", "short"} for answer in answers)
    assert answers[0]["scores"] == pytest.approx(ask(run, "--text", "a", "--checkpoint", "4")[0]["scores"], rel=1e-5)
    plain = CliRunner().invoke(app, ["try", run, "--text", "a"], catch_exceptions=False).stdout
    assert plain.startswith("text: a  label: ")


def test_an_answer_is_a_piece_of_the_context(finished: Callable[[str], str]) -> None:
    run, context = finished("answers"), "The treasure lies below the old oak."
    [answer] = ask(run, "--text", json.dumps({"question": "Where?", "context": context}))
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    with pytest.raises(ConfigError, match="the task needs question, context"):
        ask(run, "--text", "Where?")


def test_nothing_damaged_answers(finished: Callable[[str], str], storage: LocalStorage) -> None:
    run = finished("tags")
    assert ask(run, "--text", "Guido wrote it")[0]["tokens"] == ["Guido", "wrote", "it"]
    [weights] = Path(run).glob("attempts/*/model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        ask(run, "--text", "Guido wrote it")
    shutil.rmtree(weights.parent)
    assert ask(run, "--text", "Guido wrote it")[0]["tags"], "without a finished model the newest checkpoint answers"


def test_a_language_model_goes_on(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    assert run_group(assign("try-words", steps=2, eval_every=None), storage, 1)[0].outcome is Outcome.DONE
    [answer] = ask(str(storage.path("try-words")), "--prompt", "The")
    assert answer["text"] == "The"
    assert answer["continuation"]


def outlast(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has imported nothing of the user's yet."""
    program = "from outlast.cluster.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def train(assignment: Assignment, storage: LocalStorage, code: Path) -> str:
    """The directory of the run."""
    object.__setattr__(assignment, "code", str(code))
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    return str(storage.path(assignment.config.name))


def test_a_class_beside_the_run_file(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> None:
    """It knows nothing of transformers, and cannot write by itself."""
    (tmp_path / "bigrams.py").write_text(PLAIN)
    (tmp_path / "mine.py").write_text("from outlast.trainers.tasks import CausalLM\nclass Words(CausalLM): pass\n")
    sections = {"model": {"class": "bigrams:Bigrams", "config": {"width": 16}, "task": "mine:Words"}}
    sys.path.append(str(tmp_path))
    try:
        assignment = assign("try-plain", sections=sections, steps=4, eval_every=None)
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["mine"]
    run = train(assignment, storage, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(assignment.config.model_dump(mode="json", by_alias=True)))
    beside = outlast("try", str(tmp_path / "run.yaml"), "--prompt", "The", "--json")
    assert beside.returncode == 0, beside.stderr
    assert json.loads(beside.stdout)["continuation"]
    assert outlast("try", run, "--prompt", "The", "--code", str(tmp_path), "--json").stdout == beside.stdout
    alone = outlast("try", run, "--prompt", "The")
    assert alone.returncode == 2
    assert "No module named 'mine'" in alone.stderr
