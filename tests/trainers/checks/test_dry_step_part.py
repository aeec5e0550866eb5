"""The part of a micro-batch that a dry step runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from outlast.trainers.checks import dry_step_part
from outlast.trainers.checks.dry_step_part import activation_bytes, cut, max_tokens, parts, size
from outlast.trainers.tasks.causal_lm import CausalLM
from outlast.trainers.tasks.classification import SequenceClassification
from outlast.trainers.tasks.seq2seq import Seq2SeqLM


@pytest.mark.parametrize(
    ("num_samples", "width", "limit", "expected"),
    [
        (8, 100, 800, [(8, 100)]),
        (8, 100, 799, [(8, 99), (7, 100)]),
        (8, 100, 200, [(8, 25), (2, 100)]),
        (8, 100, 100, [(6, 16), (1, 100)]),
        (8, 100, 99, [(6, 16)]),
        (8, 100, 16, [(1, 16)]),
        (8, 100, 15, []),
        (8, 10, 40, [(4, 10)]),
        (8, 10, -5, []),
    ],
)
def test_texts_are_shortened_before_samples_are_left_out(
    num_samples: int, width: int, limit: int, expected: list[tuple[int, int]]
) -> None:
    assert parts(num_samples, width, limit) == expected


def task(kind: Any) -> Any:
    return object.__new__(kind)


def test_texts_are_cut_with_their_labels() -> None:
    text = torch.arange(24).view(3, 8)
    batch = {"input_ids": text, "attention_mask": text, "labels": torch.arange(12).view(3, 4)}
    assert size(batch, 99) == (3, 12)
    [found] = cut([batch], task(Seq2SeqLM), 2, 0.5)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "input_ids": (2, 4),
        "attention_mask": (2, 4),
        "labels": (2, 2),
    }
    [found] = cut([{**batch, "labels": torch.arange(3)}], task(SequenceClassification), 2, 0.5)
    assert found["labels"].tolist() == [0, 1]
    [found] = cut([{**batch, "labels": torch.zeros(3, 5)}], task(SequenceClassification), 2, 0.5)
    assert found["labels"].shape == (2, 5), "classes are no tokens"


def test_a_batch_of_no_texts_has_the_length_of_the_samples() -> None:
    assert size({"pixels": torch.zeros(3, 2, 2)}, 99) == (3, 99)


def test_logits_and_activations_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 10 million weights with 50,000 words: 32 texts of 1,024 tokens have logits of 6.7 GB, four times."""
    config = transformers.GPT2Config(vocab_size=50_000, n_embd=192, n_layer=2, n_head=4)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    needed = activation_bytes(model, task(CausalLM), 1024)
    assert needed > 4 * 50_000 * 4
    assert activation_bytes(model, task(CausalLM), 2048) > needed, "attention"
    monkeypatch.setattr(dry_step_part, "free_bytes", lambda: 4 * 10**9)
    tokens = max_tokens(model, task(CausalLM), 1024)
    assert 1024 < tokens < 2 * 10**9 / (4 * 50_000 * 4), "a sample or two, not 32"
    monkeypatch.setattr(dry_step_part, "free_bytes", lambda: 10**8)
    assert max_tokens(model, task(CausalLM), 1024) < 0


def test_a_classifier_has_no_logits_of_words() -> None:
    config = transformers.BertConfig(vocab_size=50_000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    assert activation_bytes(model, task(SequenceClassification), 16) < 50_000 * 4


def test_the_time_is_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_step_part, "free_bytes", lambda: 10**12)
    assert max_tokens(torch.nn.Linear(1000, 1000, bias=False, device="meta"), task(CausalLM), 1) == 71_428
