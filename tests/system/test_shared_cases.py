"""The cases of `shared/cases`: each comes out as plain transformers, peft or the file's writer would have it."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import transformers
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch.nn import functional

from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.preflight.validate import validate
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.models.build import build_model
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.base import find_task
from tests.system.differential.work import run_once

CASES = Path(os.environ.get("OUTLAST_SHARED", Path(__file__).parents[3] / "shared")) / "cases"
DATA = CASES / "data"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs shared/cases beside the checkout")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, CASES / "make_models.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`settings(task, model, file, **data)`: the body of a run file; `model_` settings begin with that."""

    def make(task: str, model: str, file: str, **more: Any) -> dict[str, Any]:
        of_model = {name.removeprefix("model_"): more.pop(name) for name in list(more) if name.startswith("model_")}
        return {
            "name": "run",
            "model": {"path": str(models / model), "task": task, **of_model},
            "data": {"train": str(DATA / file), "max_length": 64, **more},
            "checkpoint": {"storage": str(tmp_path / "runs")},
            "train": {"steps": 1, "batch": 1, "micro_batch": 1, "lr": 0.0},
        }

    return make


def made(body: dict[str, Any]) -> tuple[Prepared, list[Any]]:
    """The prepared data, and its samples."""
    storage = LocalStorage(Path(body["checkpoint"]["storage"]))
    prepared = prepare(TrainingConfig.model_validate(body), storage)
    return prepared, list(prepared.split(storage, "train").take(range(prepared.num_samples)))


def findings(body: dict[str, Any], folder: Path) -> tuple[list[str], str]:
    """The errors of `validate --deep`, and its notes."""
    (folder / "run.yaml").write_text(yaml.safe_dump(body))
    notes = list[str]()
    found = validate(str(folder / "run.yaml"), deep=True, note=notes.append)
    return [f"{item.finding.message} {item.finding.suggestion}" for item in found], "\n".join(notes)


def rows_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / file).read_text().splitlines()]


