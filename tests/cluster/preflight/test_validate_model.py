"""What does not fit in a pretrained model is found by `validate --deep`, `plan` and `train`, before any worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.cluster.config.run_file import load_run
from outlast.cluster.preflight.estimate import estimate_run
from outlast.cluster.preflight.validate import validate
from outlast.trainers.attempt import Assignment
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import run_group
from tests.trainers.models.test_lora import directory, make_base

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"


class Run:
    """A run file of one model and one data file, and what each command finds in it."""

    def __init__(self, folder: Path, model: dict[str, Any], rows: list[dict[str, Any]], max_length: int = 32) -> None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        body = {
            "name": "run",
            "model": model,
            "data": {"train": "rows.jsonl", "max_length": max_length},
            "train": {"steps": 2, "batch": 4, "micro_batch": 2},
            "checkpoint": {"storage": "runs"},
        }
        self.path, self.folder = folder / "run.yaml", folder
        self.path.write_text(yaml.safe_dump(body))

    def error(self) -> str:
        """What `validate --deep` finds; `plan` and `train` must find the same, and start nothing."""
        [found] = validate(str(self.path), deep=True)
        with pytest.raises(ConfigError) as caught:
            estimate_run(load_run(str(self.path))[0].at_home(self.folder))
        done = CliRunner().invoke(app, ["train", str(self.path)])
        assert caught.value.message == found.finding.message
        assert isinstance(done.exception, ConfigError)
        assert done.exception.message == found.finding.message
        assert not (self.folder / "runs/run/attempts").exists()
        return f"{found.finding.message} / {found.finding.suggestion}"

    def notes(self) -> str:
        notes = list[str]()
        assert validate(str(self.path), deep=True, note=notes.append) == []
        planned = estimate_run(load_run(str(self.path))[0].at_home(self.folder)).walk.notes
        assert set(planned) <= set(notes)
        return "\n".join(notes)


@pytest.fixture
def llama(tmp_path: Path, text_file: str) -> Path:
    return make_base(tmp_path / "llama", text_file)


@pytest.fixture
def bert(tmp_path: Path, text_file: str) -> Callable[..., Path]:
    """`bert(class, labels)`: a tiny BERT with a tokenizer."""

    def make(class_name: str = "BertForSequenceClassification", num_labels: int = 2, **given: Any) -> Path:
        tokens = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        template = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
        tokenizer = train_bpe(iter(Path(text_file).read_text().splitlines()), 400, tokens, template).inner
        config = transformers.BertConfig(vocab_size=400, num_labels=num_labels, **{**WIDTHS, **given})
        getattr(transformers, class_name)(config).save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    return make


LINES = [{"text": f"the statement number {number} is executed"} for number in range(80)]
TWO = [{"text": f"number {number}", "label": "odd" if number % 2 else "even"} for number in range(40)]


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_under_other_names(llama: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, {"path": "llama"}, LINES)
    assert "prefix" not in run.notes()
    change_weights(llama, lambda old: {f"_orig_mod.{name}": item for name, item in old.items()})
    assert "have the prefix _orig_mod., which is left out" in run.notes()
    change_weights(llama, lambda old: {f"foo.{name}": item for name, item in old.items()})
    error = run.error()
    assert "lack model.embed_tokens.weight" in error
    assert "they have foo._orig_mod.lm_head.weight" in error


def test_a_head_for_other_classes(bert: Callable[..., Path], tmp_path: Path) -> None:
    bert(num_labels=3)
    model = {"path": "bert", "task": "sequence-classification"}
    error = Run(tmp_path, model, TWO).error()
    assert "classifier.weight is [3, 32] in the files and [2, 32] here" in error
    assert "model.new_head: true" in error
    assert "classifier.bias is [3]" in Run(tmp_path, {**model, "new_head": True}, TWO).notes()
    numbers = [{"text": row["text"], "label": number / 4} for number, row in enumerate(TWO)]
    assert "classifier.weight is [3, 32] in the files and [1, 32] here" in Run(tmp_path, model, numbers).error()
    tagged = [{"tokens": row["text"].split(), "tags": ["a", row["label"]]} for row in TWO[:1] * 20]
    model["task"] = "token-classification"
    assert "classifier.weight is [3, 32] in the files and [2, 32] here" in Run(tmp_path, model, tagged).error()


def test_a_head_for_questions_has_two_outputs(bert: Callable[..., Path], tmp_path: Path) -> None:
    bert("BertForMaskedLM", num_labels=3)
    rows = [{"question": "which number", "context": row["text"], "answers": row["text"][:6]} for row in TWO]
    notes = Run(tmp_path, {"path": "bert", "task": "question-answering"}, rows).notes()
    assert "lack them: qa_outputs.bias, qa_outputs.weight" in notes
    assert "not used by BertForQuestionAnswering: cls.predictions.bias" in notes


def test_tokens_without_an_embedding(llama: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(llama)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": turns} for _ in range(20)]
    error = Run(tmp_path, {"path": "llama", "task": "chat"}, rows).error()
    assert "has 402 tokens, and the embedding of LlamaForCausalLM has 400 rows" in error
    assert "it lacks <|im_start|>, <|im_end|>" in error
    assert "model.resize: true" in error
    assert "embedding" not in Run(tmp_path, {"path": "llama", "task": "chat", "resize": True}, rows).notes()
    unused = Run(tmp_path, {"path": "llama"}, LINES).notes()
    assert "the data has none of the others: <|im_start|>, <|im_end|>" in unused


def test_special_tokens_and_long_samples_are_noted(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_bytes())
    (llama / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16, "eos_token_id": 5}))
    notes = Run(tmp_path, {"path": "llama"}, LINES).notes()
    assert "eos_token_id is 5 in config.json of the model, and 0 (<|endoftext|>) in the tokenizer" in notes
    assert "the longest sample has 32 tokens, and LlamaForCausalLM is made for 16 positions" in notes


@pytest.mark.parametrize(
    ("builder", "given", "limit"),
    [
        ("RobertaForSequenceClassification", {"max_position_embeddings": 22, "pad_token_id": 1, **WIDTHS}, 20),
        ("OPTForSequenceClassification", {"max_position_embeddings": 20, "ffn_dim": 48, "word_embed_proj_dim": 32}, 20),
        ("NystromformerForSequenceClassification", {"max_position_embeddings": 20, **WIDTHS}, 20),
        ("OpenAIGPTForSequenceClassification", {"n_positions": 20, "n_embd": 32, "n_layer": 1, "n_head": 2}, 20),
    ],
)
def test_texts_longer_than_the_positions(
    builder: str, given: dict[str, Any], limit: int, llama: Path, tmp_path: Path
) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} if builder.startswith("OPT") else {}
    config = getattr(transformers, builder).config_class(vocab_size=400, **{**small, **given})
    shutil.copytree(llama, tmp_path / "other")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "other" / file).unlink()
    getattr(transformers, builder)(config).save_pretrained(tmp_path / "other")
    rows = [{"text": "the statement " * 40, "label": row["label"]} for row in TWO]
    model = {"path": "other", "task": "sequence-classification"}
    assert f"has only {limit} positions" in Run(tmp_path, model, rows).error()
    Run(tmp_path, model, rows, max_length=limit).notes()


def test_a_damaged_checkpoint_is_not_trained_on(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    assert run_group(assign("to-damage"), storage, 1)[0].outcome is Outcome.DONE
    shutil.copytree(directory(storage, "to-damage"), tmp_path / "checkpoint")
    run = Run(tmp_path, {"path": "checkpoint"}, LINES, max_length=16)
    (tmp_path / "checkpoint/README.md").write_text("mine")
    assert "damaged" not in run.notes()
    file = tmp_path / "checkpoint/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "model.path" in (error := run.error())
    assert "is damaged: model.safetensors" in error
    run = Run(tmp_path, {"path": str(storage.path("to-damage"))}, LINES, max_length=16)
    assert "is the directory of a run / name its model" in validate_error(run)


def validate_error(run: Run) -> str:
    [found] = validate(str(run.path), deep=True)
    return f"{found.finding.message} / {found.finding.suggestion}"
