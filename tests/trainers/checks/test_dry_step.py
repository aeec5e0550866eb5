"""The dry step: it finds before the workers start what else only the first step shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks import dry_step as dry_step_module
from outlast.trainers.checks import dry_step_part
from outlast.trainers.checks.dry_step import DryStep, dry_step, graph_may_vary
from outlast.trainers.checks.model_checks import check_model
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models import build
from tests.support.groups.worker_group import StopAt, digests, losses, run_group

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
XLNET = {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "attn_type": "uni"}
FLAUBERT = {"model_type": "flaubert", "emb_dim": 32, "n_layers": 2, "n_heads": 4, "layerdrop": 0.5}
SWITCH = {"model_type": "switch_transformers", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SWITCH |= {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
TRANSLATION = {"source": {"column": "text"}, "target": {"column": "text"}}


def model(config: Mapping[str, Any], task: str = "causal-lm") -> dict[str, Any]:
    return {"model": {"config": dict(config), "task": task}}


def dry(assignment: Assignment, storage: LocalStorage, *, on_gpu: bool = False) -> DryStep:
    meta = check_model(assignment.config, assignment.prepared, storage)[0]
    return dry_step(assignment.config, assignment.prepared, storage, meta, num_workers=2, on_gpu=on_gpu)


def test_a_plain_model_has_a_static_graph(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    assert dry(assign("dry-plain"), storage) == DryStep(static_graph=True)


def test_unused_parameters_are_named(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    found = dry(assign("xlnet", sections=model(XLNET)), storage)
    assert not found.static_graph
    assert "transformer.mask_emb" in found.unused


def test_layer_drop_makes_the_graph_vary(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    assert not dry(assign("flaubert", sections=model(FLAUBERT, "masked-lm")), storage).static_graph


def test_layer_drop_of_a_part_of_a_model() -> None:
    encoder, decoder = transformers.BertConfig(**BERT), transformers.BartConfig(d_model=32, decoder_layerdrop=0.5)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with torch.device("meta"):
        assert graph_may_vary(transformers.EncoderDecoderModel(config))
        config.decoder.decoder_layerdrop = 0.0
        assert not graph_may_vary(transformers.EncoderDecoderModel(config))


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"model_type": "bert", **BERT}, "is_decoder: true"),
        ({**XLNET, "attn_type": "bi"}, "attn_type: uni"),
        ({"model_type": "xlm", "emb_dim": 32, "n_layers": 2, "n_heads": 4}, "causal: true"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_an_encoder_is_no_causal_model(
    config: dict[str, Any], remedy: str, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    assignment = assign("encoder", sections=model(config))
    with pytest.raises(ConfigError, match="sees the tokens that it predicts") as caught:
        check_model(assignment.config, assignment.prepared, storage)
    assert remedy in str(caught.value.hint)
    key, value = remedy.split(": ")
    config = {**config, key: {"true": True}.get(value, value)}
    assert not dry(assign("encoder", sections=model(config)), storage).skipped


@pytest.mark.parametrize("task", ["causal-lm", "chat"])
def test_a_prediction_that_depends_on_the_predicted_token(
    task: str, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the architecture's configuration says."""
    monkeypatch.setattr(build, "check_decoder", lambda model: None)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    sections = model({"model_type": "bert", **BERT}, task)
    if task == "chat":
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        sections["data"] = {"train": str(rows), "chat_template": template, "max_length": 32}
    with pytest.raises(
        ConfigError, match="BertLMHeadModel sees the tokens that it predicts, so it would only learn to"
    ):
        dry(assign("leak", sections=sections), storage)


def limit_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(dry_step_module, "max_tokens", lambda *_: tokens)


