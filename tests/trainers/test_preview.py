"""Samples as text and counts of rows, against the tokenizer of plain transformers on the rows themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.preparation.data_summary import describe_summary, summarize_data
from outlast.trainers.preparation.prepare import Prepared, prepare, prepare_first
from outlast.trainers.preview import PreviewSample, preview_samples
from outlast.trainers.tasks.base import Record, Task
from tests.support.groups.worker_group import tiny_config
from tests.support.tasks.cases import CASES, TURNS, Row

COUNT = 40


@dataclass(frozen=True)
class Previewed:
    """The first samples of a case's data, its rows, and its tokenizer as plain transformers loads it."""

    config: TrainingConfig
    prepared: Prepared
    samples: list[PreviewSample]
    rows: list[Row]
    inner: Any

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(ids, clean_up_tokenization_spaces=False))


def look(folder: Path, sections: dict[str, Any], limit: int = 1000) -> Previewed:
    config = tiny_config("looked-at", str(folder / "runs"), "", sections=sections)
    storage = LocalStorage(folder / "runs")
    prepared = prepare_first(config, storage, "train", limit)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for entry in prepared.files:
        if entry.path.startswith("tokenizer/"):
            (folder / entry.path).write_bytes(read_bytes(storage, f"{prepared.directory}/{entry.path}"))
    rows = [json.loads(line) for line in Path(sections["data"]["train"]).read_text().splitlines()]
    samples = preview_samples(config, prepared, storage, "train", COUNT)
    inner = AutoTokenizer.from_pretrained(tokenizer)
    if config.model.task == "token-classification":  # as in the examples of transformers
        inner.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    return Previewed(config, prepared, samples, rows, inner)


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Previewed]:
    @cache
    def make(name: str) -> Previewed:
        folder = tmp_path_factory.mktemp("preview")
        sections = CASES[name].sections(folder, COUNT)
        sections["data"]["eval"] = None
        sections["train"]["eval_every"] = None
        return look(folder, sections)

    return make


def learned(sample: PreviewSample, name: str = "text") -> list[tuple[str, str]]:
    """Text and target of the learned segments of a text."""
    [passage] = [item for item in sample.passages if item.name == name]
    return [(segment.text, segment.target) for segment in passage.segments if segment.is_learned]


