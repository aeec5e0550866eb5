"""Names of weights in files: those of plain `save_pretrained`, and a run keeps those that it began with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.state.named_weights import ALL, named_weights
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer, train_bpe
from outlast.trainers.models.build import build_model, weight_naming
from outlast.trainers.models.weight_names import file_naming
from outlast.trainers.tasks.base import find_task
from tests.support.tasks.seq2seq_models import build, tiny

_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 8}
#: Tied weights kept by the first or by the last of their names, experts that are one tensor, and renamed weights.
MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("XLMRobertaForMaskedLM", "CamembertForMaskedLM", "RobertaForMaskedLM", "BertForMaskedLM"), _BERT),
    "LukeForMaskedLM": {**_BERT, "entity_vocab_size": 9, "entity_emb_size": 8},
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60},
    "GPTNeoXForCausalLM": _BERT,
    "MixtralForCausalLM": {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
    "LlamaForCausalLM": {**_LLAMA, "tie_word_embeddings": True},
}
TIED_OTHERWISE = ("XLMRobertaForMaskedLM", "CamembertForMaskedLM", "LukeForMaskedLM")


def make(name: str) -> Any:
    torch.manual_seed(1)
    if name == "MarianMTModel":
        return build(tiny("marian"))
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**MODELS[name]))


def saved_by_transformers(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", [*MODELS, "MarianMTModel"])
def test_names_and_values_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    model = make(name)
    ours = named_weights(model, file_naming(model))
    theirs = saved_by_transformers(model, tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", [*TIED_OTHERWISE, "MarianMTModel"])
def test_a_run_keeps_the_names_of_its_older_checkpoints(name: str, storage: LocalStorage) -> None:
    """outlast 0.1.0 kept the first name of a tied weight, and saved all weights."""
    first, run = make(name), f"names-{name.lower()}"
    old, new = named_weights(first, ALL), named_weights(first, file_naming(first))
    assert old.keys() != new.keys()
    optimizer = torch.optim.AdamW(first.parameters())
    Checkpointer(storage, run, naming=ALL).save(1, first, optimizer, {})
    second = make(name)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    checkpointer = Checkpointer(storage, run, naming=file_naming(second))
    resumed_with = torch.optim.AdamW(second.parameters())
    assert checkpointer.resume(second, resumed_with) == {}
    assert all(torch.equal(tensor, old[key]) for key, tensor in named_weights(second, ALL).items())
    checkpointer.save(2, second, resumed_with, {})
    [written] = Path(storage.path(run)).glob("attempts/*/checkpoint-2/model.safetensors")
    assert load_file(written).keys() == old.keys()


# -- weights that no file holds ----------------------------------------------------------------------------------------

POSITIONS = ["model.decoder.embed_positions.weight", "model.encoder.embed_positions.weight"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["the cat sat on the mat"]), 270)


def built(path: Path, tokenizer: Tokenizer, *, fresh: bool) -> Any:
    task = find_task("seq2seq-lm")(DataSettings(train="none"), tokenizer, {})
    return build_model(ModelSettings(path=str(path), task="seq2seq-lm"), task, tokenizer, 7, fresh=fresh)[0]


def test_positions_are_computed_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build(tiny("marian", vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    first, resumed = built(tmp_path, tokenizer, fresh=True), built(tmp_path, tokenizer, fresh=False)
    for model in (first, resumed):
        names = named_weights(model, weight_naming(model)).keys()
        assert names == load_file(tmp_path / "model.safetensors").keys()
    for name in POSITIONS:
        assert torch.equal(resumed.get_parameter(name), first.get_parameter(name))
        assert not first.get_parameter(name).requires_grad


def test_positions_of_a_pretrained_file_are_kept(tmp_path: Path, tokenizer: Tokenizer, storage: LocalStorage) -> None:
    """A resume could not compute other positions than the constructor's, so checkpoints hold them."""
    model = build(tiny("marian", vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path)
    weights = {
        **load_file(tmp_path / "model.safetensors"),
        **{name: model.get_parameter(name) + 1 for name in POSITIONS},
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    first = built(tmp_path, tokenizer, fresh=True)
    expected = copy.deepcopy(named_weights(first, ALL))
    checkpointer = Checkpointer(storage, "marian-positions", naming=weight_naming(first))
    checkpointer.save(1, first, None, {})
    resumed = built(tmp_path, tokenizer, fresh=False)
    assert not torch.equal(resumed.get_parameter(POSITIONS[0]), first.get_parameter(POSITIONS[0]))
    again = Checkpointer(storage, "marian-positions", naming=weight_naming(resumed))
    assert again.resume(resumed) == {}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in named_weights(resumed, ALL).items())