@pytest.mark.parametrize("config", [{}, {"model_type": "flaubert", **FLAUBERT}], ids=["plain", "layerdrop"])
def test_a_model_that_is_too_large_is_not_tried(
    config: dict[str, Any], assign: Callable[..., Assignment], storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its graph counts as static, as in version 0.1.0, unless its configuration says otherwise."""
    monkeypatch.setattr(dry_step_part, "free_bytes", lambda: 2**20)
    found = dry(assign("dry-large", sections=model(config, "masked-lm") if config else {}), storage)
    assert found.skipped.endswith("parameters is too large for this machine")
    assert found.static_graph is not bool(config)


def test_a_model_that_takes_too_long_is_tried_with_shorter_texts(
    assign: Callable[..., Assignment], storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_tokens(monkeypatch, 20)
    seen = set()
    loss = dry_step_module._Trial._loss

    def record(trial: Any, batch: dict[str, torch.Tensor], number: int = 0) -> torch.Tensor:
        seen.add(batch["input_ids"].shape)
        return loss(trial, batch, number)

    monkeypatch.setattr(dry_step_module._Trial, "_loss", record)
    sections = {"data": {"max_length": 32}}
    assert dry(assign("dry-short", sections=sections, micro_batch=4), storage) == DryStep(static_graph=True)
    assert seen == {(1, 16)}


@pytest.fixture
def short_vocabulary(tmp_path: Path) -> str:
    """A pretrained model whose embedding has fewer tokens than its tokenizer."""
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_token_without_an_embedding(
    assign: Callable[..., Assignment], storage: LocalStorage, short_vocabulary: str
) -> None:
    path = {"model": {"path": short_vocabulary, "config": None, "tokenizer": {"train_bpe": 400}}}
    with pytest.raises(ConfigError, match="first micro-batch fails in GPT2LMHeadModel: IndexError: index out of range"):
        dry(assign("short", sections=path), storage)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("adapted", [False, True])
def test_weights_that_are_not_finite(
    value: float, adapted: bool, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    made = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        made.transformer.h[1].ln_1.bias[3] = value
    made.save_pretrained(tmp_path)
    lora = {"r": 2} if adapted else None
    body = {"model": {"path": str(tmp_path), "config": None, "tokenizer": {"train_bpe": 400}, "lora": lora}}
    with pytest.raises(ConfigError, match=r"hold NaN or infinite values in .*transformer\.h\.1\.ln_1\.bias$") as caught:
        dry(assign(f"not-finite-{adapted}", sections=body), storage)
    assert f"model.path {tmp_path}" in caught.value.message


OWN_TASKS = """
import os

from outlast.trainers.tasks.causal_lm import CausalLM


class Detached(CausalLM):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch).detach()


class PerToken(CausalLM):
    def loss(self, outputs, batch):
        return outputs.logits.sum(-1)


class Unseeded(CausalLM):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) * (1 + int.from_bytes(os.urandom(2)) / 1000)


class NeedsGpu(CausalLM):
    def loss(self, outputs, batch):
        raise RuntimeError("this kernel is for CUDA only")


class NoDriver(CausalLM):
    def loss(self, outputs, batch):
        import flash_attn

        return flash_attn.run()


class NoMemory(CausalLM):
    def loss(self, outputs, batch):
        return outputs.logits.new_empty(2**60).sum()


class Pairs(CausalLM):
    def loss(self, outputs, batch):
        first, second = outputs.logits.mean((1, 2))
        return super().loss(outputs, batch) + (first - second) ** 2
