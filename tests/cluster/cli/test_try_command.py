"""`outlast try`: predictions of a run's model by its task, from the run's directory alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.trainers.attempt import Assignment
from outlast.trainers.data.tokenizer import tokenizer_files, train_bpe
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.custom_model import load_class
from outlast.trainers.tasks.greedy_decoding import NUM_NEW_TOKENS
from outlast.trainers.user_code import make_importable
from tests.support.groups.worker_group import run_group
from tests.support.tasks.cases import CASES
from tests.trainers.models.test_custom_model import EXAMPLES, PLAIN
from tests.trainers.models.test_lora import LORA, make_base


@pytest.fixture
def finished(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> Callable[[str], str]:
    """`finished(case)`: the directory of a short run of that case, whose data is deleted."""

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


def test_conversations_with_their_answers(finished: Callable[[str], str], tmp_path: Path) -> None:
    """The answer at the end of a conversation is compared with, not read; an error names its row."""
    run, rows = finished("chat"), tmp_path / "rows.jsonl"
    asked = {"role": "user", "content": "how?"}
    rows.write_text(json.dumps({"messages": [asked, {"role": "assistant", "content": "so"}]}) + "\n")
    [alone] = ask(run, "--text", "how?")
    assert ask(run, "--file", str(rows)) == [{**alone, "expected": "so"}]
    assert "expected" not in alone
    with rows.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "critic", "content": "no"}]}) + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 2: message 1 has the unknown role 'critic'"):
        ask(run, "--file", str(rows))
    rows.write_text('{"messages": [{"content": "no"}]}\n{"messages": 5}\n')
    with pytest.raises(ConfigError, match=r"^/[^:]*rows\.jsonl, row 1: message 1 has no role or no content"):
        ask(run, "--file", str(rows))


def test_hidden_words_are_guessed(finished: Callable[[str], str], tmp_path: Path) -> None:
    """With the mask token of a tokenizer trained here, as in the README."""
    run, text = finished("masked-lm"), "The <|mask|> is here."
    [answer] = ask(run, "--text", text)
    [guesses] = answer["guesses"]
    plain = CliRunner().invoke(app, ["try", run, "--text", text], catch_exceptions=False).stdout
    best = f"{guesses[0]['token']!r} {guesses[0]['score']:.3f}"
    assert plain.startswith(f"text: {text}  guesses: [[{best}, ")
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist") as caught:
        ask(run, "--file", str(tmp_path / "gone.jsonl"))
    assert caught.value.hint == "give --file rows with text"


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
    with pytest.raises(ConfigError, match=r"data\.max_length"):
        ask(str(storage.path("try-words")), "--prompt", "The", "-s", "data.max_length=short")


def outlast(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a new process, which has not imported the user's modules."""
    program = "from outlast.cluster.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def train(assignment: Assignment, storage: LocalStorage, code: Path) -> str:
    """The directory of the run."""
    object.__setattr__(assignment, "code", str(code))
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    return str(storage.path(assignment.config.name))