def loss_of_transformers(model_folder: Path, file: str) -> float:
    """The mean loss of a classifier over the texts of a file, each alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    losses = []
    for row in rows_of(file):
        logits = model(**tokenizer(row["text"], truncation=True, max_length=64, return_tensors="pt")).logits
        losses.append(functional.cross_entropy(logits, torch.tensor([model.config.label2id[row["label"]]])).item())
    return float(np.mean(losses))


def test_padding_does_not_change_the_loss(
    settings: Callable[..., dict[str, Any]], models: Path, process: ProcessPoolExecutor
) -> None:
    body = settings("sequence-classification", "llama-classifier", "len.jsonl")
    body["train"] |= {"batch": 12, "micro_batch": 12}
    loss = process.submit(run_once, body).result()["loss"]
    assert loss == pytest.approx(loss_of_transformers(models / "llama-classifier", "len.jsonl"), rel=1e-5)


def test_multi_hot_labels(settings: Callable[..., dict[str, Any]]) -> None:
    prepared, samples = made(settings("sequence-classification", "bert", "multihot.jsonl"))
    assert (prepared.facts["problem"], prepared.facts["classes"]) == ("multi-label", ["0", "1", "2"])
    assert [sample["labels"].tolist() for sample in samples] == [row["label"] for row in rows_of("multihot.jsonl")]
    named = settings("sequence-classification", "bert", "multihot.jsonl", labels=["red", "green", "blue"])
    assert made(named)[0].facts["classes"] == ["red", "green", "blue"]


def test_weights_under_a_prefix_are_loaded(
    settings: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    body = settings("causal-lm", "llama-prefixed", "lm.jsonl", max_length=32)
    errors, notes = findings(body, tmp_path)
    assert not errors
    assert "_orig_mod." in notes
    prepared, _ = made(body)
    config, storage = TrainingConfig.model_validate(body), LocalStorage(tmp_path / "runs")
    tokenizer = prepared.tokenizer(storage)
    task = find_task("causal-lm")(config.data, tokenizer, prepared.facts)
    model, _ = build_model(config.model, task, tokenizer, config.seed, fresh=True)
    weights = model.state_dict()
    for name, tensor in load_file(models / "llama/model.safetensors").items():
        assert torch.equal(weights[name], tensor), name


def test_weights_that_are_missing_are_named(
    settings: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    """A head of another task is new, which is reported; a layer that no file has is an error."""
    body = settings("causal-lm", "llama-classifier", "lm.jsonl", max_length=32)
    errors, notes = findings(body, tmp_path)
    assert not errors
    assert "lm_head.weight" in notes
    shutil.copytree(models / "llama", tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    body["model"]["path"] = str(tmp_path / "lacking")
    [error] = findings(body, tmp_path)[0]
    assert "model.layers.1.mlp.up_proj.weight" in error


def test_a_blank_cell_is_no_value(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    body = settings("sequence-classification", "bert", "score_blank.csv")
    [error] = findings(body, tmp_path)[0]
    assert "score_blank.csv, row 9" in error
    assert "holds no value" in error
    expected = pandas.read_csv(DATA / "score_blank.csv")["label"].dropna().tolist()
    pandas.read_csv(DATA / "score_blank.csv").to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    pandas.read_csv(DATA / "score_blank.csv").to_parquet(tmp_path / "rows.parquet")
    for path in (DATA / "score_blank.csv", tmp_path / "rows.jsonl", tmp_path / "rows.parquet"):
        body["data"] |= {"train": str(path), "max_bad_rows": 1}
        prepared, samples = made(body)
        assert (prepared.facts["problem"], prepared.num_bad_rows) == ("regression", 1)
        assert [float(sample["labels"][0]) for sample in samples] == pytest.approx(expected)


def test_missing_labels_of_csv_and_parquet(settings: Callable[..., dict[str, Any]]) -> None:
    expected = pandas.read_csv(DATA / "nanlab.csv")["label"]
    for file in ("nanlab.csv", "nanlab.parquet"):
        prepared, samples = made(settings("sequence-classification", "bert", file, max_bad_rows=1))
        assert prepared.num_bad_rows == expected.isna().sum() == 1
        assert prepared.facts["problem"] == "regression"
        assert [float(sample["labels"][0]) for sample in samples] == expected.dropna().tolist()
        assert any("regression" in note for note in prepared.notes)


def test_the_heads_order_of_classes(
    settings: Callable[..., dict[str, Any]], models: Path, process: ProcessPoolExecutor
) -> None:
    body = settings("sequence-classification", "bert-positive-first", "posneg.jsonl", eval=str(DATA / "posneg.jsonl"))
    found = process.submit(run_once, body).result()
    expected = loss_of_transformers(models / "bert-positive-first", "posneg.jsonl")
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert round(found["eval_loss"], 3) == 0.889
    assert found["id2label"] == {0: "positive", 1: "negative"}
    assert any("order of the model's head" in note for note in made(body)[0].notes)


def test_a_head_for_three_classes(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    errors, _ = findings(settings("sequence-classification", "bert-three-classes", "posneg.jsonl"), tmp_path)
    assert "classifier.weight is [3, 32] in the files and [2, 32] here" in errors[0]
    assert "model.new_head: true" in errors[0]
    body = settings("sequence-classification", "bert-three-classes", "posneg.jsonl", model_new_head=True)
    assert findings(body, tmp_path)[0] == []


def test_tokens_without_an_embedding(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    errors, _ = findings(settings("chat", "llama-added-tokens", "imchat.jsonl", max_length=128), tmp_path)
    assert "602 tokens" in errors[0]
    assert "600 rows" in errors[0]
    assert "<|im_start|>, <|im_end|>" in errors[0]
    body = settings("chat", "llama-added-tokens", "imchat.jsonl", max_length=128, model_resize=True)
    assert findings(body, tmp_path)[0] == []


@pytest.mark.parametrize("file", ["tools.jsonl", "tools.parquet"])
def test_tools_are_in_the_samples(file: str, settings: Callable[..., dict[str, Any]], models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "chat")
    expected = [
        tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=True)["input_ids"]
        for row in rows_of("tools.jsonl")
    ]
    samples = made(settings("chat", "chat", file, max_length=512))[1]
    assert [sample["input_ids"].tolist() for sample in samples] == expected
    assert "TOOLDESC" in tokenizer.decode(expected[0])


def test_text_parts_are_joined(settings: Callable[..., dict[str, Any]], models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "chat")
    plain = [
        [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in row["messages"]]
        for row in rows_of("parts.jsonl")
    ]
    expected = [tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"] for turns in plain]
    samples = made(settings("chat", "chat", "parts.jsonl", max_length=512))[1]
    assert [sample["input_ids"].tolist() for sample in samples] == expected


def test_turns_of_weight_0_are_not_learned(settings: Callable[..., dict[str, Any]], models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "chat")
    for sample in made(settings("chat", "chat", "weight.jsonl", max_length=512))[1]:
        learned = tokenizer.decode([token for token in sample["labels"].tolist() if token != -100])
        assert "right" in learned
        assert "wrong" not in learned
        assert "wrong" in tokenizer.decode(sample["input_ids"])


def test_words_are_tokenized_as_words(settings: Callable[..., dict[str, Any]], models: Path) -> None:
    """As `run_ner.py` does for RoBERTa: the tokenizer is loaded with add_prefix_space."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "roberta")
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    expected = [tokenizer(row["tokens"], is_split_into_words=True)["input_ids"] for row in rows_of("ner.jsonl")]
    samples = made(settings("token-classification", "roberta", "ner.jsonl"))[1]
    assert [sample["input_ids"].tolist() for sample in samples] == expected