"""


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_tasks.py").write_text(OWN_TASKS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("kind", ["Detached", "PerToken"])
def test_a_loss_that_trains_nothing(
    kind: str, assign: Callable[..., Assignment], storage: LocalStorage, own_tasks: None
) -> None:
    with pytest.raises(ConfigError, match=f"odd_tasks:{kind} gives no loss to train on"):
        dry(assign("dry-odd", sections={"model": {"task": f"odd_tasks:{kind}"}}), storage)


def test_a_model_for_gpus_is_left_to_them(
    assign: Callable[..., Assignment], storage: LocalStorage, own_tasks: None
) -> None:
    assignment = assign("gpu", sections={"model": {"task": "odd_tasks:NeedsGpu"}})
    assert dry(assignment, storage, on_gpu=True).skipped.startswith("it needs a GPU: RuntimeError: this kernel is for")
    with pytest.raises(ConfigError, match=r"this kernel is for CUDA only \(.*odd_tasks.py, line 24\)"):
        dry(assignment, storage)


def test_a_kernel_for_gpus_is_known_by_its_package(
    assign: Callable[..., Assignment], storage: LocalStorage, own_tasks: None, tmp_path: Path
) -> None:
    (tmp_path / "flash_attn.py").write_text("def run():\n    raise RuntimeError('0 active ([])')")
    assignment = assign("package", sections={"model": {"task": "odd_tasks:NoDriver"}})
    assert dry(assignment, storage, on_gpu=True).skipped.startswith("it needs a GPU: RuntimeError: 0 active")
    with pytest.raises(ConfigError, match="0 active"):
        dry(assignment, storage)


def test_memory_that_is_not_there(assign: Callable[..., Assignment], storage: LocalStorage, own_tasks: None) -> None:
    assignment = assign("no-memory", sections={"model": {"task": "odd_tasks:NoMemory"}})
    assert dry(assignment, storage).skipped.startswith("this machine has too little memory: RuntimeError")


def test_a_part_of_a_micro_batch_that_fails_proves_nothing(
    assign: Callable[..., Assignment], storage: LocalStorage, own_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss over pairs fails with one sample; with shorter texts, both are there."""
    assignment = assign("pairs", sections={"model": {"task": "odd_tasks:Pairs"}}, micro_batch=2)
    assert not dry(assignment, storage).skipped
    limit_tokens(monkeypatch, 16)
    found = dry(assignment, storage)
    assert found.skipped.startswith("a part of the first micro-batch fails, and all of it is too large: ValueError")
    assert found.static_graph
    limit_tokens(monkeypatch, 40)
    long = assign("pairs", sections={"model": {"task": "odd_tasks:Pairs"}, "data": {"max_length": 32}}, micro_batch=2)
    assert not dry(long, storage).skipped


def test_random_numbers_without_a_seed(
    assign: Callable[..., Assignment], storage: LocalStorage, own_tasks: None
) -> None:
    unseeded = {"model": {"task": "odd_tasks:Unseeded"}}
    with pytest.raises(
        ConfigError, match=r"two passes .* with the same seed differ in the loss: GPT2LMHeadModel draws"
    ):
        dry(assign("unseeded", sections=unseeded), storage)
    assert not dry(assign("unseeded-fast", sections={**unseeded, "exactness": "fast"}), storage).unused


