"""Classifiers of texts: the loss of a batch is that of each text alone in plain transformers, whatever pads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer, load_tokenizer
from outlast.trainers.models.build import build_model, model_class
from outlast.trainers.tasks.base import Task, find_task
from outlast.trainers.tasks.classification import SequenceClassification
from tests.support.architectures.configurations import tiny_config

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
WORDS = [*SPECIAL, *(f"w{number}" for number in range(40))]
#: One ends with the unknown token, which some configurations call padding; lengths differ.
TEXTS = ["w1 w2 w3", "w4", " ".join(f"w{number}" for number in range(5, 17)), "w17 w5 w5 <unk>", "w3 w5"]
FACTS = {"problem": "single-label", "classes": ["a", "b"]}
CASES = Path(__file__).parents[4] / "shared/cases/data"


def words_tokenizer(ends: bool = True, **names: Any) -> Any:
    inner = Backend(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = ("<s> $A </s>", "<s> $A </s> $B </s>") if ends else ("<s> $A", "<s> $A $B")
    inner.post_processor = processors.TemplateProcessing(single, pair, [("<s>", 1), ("</s>", 2)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **special, **names)


def classifier(model_type: str, tokenizer: Any, pad: int | None, facts: dict[str, Any] = FACTS) -> tuple[Task, Any]:
    task = find_task("sequence-classification")(DataSettings(train="-", max_length=40), Tokenizer(tokenizer), facts)
    given = {**tiny_config(model_type), **({"decoder_start_token_id": 0} if model_type == "t5" else {})}
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part.pad_token_id, part.bos_token_id, part.eos_token_id = pad, 1, 2
    task.configure(config)
    torch.manual_seed(0)
    model = model_class(task, config).from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    return task, model


def together(task: Task, model: Any, texts: list[str]) -> torch.Tensor:
    logits: torch.Tensor = task.forward(
        model, task.collate([*task.encode([{"text": t} for t in texts])], [0] * len(texts))
    ).logits
    return logits


AT_LAST = [
    "llama",
    "qwen2",
    "gpt2",
    "gptj",
    "gpt_neox",
    "openai-gpt",
    "ctrl",
    "falcon",
    "bloom",
    "mpt",
    "opt",
    "gemma3",
]
AT_END = ["bart", "t5", "mvp", "bigbird_pegasus", "umt5"]
AT_FIRST = ["bert", "roberta", "distilbert"]


@pytest.mark.parametrize(
    ("pad", "tokens"),
    [
        pytest.param(0, {}, id="the unknown token, and the tokenizer has none"),
        pytest.param(2, {}, id="the end token"),
        pytest.param(None, {}, id="none"),
        pytest.param(-1, {}, id="no token"),
        pytest.param(10, {"pad_token": "<pad>"}, id="a word of the texts"),
        pytest.param(3, {"pad_token": "<pad>", "padding_side": "left"}, id="on the left"),
    ],
)
@pytest.mark.parametrize("model_type", [*AT_LAST, *AT_END, *AT_FIRST])
@torch.no_grad()
def test_each_text_is_classified_as_alone(model_type: str, pad: int | None, tokens: dict[str, Any]) -> None:
    tokenizer = words_tokenizer(**tokens)
    task, model = classifier(model_type, tokenizer, pad)
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    assert (alone[0] - alone[1:]).abs().max() > 1e-4, "the texts differ"
    torch.testing.assert_close(together(task, model, TEXTS), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together(task, model, TEXTS[:2]), alone[:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["t5gemma", "t5gemma2"])
@torch.no_grad()
def test_t5gemma_reads_the_last_token_of_the_longest_text_too(model_type: str) -> None:
    """In plain transformers a text without padding after it is classified from the token before its last."""
    tokenizer = words_tokenizer(pad_token="<pad>")
    task, model = classifier(model_type, tokenizer, 0)
    texts, longest = TEXTS[:3], 15
    padded = [[*tokenizer(text)["input_ids"]] for text in texts]
    ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in padded])
    plain = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(together(task, model, texts), plain, atol=1e-5, rtol=1e-4)
    alone = torch.cat([together(task, model, [text]) for text in texts])
    torch.testing.assert_close(alone, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["mbart", "plbart"])
def test_models_that_find_the_end_by_padding_are_refused_with_the_end_token_as_padding(model_type: str) -> None:
    with pytest.raises(ConfigError, match="pad_token_id is eos_token_id"):
        classifier(model_type, words_tokenizer(), 2)


def test_models_that_classify_at_the_end_token() -> None:
    facts = {**FACTS, **SequenceClassification.model_facts({"model_type": "bart"})}
    task, model = classifier("bart", words_tokenizer(), 3, facts)
    fault = task.fault({"text": "w1 </s> w2", "label": "a"})
    assert fault == "its text contains '</s>', the token that the model classifies from"
    assert task.fault({"text": "w1 w2", "label": "a"}) is None
    long = " ".join(["w7"] * 100)
    [sample] = task.encode([{"text": long}])
    assert (len(sample["input_ids"]), sample["input_ids"][-1]) == (40, 2), "truncation keeps the end token"
    assert together(task, model, [long, "w1"]).isfinite().all()
    endless, _ = classifier("bart", words_tokenizer(ends=False), 3, facts)
    with pytest.raises(ConfigError, match="classifies from the end token of a text, and its tokenizer adds none"):
        list(endless.encode([{"text": "w1"}]))


def saved_classifier(folder: Path) -> Path:
    """A Llama whose config.json has another padding token than its tokenizer uses, which has none of its own."""
    tokenizer = words_tokenizer(ends=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, **sizes, **labels)
    model = transformers.LlamaForSequenceClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
        model.score.weight.mul_(30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_batch_of_twelve_has_the_loss_of_each_text_alone(tmp_path: Path) -> None:
    path = saved_classifier(tmp_path)
    rows = [{"text": " ".join(["w9 w8"] * (1 + 5 * n % 12)), "label": "ab"[n % 2]} for n in range(12)]
    if (CASES / "len.jsonl").exists():
        rows += [json.loads(line) for line in (CASES / "len.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(str(path))
    task = find_task("sequence-classification")(DataSettings(train="-", max_length=128), tokenizer, FACTS)
    model, _ = build_model(
        ModelSettings(path=str(path), task="sequence-classification"), task, tokenizer, 0, fresh=True
    )
    model.eval()
    batch = task.collate([*task.encode(rows)], [0] * len(rows))
    plain = transformers.LlamaForSequenceClassification.from_pretrained(path).eval()
    inner = transformers.AutoTokenizer.from_pretrained(path)
    expected = 0.0
    for row in rows:
        labels = torch.tensor([plain.config.label2id[row["label"]]])
        expected += plain(**inner(row["text"], return_tensors="pt"), labels=labels).loss.item()
    assert task.loss_sum(model, batch).item() == pytest.approx(expected, abs=1e-5 * len(rows), rel=1e-5)
