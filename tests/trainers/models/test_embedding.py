"""Embeddings against tokenizers: tokens that are added get rows as transformers makes them, at a start and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.model_checks import check_model
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer, train_bpe
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.models.canonical import describe_layout
from outlast.trainers.models.model_config import read_config
from outlast.trainers.preparation.prepare import data_fingerprint
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.support.groups.worker_group import StopAt, digests, losses, run_group
from tests.trainers.models.test_lora import directory, make_base

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("CausalLM", {**TINY, "num_key_value_heads": 2}),
    "llama-tied": ("CausalLM", {**TINY, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": ("CausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("CausalLM", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": ("MaskedLM", TINY),
    "roberta": ("SequenceClassification", TINY),
    "electra": ("TokenClassification", {**TINY, "embedding_size": 16}),
    "t5": ("Seq2SeqLM", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}),
    "bart": ("Seq2SeqLM", BART),
}
TOKENS = ["<|one|>", "<|two|>", "<|three|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["the same text"]), 300)


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_those_of_transformers(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    head, given = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind.split("-")[0], vocab_size=len(tokenizer), pad_token_id=0, **given)
    builder = getattr(transformers, f"AutoModelFor{head}")
    builder.from_config(config).save_pretrained(tmp_path)
    tokenizer.inner.save_pretrained(tmp_path)
    longer = Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    longer.inner.add_tokens(TOKENS)
    task: Any = type("Head", (CausalLM,), {"auto_class": f"AutoModelFor{head}"})(DataSettings(train="-"), longer, {})
    settings = ModelSettings(path=str(tmp_path), resize=True)
    first, again = (cast(Any, build_model(settings, task, longer, 7, fresh=fresh)[0]) for fresh in (True, False))
    theirs = builder.from_pretrained(tmp_path, dtype=torch.float32)
    seed_everything(7)
    theirs.resize_token_embeddings(len(longer))
    expected = theirs.state_dict()
    assert first.state_dict().keys() == expected.keys()
    assert all(torch.equal(item, expected[name]) for name, item in first.state_dict().items())
    assert describe_layout(first) == describe_layout(again)
    assert first.config.vocab_size == again.config.vocab_size == len(tokenizer) + 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), text_file)


@pytest.fixture
def add(assign: Callable[..., Assignment], base: Path) -> Callable[..., Assignment]:
    def make(name: str, model: dict[str, Any], **options: Any) -> Assignment:
        body = {"path": str(base), "config": None, "tokenizer": None, **model}
        return assign(name, sections={"model": body}, **options)

    return make


def test_a_run_with_added_tokens_resumes(add: Callable[..., Assignment], storage: LocalStorage, base: Path) -> None:
    model = {"add_tokens": ["return", "<|new|>"]}  # the first is in the text
    plain, whole, parts = add("tokens-none", {}), add("tokens-whole", model), add("tokens-parts", model)
    fingerprints = {data_fingerprint(item.config) for item in (plain, whole, add("x", {"add_tokens": ["return"]}))}
    assert len(fingerprints) == 3, "the tokens change the samples"
    assert run_group(whole, storage, 1)[0].outcome is Outcome.DONE
    assert run_group(parts, storage, 1, StopAt(4))[0].outcome is Outcome.STOPPED
    assert run_group(add("tokens-parts", model, launch="second"), storage, 1)[0].outcome is Outcome.DONE
    assert digests(storage, "tokens-parts") == digests(storage, "tokens-whole")
    assert losses(storage, "tokens-parts") == losses(storage, "tokens-whole")
    folder = directory(storage, "tokens-whole")
    published: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert published.config.vocab_size == published.get_input_embeddings().weight.shape[0] == len(tokenizer) == 402
    theirs = AutoTokenizer.from_pretrained(base)
    theirs.add_tokens(model["add_tokens"])
    assert tokenizer("a return of it")["input_ids"] == theirs("a return of it")["input_ids"]
    assert 400 in tokenizer("a return of it")["input_ids"]
    samples = whole.prepared.split(storage, "train").take(range(whole.prepared.num_samples))
    assert 400 in {number for sample in samples for number in sample["input_ids"].tolist()}
    checked: Any = check_model(whole.config, whole.prepared, storage)[0]
    assert checked.config.vocab_size == 402


def test_entries_of_the_configuration_are_replaced(
    add: Callable[..., Assignment], storage: LocalStorage, base: Path
) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = {"overrides": {"attention_dropout": 0.1, "rope_parameters": rope}}
    assert run_group(add("overrides", model), storage, 1, StopAt(4))[0].outcome is Outcome.STOPPED
    assert run_group(add("overrides", model, launch="second"), storage, 1)[0].outcome is Outcome.DONE
    published = AutoModelForCausalLM.from_pretrained(directory(storage, "overrides"))
    theirs = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.1, rope_parameters=rope)
    assert published.config.attention_dropout == 0.1
    assert published.config.rope_parameters == theirs.config.rope_parameters
    theirs.load_state_dict(published.state_dict())
    ids = torch.arange(12)[None] + 5
    assert torch.equal(published.eval()(ids).logits, theirs.eval()(ids).logits)
    [ended] = run_group(add("overrides", {"overrides": {"attention_dropout": 0.2}}, launch="third"), storage, 1)
    assert "model.overrides.attention_dropout was 0.1, is 0.2" in str(ended.error)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("atention_dropout", "has no such entry; did you mean 'attention_dropout'?"),
        ("model_type", "has no such entry"),
        ("id2label", "has no effect: the task sets it by the data"),
        ("num_labels", "has no effect: the task sets it by the data"),
        ("problem_type", "has no effect: the task sets it by the data"),
        ("hidden_size", "hold weights of LlamaForCausalLM in other sizes"),
    ],
)
def test_entries_that_cannot_be_replaced(
    key: str, message: str, add: Callable[..., Assignment], storage: LocalStorage
) -> None:
    [ended] = run_group(add("no-overrides", {"overrides": {key: 64}}), storage, 1)
    assert message in str(ended.error)
    assert not storage.path("no-overrides/model").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7000.0},
        {"rope_theta": 7000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_the_base_of_rotary_positions_is_that_of_the_files(
    changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As if the entries were replaced in a config.json of the form that most models have."""
    scaling = {"rope_type": "linear", "factor": 3.0}
    transformers.LlamaConfig(vocab_size=300, **TINY).save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_bytes())
    del body["rope_parameters"]
    body |= {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(body))
    made = read_config(transformers.AutoConfig, ModelSettings(path=str(tmp_path), overrides=changes))
    expected = {**body, **changes}
    if "rope_parameters" in changes:
        del expected["rope_scaling"]
    assert made.rope_parameters == transformers.LlamaConfig.from_dict(expected).rope_parameters
    assert made.rope_parameters["rope_theta"] in (500000.0, 7000.0, 9000.0)


def test_generation_stops_at_the_tokenizer_s_end_token_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=300, eos_token_id=7, **TINY)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.inner.save_pretrained(tmp_path)
    task = CausalLM(DataSettings(train="-"), tokenizer, {})
    model: Any = build_model(ModelSettings(path=str(tmp_path)), task, tokenizer, 7, fresh=True)[0]
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    transformers.trainer_utils.align_special_tokens(theirs, tokenizer.inner)
    assert model.generation_config.eos_token_id == theirs.generation_config.eos_token_id == [0, 7]
    assert model.config.eos_token_id == 7