OWN_MODEL = """
import torch
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput


class Nested(GPT2LMHeadModel):
    def forward(self, input_ids, attention_mask=None, **others):
        embedded = self.transformer.wte(input_ids)
        hidden = checkpoint(
            lambda given: self.transformer(inputs_embeds=given).last_hidden_state, embedded, use_reentrant=True
        )
        return CausalLMOutput(logits=self.lm_head(hidden))


class NestedWithSpare(Nested):
    def __init__(self, config):
        super().__init__(config)
        self.spare = torch.nn.Parameter(torch.zeros(3))


class Normed(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        torch.nn.utils.parametrizations.spectral_norm(self.transformer.h[0].mlp.c_fc)


class Sparse(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.wpe = torch.nn.Embedding(config.n_positions, config.n_embd, sparse=True)
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nested_models.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def nested(name: str) -> dict[str, Any]:
    return {"class": f"nested_models:{name}", "config": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}}


def test_a_backward_pass_within_the_backward_pass(
    assign: Callable[..., Assignment], storage: LocalStorage, own_models: None
) -> None:
    """Reentrant checkpoints hide parameters from DDP's look through the graph, so that must not be needed."""
    assignment = assign("dry-nested", sections={"model": nested("Nested")})
    assert dry(assignment, storage).static_graph
    ended = run_group(replace(assignment, static_graph=True), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    spare = {"model": nested("NestedWithSpare")}
    with pytest.raises(ConfigError, match="NestedWithSpare runs backward passes within its backward pass, and spare"):
        dry(assign("nested-spare", sections=spare), storage)
    elastic = assign("nested-spare", sections={**spare, "exactness": "elastic"})
    assert dry(elastic, storage).unused == ("spare",)
    assert [item.outcome for item in run_group(elastic, storage, 2)] == [Outcome.DONE] * 2


def test_saved_buffers_that_change_make_no_difference_between_passes(
    assign: Callable[..., Assignment], storage: LocalStorage, own_models: None
) -> None:
    """The vectors of spectral normalization are in every checkpoint."""
    assert not dry(assign("normed", sections={"model": nested("Normed")}), storage).skipped


def test_sparse_gradients_are_refused(
    assign: Callable[..., Assignment], storage: LocalStorage, own_models: None
) -> None:
    with pytest.raises(ConfigError, match=r"transformer.wpe.weight gets a sparse gradient, of which torch computes no"):
        dry(assign("sparse", sections={"model": nested("Sparse")}), storage)


def test_sparse_attention_of_long_batches_is_refused(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    big_bird = {"model_type": "big_bird", **BERT, "block_size": 2, "num_random_blocks": 1}
    with pytest.raises(
        ConfigError, match="changes from block-sparse to full attention at its first batch of 14 tokens"
    ):
        dry(assign("bird", sections=model(big_bird, "masked-lm")), storage)


@pytest.mark.parametrize("exactness", ["same-world", "elastic"])
@pytest.mark.parametrize(
    ("kind", "config", "task"), [("xlnet", XLNET, "causal-lm"), ("flaubert", FLAUBERT, "masked-lm")]
)
def test_unused_parameters_train_to_the_same_bits(
    kind: str,
    config: Mapping[str, Any],
    task: str,
    exactness: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
) -> None:
    """XLNet has a parameter that no batch uses; FlauBERT drops layers at random, so each micro-batch uses others."""
    sections = {**model(config, task), "exactness": exactness}
    name = f"unused-{kind}-{exactness}"
    size = 2 if exactness == "elastic" else 3
    undisturbed = run_group(assign(name, sections=sections), storage, size)
    assert [item.outcome for item in undisturbed] == [Outcome.DONE] * size, undisturbed[0].error
    assert run_group(assign(f"{name}-2", sections=sections), storage, size, StopAt(4))[0].outcome is Outcome.STOPPED
    resumed = run_group(assign(f"{name}-2", sections=sections, launch="b"), storage, 1 if size == 2 else size)
    assert resumed[0].outcome is Outcome.DONE
    assert digests(storage, f"{name}-2") == digests(storage, name)
    assert losses(storage, f"{name}-2") == losses(storage, name)


def test_a_parameter_that_nothing_uses_keeps_its_value(
    assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """As in a plain torch loop: no gradient, so neither moments nor weight decay."""
    sections = model(XLNET)
    assert run_group(assign("dry-kept", sections=sections, weight_decay=0.1), storage, 2)[0].outcome is Outcome.DONE
    begun = run_group(assign("dry-begun", sections=sections, weight_decay=0.1, steps=1), storage, 2)
    assert begun[0].outcome is Outcome.DONE
    kept, after_1 = digests(storage, "dry-kept"), digests(storage, "dry-begun")
    assert kept["transformer.mask_emb"] == after_1["transformer.mask_emb"]
    assert not [name for name in kept if name.startswith("transformer.mask_emb/")], "it has no moments"
    changed = [name for name, digest in kept.items() if after_1.get(name) != digest]
    assert len(changed) > len(kept) // 2