def test_documents_begin_as_the_tokenizer_begins_them(settings: Callable[..., dict[str, Any]], models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "llama")
    stream = [
        token for row in rows_of("lm.jsonl") for token in (*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id)
    ]
    samples = made(settings("causal-lm", "llama", "lm.jsonl", max_length=32))[1]
    assert [token for sample in samples for token in sample["input_ids"].tolist()] == stream[: 32 * len(samples)]
    assert stream[0] == tokenizer.bos_token_id


def test_m2m100_trains(settings: Callable[..., dict[str, Any]], models: Path, process: ProcessPoolExecutor) -> None:
    body = settings("seq2seq-lm", "m2m100", "s2s.jsonl", max_target_length=16)
    body["train"] |= {"batch": 4, "micro_batch": 2, "precision": "fp32"}
    body["model"]["overrides"] = dict.fromkeys(
        ("dropout", "attention_dropout", "activation_dropout"), 0.0
    ) | dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0)
    loss = process.submit(run_once, body).result()["loss"]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(models / "m2m100").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "m2m100")
    [row, *_] = rows_of("s2s.jsonl")  # all rows are alike
    labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
    assert loss == pytest.approx(
        model(**tokenizer(row["source"], return_tensors="pt"), labels=labels).loss.item(), rel=1e-5
    )


def test_a_question_longer_than_max_length_is_a_bad_row(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    body = settings("question-answering", "bert", "longq.jsonl", max_length=32)
    errors, _ = findings(body, tmp_path)
    assert "longq.jsonl, row 1" in errors[0]
    assert "max_length" in errors[0]
    body["data"]["max_bad_rows"] = 1
    assert made(body)[0].num_rows["train"] == len(rows_of("longq.jsonl")) - 1


def test_dialects_of_csv(settings: Callable[..., dict[str, Any]], models: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "bert")
    readers = {
        "mac.csv": pandas.read_csv(DATA / "mac.csv"),
        "utf16.csv": pandas.read_csv(DATA / "utf16.csv", encoding="utf-16"),
        "semi.csv": pandas.read_csv(DATA / "semi.csv", sep=";"),
    }
    for file, table in readers.items():
        prepared, samples = made(settings("sequence-classification", "bert", file))
        expected = [tokenizer(text)["input_ids"] for text in table["text"]]
        assert [sample["input_ids"].tolist() for sample in samples] == expected, file
        classes = prepared.facts["classes"]
        assert [classes[int(sample["labels"][0])] for sample in samples] == table["label"].astype(str).tolist(), file
    assert "hdr.csv has no rows" in findings(settings("sequence-classification", "bert", "hdr.csv"), tmp_path)[0][0]
    with (DATA / "space.csv").open() as opened:
        table = list(csv.DictReader(opened, skipinitialspace=True))
    prepared, samples = made(settings("sequence-classification", "bert", "space.csv"))
    assert [prepared.facts["classes"][int(sample["labels"][0])] for sample in samples] == [
        row["label"] for row in table
    ]


def test_quotation_marks_that_join_rows(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    columns = {"text": "text", "label": "label"}
    errors, _ = findings(settings("sequence-classification", "bert", "glue3.tsv", **columns), tmp_path)
    assert "glue3.tsv, line 3" in errors[0]
    assert "data.csv.quote=none" in errors[0]
    prepared, _ = made(settings("sequence-classification", "bert", "glue3.tsv", csv={"quote": "none"}))
    assert prepared.num_rows["train"] == 6


def test_guesses_of_columnar_files_are_reported(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    prepared, samples = made(settings("sequence-classification", "bert", "floatlab.parquet"))
    labels = parquet.read_table(DATA / "floatlab.parquet")["label"].to_pylist()
    assert [float(sample["labels"][0]) for sample in samples] == labels
    assert any("regression" in note for note in prepared.notes)
    errors, notes = findings(settings("sequence-classification", "bert", "floatlab.parquet"), tmp_path)
    assert not errors
    assert "regression" in notes


def test_squads_own_form(settings: Callable[..., dict[str, Any]], models: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "bert")
    [sample] = made(settings("question-answering", "bert", "squad.json"))[1]
    expected = tokenizer("what colour?", "the sky is blue")["input_ids"]
    assert sample["input_ids"].tolist() == expected
    span = sample["input_ids"][int(sample["start"][0]) : int(sample["end"][0]) + 1]
    assert tokenizer.decode(span).strip() == "blue"


def test_an_adapter_goes_on(settings: Callable[..., dict[str, Any]], models: Path, tmp_path: Path) -> None:
    body = settings("causal-lm", "adapter", "lm.jsonl", max_length=32)
    errors, notes = findings(body, tmp_path)
    assert not errors
    assert "adapter" in notes
