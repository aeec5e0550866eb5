"""One form of a built model: memory, flags and their fingerprint; what they should be, transformers says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer, train_bpe
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.models.canonical import (
    ALIGNMENT,
    align_memory,
    describe_layout,
    layout_differences,
    layout_fingerprint,
)
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.support.groups.worker_group import StopAt, digests, losses, run_group

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
#: Types whose `from_pretrained` and `from_config` differ in transformers: unaligned memory, or frozen positions lost.
KINDS = {
    "electra": ("SequenceClassification", {**TINY, "embedding_size": 16}),
    "modernbert": ("SequenceClassification", {**TINY, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}),
    "roformer": ("MaskedLM", {**TINY, "embedding_size": 32}),
    "pegasus": ("Seq2SeqLM", BART),
    "gpt_oss": ("CausalLM", {**TINY, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}),
    "gpt2": ("CausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["the same text"]), 300)


@pytest.fixture(scope="module", params=KINDS)
def pretrained(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: Any) -> tuple[str, Path]:
    head, given = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **given)
    getattr(transformers, f"AutoModelFor{head}").from_config(config).save_pretrained(folder)
    tokenizer.inner.save_pretrained(folder)
    return request.param, folder


def build(kind: str, folder: Path, tokenizer: Tokenizer, *, fresh: bool) -> nn.Module:
    task: Any = type("Head", (CausalLM,), {"auto_class": f"AutoModelFor{KINDS[kind][0]}"})
    settings = ModelSettings.model_validate({"path": str(folder)})
    return build_model(settings, task(DataSettings(train="-"), tokenizer, {}), tokenizer, 7, fresh=fresh)[0]


def test_a_start_and_a_resume_build_one_model(pretrained: tuple[str, Path], tokenizer: Tokenizer) -> None:
    kind, folder = pretrained
    first, again = (build(kind, folder, tokenizer, fresh=fresh) for fresh in (True, False))
    theirs = getattr(transformers, f"AutoModelFor{KINDS[kind][0]}").from_config(
        transformers.AutoConfig.from_pretrained(folder)
    )
    flags = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    for model in (first, again):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        for tensor in (*model.parameters(), *model.buffers()):
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % ALIGNMENT == 0
    layout = describe_layout(first)
    assert layout == describe_layout(again)
    assert not layout_differences(layout, layout_fingerprint(describe_layout(again)))


def test_weights_are_those_of_the_files(pretrained: tuple[str, Path], tokenizer: Tokenizer) -> None:
    kind, folder = pretrained
    ours = build(kind, folder, tokenizer, fresh=True).state_dict()
    theirs = getattr(transformers, f"AutoModelFor{KINDS[kind][0]}").from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("pretrained", "added", "tied"),
    [
        ("gpt2", "lm_head.weight", "transformer.wte.weight and lm_head.weight"),
        ("pegasus", "model.encoder.embed_tokens.weight", "model.shared.weight and model.encoder.embed_tokens.weight"),
    ],
    indirect=["pretrained"],
)
def test_files_with_two_values_for_tied_weights(
    pretrained: tuple[str, Path], added: str, tied: str, tokenizer: Tokenizer
) -> None:
    """transformers then leaves them untied, and a resume would construct a model that ties them."""
    kind, folder = pretrained
    file = folder / "model.safetensors"
    weights, before = load_file(file), file.read_bytes()
    [table] = [tensor for name, tensor in weights.items() if name.endswith(("wte.weight", "shared.weight"))]
    try:
        save_file({**weights, added: table.clone()}, file, metadata={"format": "pt"})
        build(kind, folder, tokenizer, fresh=True)
        save_file({**weights, added: table + 1}, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=f"hold two values for the tied weights {tied}"):
            build(kind, folder, tokenizer, fresh=True)
    finally:
        file.write_bytes(before)


class Odd(nn.Module):
    """Memory of every kind: unaligned, transposed, tied, overlapping, expanded, empty."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.arange(100.0)
        self.unaligned = nn.Parameter(memory[1:13].view(3, 4))
        self.tied = self.unaligned
        self.same_memory = nn.Parameter(memory[1:13].view(3, 4))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.row = nn.Parameter(torch.arange(4.0).view(4, 1).t())  # contiguous, with strides (1, 1)
        self.dropout = nn.Dropout(0.1)
        self.whole = nn.Parameter(memory[50:70])
        self.part = nn.Parameter(memory[55:60])
        self.expanded: torch.Tensor
        self.register_buffer("expanded", torch.arange(5.0).expand(3, 5), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))


def test_odd_memory() -> None:
    model = Odd()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    align_memory(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in ("unaligned", "turned", "expanded", "row"):
        tensor = getattr(model, name)
        assert tensor.stride() == torch.empty(tensor.shape).stride()
        assert tensor.data_ptr() % ALIGNMENT == 0
    assert model.tied is model.unaligned
    assert model.same_memory.data_ptr() == model.unaligned.data_ptr()
    with torch.no_grad():
        model.whole[5] = -1
    assert model.part[0] == -1, "what overlaps in part still does"


def frozen(model: Odd) -> None:
    model.part.requires_grad_(False)


def untied(model: Odd) -> None:
    model.same_memory = nn.Parameter(model.unaligned.detach().clone())


def other_table(model: Odd) -> None:
    model.expanded.add_(1)


def reordered(model: Odd) -> None:
    model._parameters["whole"] = model._parameters.pop("whole")


def other_probability(model: Odd) -> None:
    model.dropout.p = 0.2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (frozen, "part is float32, [5], strides (1,), not trained"),
        (untied, "same_memory is "),
        (other_table, "expanded is "),
        (reordered, "parameters is in the order "),
        (other_probability, "p of Dropout is 0.2, "),
    ],
)
def test_a_difference_is_named(change: Callable[[Odd], None], named: str) -> None:
    model, changed = Odd(), Odd()
    align_memory(model)
    align_memory(changed)
    fingerprint = layout_fingerprint(describe_layout(model))
    assert not layout_differences(describe_layout(changed), fingerprint)
    change(changed)
    found = layout_differences(describe_layout(changed), fingerprint)
    assert len(found) == 1
    assert found[0].startswith(named)


