"""Inputs of single architectures: outputs are those of plain transformers, and padding does not change them."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers import DataCollatorWithPadding

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.models.build import model_class
from outlast.trainers.tasks.base import Task, find_task

WORDS = {word: number for number, word in enumerate(["<pad>", "<cls>", "<sep>", "<mask>", "<unk>", *"abcdefghij"])}
FACTS = {"problem": "single-label", "classes": ["no", "yes"], "num_choices": 2}
SIZES: dict[str, dict[str, Any]] = {
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "xlm": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "flaubert": {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "funnel": {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1, 1]},
}


def word_tokenizer(pair: str, single: str, **options: Any) -> Any:
    """Letters are words."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("<cls>", 1), ("<sep>", 2)]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single, pair, special)
    names = {name: f"<{name[:-6]}>" for name in ("pad_token", "cls_token", "sep_token", "mask_token", "unk_token")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names, **options)


def bert_like() -> Any:
    return word_tokenizer("<cls> $A <sep> $B:1 <sep>:1", "<cls> $A <sep>")


def xlnet_like() -> Any:
    """The class token is the last, and has a type of its own; padding is on the left."""
    return word_tokenizer("$A <sep> $B:1 <sep>:1 <cls>:2", "$A <sep> <cls>:2", padding_side="left")


def make(task: str, model_type: str, tokenizer: Any, **settings: Any) -> tuple[Task, Any]:
    made = find_task(task)(DataSettings(train="none", max_length=32), Tokenizer(tokenizer), FACTS)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(WORDS), **SIZES[model_type], **settings)
    made.configure(config)
    torch.manual_seed(0)
    return made, model_class(made, config).from_config(config).eval()


def batch_of(task: Task, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return task.collate([*task.encode(records)], [0] * len(records))


TEXTS = ["a b c d e f", "g h", "i j a b"]


@pytest.mark.parametrize("kind", ["last", "cls_index"])
def test_a_summary_of_the_last_position_is_not_of_padding(kind: str) -> None:
    tokenizer = xlnet_like()
    task, model = make("sequence-classification", "xlnet", tokenizer, summary_type=kind, pad_token_id=0)
    ours = task.forward(model, batch_of(task, [{"text": text} for text in TEXTS])).logits
    for index, text in enumerate(TEXTS):
        alone = model(**tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(ours[index : index + 1], alone, atol=1e-6, rtol=1e-5)


def test_xlnet_classifies_as_with_the_collator_of_transformers() -> None:
    tokenizer = xlnet_like()
    task, model = make("sequence-classification", "xlnet", tokenizer, pad_token_id=0)
    plain = DataCollatorWithPadding(tokenizer)([tokenizer(text) for text in TEXTS])
    assert plain["input_ids"][1, 0] == WORDS["<pad>"]
    assert plain["token_type_ids"].max() == 2
    ours = task.forward(model, batch_of(task, [{"text": text} for text in TEXTS])).logits
    torch.testing.assert_close(ours, model(**plain).logits)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("xlnet", "mean"), ("xlm", "last"), ("xlm", "mean"), ("flaubert", "cls_index")]
)
def test_a_summary_that_reads_padding_is_refused(model_type: str, kind: str) -> None:
    """XLM has absolute positions, so that padding on the left would not do."""
    task, model = make("sequence-classification", model_type, bert_like(), summary_type=kind, pad_token_id=0)
    with pytest.raises(ConfigError, match=f"would read padding: the summary_type of its configuration is '{kind}'"):
        task.forward(model, batch_of(task, [{"text": text} for text in TEXTS]))


def test_the_second_text_of_a_pair_has_no_type_of_its_own_in_roberta() -> None:
    task, model = make("sequence-classification", "roberta", bert_like(), type_vocab_size=1)
    batch = batch_of(task, [{"text": "a b", "text_pair": "c"}])
    assert batch["token_type_ids"].max() == 1
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(task.forward(model, batch).logits, plain)


def test_the_last_token_is_found_where_the_model_calls_another_token_padding() -> None:
    """As GPT-2's `config.json`, which may come from another tokenizer."""
    task, model = make("sequence-classification", "gpt2", bert_like(), pad_token_id=7)
    ours = task.forward(model, batch_of(task, [{"text": text} for text in ("a d e f", "g")])).logits
    for index, text in enumerate(("a d e f", "g")):
        ids = task.tokenizer.inner(text, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(ours[index : index + 1], model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["masked-lm", "sequence-classification", "token-classification", "multiple-choice"])
@pytest.mark.parametrize("text", ["a", "a b c", "a b c d e f g h i j a b"])
def test_funnel_takes_texts_of_any_length(name: str, text: str) -> None:
    """It fails in its own forward on four tokens or less, with three blocks."""
    task, model = make(name, "funnel", bert_like(), pad_token_id=0)
    words = text.split() or ["a"]
    record = {"text": text, "tokens": words, "tags": ["no"] * len(words), "label": "no", "choices": ["a", "b"]}
    batch = batch_of(task, [{**record, "label": 1} if name == "multiple-choice" else record])
    loss = task.loss_sum(model, batch)
    assert loss.isfinite()
    given = {key: value for key, value in batch.items() if key != "labels"}
    if (length := batch["input_ids"].shape[-1]) > 4:
        outputs = model(**given)
        torch.testing.assert_close(task.loss(outputs, batch), loss)
    else:
        with pytest.raises(RuntimeError):
            model(**given)
        longer = {key: torch.nn.functional.pad(value, (0, 5 - length)) for key, value in given.items()}
        labels = {"labels": batch["labels"]}
        if name in ("masked-lm", "token-classification"):
            labels["labels"] = torch.nn.functional.pad(batch["labels"], (0, 5 - length), value=-100)
        torch.testing.assert_close(task.loss(model(**longer), labels), loss)


@pytest.mark.parametrize(("model_type", "setting"), [("xlnet", {"attn_type": "uni"}), ("xlm", {"causal": True})])
def test_a_decoder_does_not_see_what_it_predicts(model_type: str, setting: dict[str, Any]) -> None:
    """`build_model` refuses both without the setting."""
    task, model = make("causal-lm", model_type, bert_like(), **setting)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    other = torch.tensor([[5, 6, 7, 8, 9, 11]])
    first, second = (task.forward(model, {"input_ids": given}).logits for given in (ids, other))
    torch.testing.assert_close(first[:, :-1], second[:, :-1])
