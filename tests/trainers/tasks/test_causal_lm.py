"""Documents begin as the tokenizer begins a text; unpacked documents and completions have plain transformers' loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.models.build import build_model
from outlast.trainers.preparation.prepare import data_fingerprint, prepare
from outlast.trainers.tasks.base import find_task
from tests.support.groups.worker_group import tiny_config
from tests.support.tasks.cases import paragraphs

TEXTS = [*list(paragraphs())[:12], "a"]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """As that of Llama: it begins a text with <s>, and does not end it."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    inner = train_bpe(paragraphs(), 400, special).inner
    backend = inner.backend_tokenizer
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Run:
    """Prepares rows for a tiny Llama."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.folder, self.storage = folder, LocalStorage(folder / "store")
        self.tokenizer = tokenizer
        tokenizer.save_pretrained(folder / "tokenizer")

    def config(self, rows: list[dict[str, Any]], model: dict[str, Any] | None = None, **data: Any) -> TrainingConfig:
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = {
            "model": model or {"config": LLAMA, "tokenizer": {"path": str(self.folder / "tokenizer")}},
            "data": {"train": str(path), "eval": None, "max_length": 24, **data},
        }
        return tiny_config("lm", self.storage.url, str(path), sections=sections, eval_every=None)

    def samples(self, config: TrainingConfig) -> list[dict[str, list[int]]]:
        split = prepare(config, self.storage).split(self.storage, "train")
        return [{name: values.tolist() for name, values in item.items()} for item in split.take(range(len(split)))]

    def loss(self, config: TrainingConfig) -> tuple[float, Any]:
        """The mean loss of all samples in one batch, and the model."""
        prepared = prepare(config, self.storage)
        task = find_task("causal-lm")(config.data, prepared.tokenizer(self.storage), prepared.facts)
        model, _ = build_model(config.model, task, task.tokenizer, 3, fresh=True)
        split = prepared.split(self.storage, "train")
        batch = task.collate(split.take(range(len(split))), [])
        with torch.no_grad():
            return (task.loss_sum(model.eval(), batch) / task.count(batch)).item(), model


@pytest.fixture
def run(tokenizer: Any, tmp_path: Path) -> Run:
    return Run(tokenizer, tmp_path)


ROWS = [{"text": text} for text in TEXTS]


def plain_loss(model: Any, tokenizer: Any, samples: list[tuple[list[int], list[int]]]) -> float:
    """Plain transformers' on a padded batch."""
    longest = max(len(ids) for ids, _ in samples)
    pads = [longest - len(ids) for ids, _ in samples]
    ids = torch.tensor([[*ids, *[tokenizer.eos_token_id] * n] for (ids, _), n in zip(samples, pads, strict=True)])
    mask = torch.tensor([[1] * (longest - n) + [0] * n for n in pads])
    labels = torch.tensor([[*labels, *[-100] * n] for (_, labels), n in zip(samples, pads, strict=True)])
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize(("begin_token", "begins"), [("auto", True), (True, True), (False, False)])
def test_documents_begin_as_the_tokenizer_begins_a_text(run: Run, begin_token: Any, begins: bool) -> None:
    stream: list[int] = []
    for text in TEXTS:
        stream += [*run.tokenizer(text, add_special_tokens=begins)["input_ids"], run.tokenizer.eos_token_id]
    expected = [stream[at : at + 24] for at in range(0, len(stream) - 23, 24)]
    assert [item["input_ids"] for item in run.samples(run.config(ROWS, begin_token=begin_token))] == expected


def test_a_tokenizer_that_begins_no_text(run: Run) -> None:
    """As GPT-2's, whose data of release 0.1.0 stays valid: its fingerprint is the same with the default spelled out."""
    own = {"config": LLAMA, "tokenizer": {"train_bpe": 400}}
    tokenizer = train_bpe(iter(TEXTS), 400).inner
    ids = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    expected = [ids[at : at + 24] for at in range(0, len(ids) - 23, 24)]
    assert [item["input_ids"] for item in run.samples(run.config(ROWS, own))] == expected
    forced = run.samples(run.config(ROWS, own, begin_token=True))
    assert sum(item["input_ids"].count(tokenizer.bos_token_id) for item in forced) > len(TEXTS)
    assert data_fingerprint(run.config(ROWS, own)) == data_fingerprint(run.config(ROWS, own, begin_token="auto"))
    assert data_fingerprint(run.config(ROWS, own)) != data_fingerprint(run.config(ROWS, own, begin_token=True))