def test_an_own_attribute_may_differ() -> None:
    """Such as the directory of the code, which Ray unpacks anew at each start."""
    model = Odd()
    fingerprint = layout_fingerprint(describe_layout(model))
    model.root = "/somewhere/else"  # type: ignore[assignment]
    assert not layout_differences(describe_layout(model), fingerprint)


def test_what_is_gone_is_counted() -> None:
    model = Odd()
    fingerprint = layout_fingerprint(describe_layout(model))
    del model.empty
    assert layout_differences(describe_layout(model), fingerprint) == ["1 tensors or attributes are gone"]


OWN_MODEL = """
import os

from transformers import GPT2LMHeadModel


class Changing(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.wpe.requires_grad_("FREEZE_POSITIONS" not in os.environ)
"""


OWN_TABLES = """
import os

import torch
from transformers import GPT2LMHeadModel


class Tables(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.wpe.requires_grad_(False)
        tables = {"DEFAULT": 1.0}
        value = tables.get(torch.backends.cpu.get_cpu_capability(), 2.0)
        self.register_buffer("table", torch.full((3,), value), persistent=False)
        self.extra = torch.nn.Linear(4, 4)  # which the pretrained files lack
        self.register_buffer("noise", torch.randn(3), persistent=False)
        self.process = os.getpid()
"""


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tables.py").write_text(OWN_TABLES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_class_of_the_user_keeps_its_frozen_weights(
    own_tables: None, assign: Callable[..., Assignment], storage: LocalStorage, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`from_pretrained` loses the flag that the constructor sets."""
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.inner.save_pretrained(tmp_path / "base")
    own = {"class": "own_tables:Tables", "path": str(tmp_path / "base"), "config": None, "tokenizer": None}
    name = "frozen-tables"
    assert run_group(assign(name, sections={"model": own}), storage, 1, StopAt(4))[0].outcome is Outcome.STOPPED
    before = digests(storage, name)
    [ended] = run_group(assign(name, sections={"model": own}, launch="second"), storage, 1)
    assert ended.outcome is Outcome.DONE, ended.error
    after = digests(storage, name)
    assert before["transformer.wpe.weight"] == after["transformer.wpe.weight"]
    assert before["transformer.wte.weight"] != after["transformer.wte.weight"]


def test_another_processor_may_compute_other_tables(
    own_tables: None, assign: Callable[..., Assignment], storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of another type takes over: recorded, not refused. A rank that is not rank 0 may be one at any time."""
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    sections = {"model": {"class": "own_tables:Tables", "config": config}}
    assert run_group(assign("moved", sections=sections), storage, 1, StopAt(4))[0].outcome is Outcome.STOPPED
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    [ended] = run_group(assign("moved", sections=sections, launch="second"), storage, 1)
    assert ended.outcome is Outcome.DONE, ended.error


def test_a_resume_of_a_model_that_is_built_otherwise_is_refused(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changing_model.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    sections = {"model": {"class": "changing_model:Changing", "config": config}}
    changing = assign("changing", sections=sections)
    [ended] = run_group(changing, storage, 1, StopAt(4))
    assert ended.outcome is Outcome.STOPPED
    monkeypatch.setenv("FREEZE_POSITIONS", "1")
    [ended] = run_group(assign("changing", sections=sections, launch="second"), storage, 1)
    assert isinstance(ended.error, ConfigError)
    assert "the model differs from the one that run 'changing' was started with" in ended.error.message
    assert "transformer.wpe.weight is float32, [64, 32], strides (32, 1), not trained" in ended.error.message
    monkeypatch.delenv("FREEZE_POSITIONS")
    [ended] = run_group(assign("changing", sections=sections, launch="third"), storage, 1)
    assert ended.outcome is Outcome.DONE


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("pretrained", ["gpt_oss", "gpt2"], indirect=True)
def test_a_pretrained_model_resumes_to_the_same_bits(
    micro_batch: int, pretrained: tuple[str, Path], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    kind, folder = pretrained
    sections = {"model": {"path": str(folder), "config": None, "tokenizer": None}}
    train = {"batch": 8, "micro_batch": micro_batch}
    name = f"{kind}-{micro_batch}"
    assert run_group(assign(name, sections=sections, **train), storage, 2)[0].outcome is Outcome.DONE
    assert (
        run_group(assign(f"{name}-again", sections=sections, **train), storage, 2, StopAt(4))[0].outcome
        is Outcome.STOPPED
    )
    again = assign(f"{name}-again", sections=sections, launch="second", **train)
    assert run_group(again, storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, f"{name}-again") == digests(storage, name)
    assert losses(storage, f"{name}-again") == losses(storage, name)