@pytest.mark.parametrize("name", ["classes", "pairs", "multi-label", "regression"])
def test_a_text_with_its_label(name: str, looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at(name)
    assert len(it.samples) == COUNT
    for sample, row in zip(it.samples, it.rows, strict=True):
        pair = [[row["text_pair"]]] if "text_pair" in row else []
        [ids] = it.inner([row["text"]], *pair, truncation=True, max_length=40)["input_ids"]
        [passage] = sample.passages
        assert passage.text == it.decode(ids)
        assert sample.num_tokens == len(ids)
        label = row["label"]
        if isinstance(label, list):
            assert sample.targets["label"] == (", ".join(sorted(label)) or "none")
        else:
            assert sample.targets["label"] == (f"{label:g}" if name == "regression" else str(label))


def test_answers_of_a_conversation(looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at("chat")
    for sample, row in zip(it.samples, it.rows, strict=True):
        [passage] = sample.passages
        text = it.inner.apply_chat_template(row["messages"], tokenize=False, chat_template=TURNS)
        assert text.startswith(passage.text)
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        found = [text.rstrip("\n") for text, _ in learned(sample)]
        assert found
        if passage.text == text:
            assert found == answers
    assert any(passage.text != "" for sample in it.samples for passage in sample.passages)


def test_masked_tokens(looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at("masked-lm")
    whole = {it.decode(it.inner(row["text"])["input_ids"]) for row in it.rows}
    num_masks = 0
    for sample in it.samples:
        [passage] = sample.passages
        num_masks += sum(text == it.inner.mask_token for text, _ in learned(sample))
        assert learned(sample), "at least one token is masked in a sample"
        restored = "".join(segment.target or segment.text for segment in passage.segments)
        assert any(restored.removeprefix("<|cls|>").removesuffix("<|sep|>") in text for text in whole)
    assert num_masks > COUNT / 2


def test_words_with_tags(looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at("tags")
    for sample, row in zip(it.samples, it.rows, strict=True):
        encoded = it.inner(row["tokens"], is_split_into_words=True, truncation=True, max_length=40)
        ids, words = encoded["input_ids"], encoded.word_ids()
        firsts = [words.index(word) for word in dict.fromkeys(words) if word is not None]
        assert learned(sample) == [(it.decode(ids[at : at + 1]), row["tags"][word]) for word, at in enumerate(firsts)]
        assert sample.passages[0].text == it.decode(ids)


def test_spans_of_answers(looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at("answers")
    answers = {answer for row in it.rows for answer in row["answers"]["text"]}
    found = [sample for sample in it.samples if learned(sample)]
    assert len(found) > COUNT / 2
    for sample in found:
        [(text, _)] = learned(sample)
        assert sample.targets["answer"] == text.strip()
        assert any(answer in text for answer in answers)
    assert all(sample.targets["answer"] == "none in this window" for sample in it.samples if sample not in found)


@pytest.mark.parametrize("name", ["seq2seq-lm", "seq2seq-lm without its own shift"])
def test_source_and_target(name: str, looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at(name)
    for sample, row in zip(it.samples, it.rows, strict=True):
        source, target = sample.passages
        assert source.text == it.decode(it.inner(row["source"], truncation=True, max_length=40)["input_ids"])
        assert target.text == it.decode(it.inner(text_target=row["target"])["input_ids"])
        assert (learned(sample, "source"), len(learned(sample, "target"))) == ([], 1)


@pytest.mark.parametrize("name", ["choices", "double-heads gpt2"])
def test_choices(name: str, looked_at: Callable[[str], Previewed]) -> None:
    it = looked_at(name)
    for sample, row in zip(it.samples, it.rows, strict=True):
        assert [passage.name for passage in sample.passages] == ["choice 0", "choice 1"]
        for choice, passage in zip(row["choices"], sample.passages, strict=True):
            if "double" in name:
                text = f"{row['text']} {choice}"
                ids = it.inner(text, truncation=True, max_length=39, add_special_tokens=False)["input_ids"]
                ids = [*ids, it.inner.eos_token_id]
            else:
                ids = it.inner(row["text"], choice, truncation=True, max_length=40)["input_ids"]
            assert passage.text == it.decode(ids)
        assert sample.targets == {"label": f"choice {row['label']}"}
        marked = [passage.name for passage in sample.passages if any(item.is_learned for item in passage.segments)]
        assert marked == ([f"choice {row['label']}"] if "double" in name else [])


def test_packed_documents(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [f"document {number} ends with é and 漢字" for number in range(30)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sections = {"data": {"train": str(rows), "eval": None}, "train": {"eval_every": None}}
    it = look(tmp_path, sections)
    ids = [token for text in texts for token in [*it.inner(text)["input_ids"], it.inner.eos_token_id]]
    assert [item.passages[0].text for item in it.samples] == [
        it.decode(ids[begin : begin + 16]) for begin in range(0, len(ids) - 15, 16)
    ][:COUNT]
    assert all([segment.is_learned for segment in item.passages[0].segments] == [False, True] for item in it.samples)
    [counts] = summarize_data(it.config, it.prepared)["splits"].values()
    assert (counts["cut"], counts["dropped_tokens"]) == (0, len(ids) % 16)


class Ends(Task):
    """A user's task: which token is the last letter's."""

    auto_class = "AutoModelForTokenClassification"
    columns = (Column("text", ColumnType.TEXT),)

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record in records:
            ids = np.asarray(self.tokenizer.inner(record["text"])["input_ids"][: self.settings.max_length], np.int32)
            labels = np.full(len(ids), -100, np.int32)
            labels[-1] = 7
            yield {"input_ids": ids, "labels": labels, "weight": np.asarray([0.5], np.float32)}

    def loss(self, outputs: Any, batch: Any) -> Any:
        raise NotImplementedError


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    sections = CASES["masked-lm"].sections(tmp_path, COUNT)
    sections["model"]["task"] = "tests.trainers.test_preview:Ends"
    sections["data"] |= {"eval": None, "max_length": 12}
    sections["train"]["eval_every"] = None
    it = look(tmp_path, sections)
    for sample, row in zip(it.samples, it.rows, strict=True):
        ids = it.inner(row["text"], add_special_tokens=True)["input_ids"][:12]
        assert sample.passages[0].text == it.decode(ids)
        assert learned(sample) == [(it.decode(ids[-1:]), "7")]
        assert sample.targets == {"weight": "0.5"}
    lengths = [len(it.inner(row["text"])["input_ids"]) for row in it.rows]
    assert it.prepared.num_cut == {"train": sum(length > 12 for length in lengths)}


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classes", "pairs", "chat", "tags", "seq2seq-lm", "choices", "double-heads gpt2"])
def test_rows_that_are_cut(name: str, looked_at: Callable[[str], Previewed], tmp_path: Path) -> None:
    it = looked_at(name)
    if name == "chat":
        sections = CASES[name].sections(tmp_path, COUNT)
        sections["data"] |= {"eval": None, "max_length": 32}
        sections["train"]["eval_every"] = None
        it = look(tmp_path, sections)
    inner = it.inner

    def tokens(row: Row) -> list[int]:
        """Tokens of each text without a limit."""
        match name:
            case "chat":
                text = inner.apply_chat_template(row["messages"], tokenize=False, chat_template=TURNS)
                return [len(inner(text, add_special_tokens=False)["input_ids"])]
            case "tags":
                return [len(inner(row["tokens"], is_split_into_words=True)["input_ids"])]
            case "seq2seq-lm":
                return [len(inner(row["source"])["input_ids"])]
            case "choices":
                return [len(inner(row["text"], choice)["input_ids"]) for choice in row["choices"]]
            case "double-heads gpt2":
                plain = [f"{row['text']} {choice}" for choice in row["choices"]]
                return [len(inner(text, add_special_tokens=False)["input_ids"]) + 1 for text in plain]
        pair = [[row["text_pair"]]] if "text_pair" in row else []
        return [len(inner([row["text"]], *pair)["input_ids"][0])]

    limit = it.config.data.max_length
    lengths = [max(tokens(row)) for row in it.rows]
    expected = sum(length > limit for length in lengths)
    assert 0 < expected < COUNT, "the case must have both"
    assert it.prepared.num_cut == {"train": expected}
    assert it.prepared.num_empty == {"train": 0}


def test_rows_just_as_long_as_allowed_are_not_cut(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    targets = ["one two three", "one two three four", "one", "one two three four five six"]
    rows.write_text("".join(json.dumps({"source": "a b", "target": text}) + "\n" for text in targets))
    sections = CASES["seq2seq-lm"].sections(tmp_path, 1)
    sections["data"] |= {"train": str(rows), "eval": None}
    sections["train"]["eval_every"] = None
    inner = look(tmp_path, sections).inner
    lengths = [len(inner(text_target=text)["input_ids"]) for text in targets]
    for limit in sorted(set(lengths)):
        sections["data"]["max_target_length"] = limit
        prepared = look(tmp_path, sections).prepared
        assert prepared.num_cut == {"train": sum(length > limit for length in lengths)}


@pytest.mark.parametrize("name", ["classes", "pairs", "masked-lm"])
def test_rows_without_text(name: str, tmp_path: Path) -> None:
    sections = CASES[name].sections(tmp_path, COUNT)
    path = Path(sections["data"]["train"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (1, 5, 6):
        rows[number] |= {key: "" for key in ("text", "text_pair") if key in rows[number]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections["data"]["eval"] = None
    sections["train"]["eval_every"] = None
    assert look(tmp_path, sections).prepared.num_empty == {"train": 3}


def test_a_few_rows_of_many(tmp_path: Path) -> None:
    """Classes are those of all rows, counts those of the first ones only."""
    rows = tmp_path / "rows.jsonl"
    labels = ["bad"] * 50 + ["good"] * 50
    rows.write_text(
        "".join(json.dumps({"text": f"row {at}", "label": label}) + "\n" for at, label in enumerate(labels))
    )
    sections = CASES["classes"].sections(tmp_path, 1)
    sections["data"] |= {"train": str(rows), "eval": None}
    sections["train"]["eval_every"] = None
    it = look(tmp_path, sections, limit=10)
    assert it.prepared.facts["classes"] == ["bad", "good"]
    assert (it.prepared.num_rows, it.prepared.num_samples) == ({"train": 10}, 10)
    lines = list(describe_summary(summarize_data(it.config, it.prepared)))
    assert lines[:3] == [
        "task sequence-classification, columns: text, label",
        "problem: single-label",
        "classes: 0 bad, 1 good",
    ]
    assert lines[3].startswith("train: 10 rows, 10 samples")
    assert lines[4] == "train: 0 rows cut at data.max_length 40 (0 %), 0 rows without text (0 %)"


def test_prepared_data_of_an_earlier_release_has_no_counts(tmp_path: Path) -> None:
    sections = CASES["classes"].sections(tmp_path, COUNT)
    config, storage = tiny_config("old", str(tmp_path / "runs"), "", sections=sections), LocalStorage(tmp_path / "runs")
    prepared = prepare(config, storage)
    assert prepared.num_cut["train"] > 0
    manifest = storage.path(f"{prepared.directory}/data.json")
    body = json.loads(manifest.read_text())
    del body["num_cut"], body["num_empty"], body["digest"]

    from outlast.trainers.preparation.prepare import _digest

    manifest.write_text(json.dumps({**body, "digest": _digest(body)}))
    before = manifest.read_bytes()
    again = prepare(config, storage)
    assert manifest.read_bytes() == before, "it is used as it is"
    assert again.fingerprint == prepared.fingerprint
    assert not again.num_cut
    assert not any("cut" in line for line in describe_summary(summarize_data(config, again)))


def test_an_eval_share_of_nothing(tmp_path: Path) -> None:
    sections = CASES["classes"].sections(tmp_path, COUNT)
    sections["data"]["eval"] = "0.0001%"
    config = tiny_config("none", str(tmp_path / "runs"), "", sections=sections)
    with pytest.raises(ConfigError) as caught:
        prepare(config, LocalStorage(tmp_path / "runs"))
    assert caught.value.message.startswith("data.eval: 0.0001% of the rows of ")
    assert caught.value.message.endswith("are held out, and the eval split has no usable row")
    assert caught.value.hint == "set a larger share, or data.eval to a file of its own"