def by_hand(run: Path) -> str:
    """The bigram model's continuation of "The", from the files alone."""
    [folder] = run.glob("attempts/*/model")
    weights, tokenizer = load_file(folder / "model.safetensors"), AutoTokenizer.from_pretrained(folder)
    last: int = tokenizer("The")["input_ids"][-1]
    written: list[int] = []
    while len(written) < NUM_NEW_TOKENS and last != tokenizer.eos_token_id:
        last = int((weights["head.weight"] @ weights["embed.weight"][last] + weights["head.bias"]).argmax())
        written.append(last)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def test_a_class_beside_the_run_file(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> None:
    """A model without transformers, which cannot generate by itself."""
    (tmp_path / "bigrams.py").write_text(PLAIN)
    (tmp_path / "mine.py").write_text(
        "from outlast.trainers.tasks.causal_lm import CausalLM\nclass Words(CausalLM): pass\n"
    )
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
    assert json.loads(beside.stdout)["continuation"] == by_hand(Path(run))
    trusting = ("try", run, "--prompt", "The", "--json", "--trust-remote-code")
    assert outlast(*trusting, "--code", str(tmp_path)).stdout == beside.stdout
    alone = outlast(*trusting)
    assert alone.returncode == 2
    assert "No module named 'mine'" in alone.stderr
    unasked = outlast("try", run, "--prompt", "The", "--code", str(tmp_path))
    assert unasked.returncode == 2
    assert "the run names code: model.class bigrams:Bigrams, model.task mine:Words" in unasked.stderr
    assert "--trust-remote-code" in unasked.stderr
    named = outlast("try", run, "--prompt", "The", "--code", str(tmp_path), "-s", "model.task=mine:Words")
    assert "the run names code: model.class bigrams:Bigrams;" in named.stderr


def test_code_in_the_checkpoint_runs_only_when_it_is_trusted(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """A custom transformers model, whose code is stored in every checkpoint."""
    brought = make_trusting(tmp_path / "source")
    model = {"path": str(brought), "trust_remote_code": True, "config": None, "tokenizer": None}
    run = train(assign("try-trusted", sections={"model": model}, steps=2, eval_every=None), storage, tmp_path)
    with pytest.raises(ConfigError, match="custom code") as caught:
        ask(run, "--prompt", "The")
    assert "--trust-remote-code" in caught.value.hint
    assert ask(run, "--prompt", "The", "--trust-remote-code")[0]["continuation"]


def make_trusting(folder: Path) -> Path:
    tokenizer = train_bpe(iter(["a text"]), 300)
    make_importable(str(EXAMPLES))
    source = load_class("recurrent:RecurrentLM")
    source(source.config_class(vocab_size=300, width=16)).save_pretrained(folder)
    (folder / "recurrent_code.py").write_text((EXAMPLES / "recurrent.py").read_text())
    where = {"AutoConfig": "recurrent_code.RecurrentConfig", "AutoModelForCausalLM": "recurrent_code.RecurrentLM"}
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "auto_map": where}))
    for name, data in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(data)
    return folder


def test_an_adapter_answers_upon_its_base(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, text_file: str
) -> None:
    base = make_base(tmp_path / "base", text_file)
    model = {"path": str(base), "lora": LORA, "config": None, "tokenizer": None}
    assignment = assign("try-adapter", sections={"model": model}, steps=4, eval_every=None, lr=0.3)
    run = train(assignment, storage, tmp_path)
    [folder] = Path(run).glob("attempts/*/model")
    adapted, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer("The", return_tensors="pt")
    written = adapted.generate(**given, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)[0]
    with pytest.raises(ConfigError, match="no path that leads out of a run") as caught:
        ask(run, "--prompt", "The")
    assert f"--base {base}" in caught.value.hint
    [answer] = ask(run, "--prompt", "The", "--base", str(base))
    assert ask(run, "--prompt", "The", "--trust-remote-code") == [answer]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(assignment.config.model_dump(mode="json", by_alias=True)))
    assert ask(str(tmp_path / "run.yaml"), "--prompt", "The") == [answer]
    assert answer["continuation"] == tokenizer.decode(written[given["input_ids"].shape[1] :], skip_special_tokens=True)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="the adapter's base model cannot be loaded") as caught:
        ask(run, "--prompt", "The", "--base", str(base))
    assert "--base" in caught.value.hint
    assert ask(run, "--prompt", "The", "--base", str(moved)) == [answer]
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(moved).config)
    other.save_pretrained(moved)
    with pytest.raises(ConfigError, match="does not have the weights"):
        ask(run, "--prompt", "The", "--base", str(moved))


def test_an_adapter_upon_trusted_code(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> None:
    brought = make_trusting(tmp_path / "source")
    lora = {"r": 2, "target_modules": ["head"]}
    model = {"path": str(brought), "trust_remote_code": True, "config": None, "tokenizer": None, "lora": lora}
    run = train(assign("try-both", sections={"model": model}, steps=2, eval_every=None), storage, tmp_path)
    [answer] = ask(run, "--prompt", "The", "--trust-remote-code")
    assert answer["continuation"]
    merged = ["checkpoints", "export", run, str(tmp_path / "merged"), "--merge", "--trust-remote-code"]
    assert CliRunner().invoke(app, merged, catch_exceptions=False).exit_code == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(whole.state_dict())