def test_a_begin_token_that_the_tokenizer_lacks(run: Run) -> None:
    run.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel()
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=run.tokenizer.backend_tokenizer, eos_token="</s>", unk_token="<unk>"
    )
    other.save_pretrained(run.folder / "tokenizer")
    with pytest.raises(ConfigError, match=r"data\.begin_token is true"):
        run.samples(run.config(ROWS, begin_token=True))


def test_unpacked_documents_have_the_loss_of_a_padded_batch(run: Run) -> None:
    config = run.config(ROWS, packing=False)
    expected = [[*run.tokenizer(text)["input_ids"], run.tokenizer.eos_token_id][:24] for text in TEXTS]
    assert [item["input_ids"] for item in run.samples(config)] == expected
    loss, model = run.loss(config)
    assert loss == pytest.approx(plain_loss(model, run.tokenizer, [(ids, ids) for ids in expected]), rel=1e-5)


def test_an_empty_document_is_a_bad_row_unless_it_is_packed(run: Run) -> None:
    rows = [*ROWS, {"text": ""}]
    assert run.samples(run.config(rows))
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, row {len(rows)}: its text is empty"):
        run.samples(run.config(rows, packing=False))


COMPLETIONS = [{"prompt": text[: text.index(" ", 9)], "completion": text[text.index(" ", 9) :]} for text in TEXTS[:6]]


@pytest.mark.parametrize("names", [{}, {"prompt": "question", "completion": "reply"}])
def test_the_loss_is_on_the_completion(run: Run, names: dict[str, Any]) -> None:
    """As TRL documents rows of prompt and completion: an end token follows, and the prompt's tokens are not learned."""
    rows = [{names.get(key, key): text for key, text in row.items()} for row in COMPLETIONS]
    config, expected = run.config(rows, **names), []
    for row in COMPLETIONS:
        ids = run.tokenizer(f"{row['prompt']}{row['completion']}</s>")["input_ids"]
        num_given = len(run.tokenizer(row["prompt"])["input_ids"])
        expected.append((ids[:24], [*[-100] * num_given, *ids[num_given:]][:24]))
    found = run.samples(config)
    assert [(item["input_ids"], item["labels"]) for item in found] == expected
    loss, model = run.loss(config)
    assert loss == pytest.approx(plain_loss(model, run.tokenizer, expected), rel=1e-5)
    assert any("in the form of prompt and completion" in note for note in prepare(config, run.storage).notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "its completion is empty"),
        ({"prompt": "a", "completion": " \n"}, "its completion is empty"),
        (
            {"prompt": "word " * 40, "completion": "b"},
            r"its completion begins at token \d+: set data\.max_length",
        ),
    ],
)
def test_completions_that_teach_nothing(run: Run, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, row 7: {message}"):
        run.samples(run.config([*COMPLETIONS, row]))


def test_prompts_that_end_in_a_space_are_noted(run: Run) -> None:
    rows = [{"prompt": f"{row['prompt']} ", "completion": row["completion"].strip()} for row in COMPLETIONS]
    for given, is_noted in ((rows, True), ([*COMPLETIONS, rows[0]], False)):
        notes = prepare(run.config(given), run.storage).notes
        assert any("prompts end in a space" in note for note in notes) == is_noted


def test_texts_are_continued_as_they_are_learned(run: Run) -> None:
    config = run.config(ROWS, packing=False)
    prepared = prepare(config, run.storage)
    task = find_task("causal-lm")(config.data, prepared.tokenizer(run.storage), prepared.facts)
    model: Any = build_model(config.model, task, task.tokenizer, 3, fresh=True)[0]
    given = run.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        [found] = task.predict(model.eval(), [{"text": TEXTS[0]}])
        [expected] = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=64, do_sample=False
        )
    continuation = expected[given["input_ids"].shape[1] :]
    assert found["continuation"] == run.tokenizer.decode(continuation, skip_special_tokens=True)


@pytest.mark.parametrize("packing", [True, False])
def test_a_tokenizer_without_an_end_token(packing: bool, tokenizer: Any, tmp_path: Path) -> None:
    backend = tokenizer.backend_tokenizer
    run = Run(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<unk>"), tmp_path)
    with pytest.raises(ConfigError, match="no end-of-text token, which is put after each document"):
        run.samples(run.config(ROWS, packing=packing))
