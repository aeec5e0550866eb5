"""Files of pretrained models against the model: what is lost is refused, and what is loaded is what they hold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.models.pretrained import LoadReport, load_pretrained

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**WIDTHS, "num_key_value_heads": 2},
    "bert": WIDTHS,
    "roberta": WIDTHS,
    "electra": {**WIDTHS, "embedding_size": 16},
    "longformer": {**WIDTHS, "attention_window": 8},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**WIDTHS, "num_key_value_heads": 2, "num_local_experts": 4},
    "t5": T5,
    "umt5": {**T5, "tie_word_embeddings": False},
    "bart": BART,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(kind, class, **config)`: the directory of a model of transformers, with random weights."""

    def make(kind: str, class_name: str, **given: Any) -> Path:
        config = transformers.AutoConfig.for_model(kind, vocab_size=90, **{**KINDS[kind], **given})
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}-{class_name}"
        torch.manual_seed(3)
        builder = getattr(transformers, class_name)
        (builder.from_config(config) if class_name.startswith("Auto") else builder(config)).save_pretrained(folder)
        return folder

    return make


def load(folder: Path, builder: str, **options: Any) -> tuple[Any, LoadReport]:
    config = transformers.AutoConfig.from_pretrained(folder, **options.pop("config", {}))
    return load_pretrained(getattr(transformers, builder), str(folder), config, **options)


def refused(folder: Path, builder: str, **options: Any) -> ConfigError:
    for on_meta in (True, False):
        with pytest.raises(ConfigError) as caught:
            load(folder, builder, on_meta=on_meta, **options)
    return caught.value


def without(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: item for key, item in weights.items() if key != name}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Path:
    """A copy of a directory with other weights."""
    copy = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    weights = change(load_file(copy / "model.safetensors"))
    save_file(dict(weights), copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def wrap_blocks(name: str) -> str:
    return "_fsdp_wrapped_module." + re.sub(r"(layers?\.\d+|h\.\d+)\.", r"\1._fsdp_wrapped_module.", name)


PREFIXES: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "module.model.": lambda name: f"module.model.{name}",
    "_orig_mod.module.": lambda name: f"_orig_mod.module.{name}",
    "_fsdp_wrapped_module.": wrap_blocks,
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
@pytest.mark.parametrize(
    ("kind", "source", "builder"),
    [
        ("llama", "AutoModelForCausalLM", "AutoModelForCausalLM"),
        ("bert", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"),
        ("t5", "AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM"),
        ("mixtral", "AutoModelForCausalLM", "AutoModelForCausalLM"),
        ("gpt2", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"),
    ],
)
def test_prefixes_of_wrappers(prefix: str, form: str, kind: str, source: str, builder: str, write: Write) -> None:
    plain = write(kind, source)
    weights = {PREFIXES[prefix](name): tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    folder = rewrite(plain, lambda _: weights)
    if form != "one file":
        (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    if form == "shards":
        places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
        for file in set(places.values()):
            part = {name: tensor for name, tensor in weights.items() if places[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = getattr(transformers, builder).from_pretrained(plain).state_dict()
    model, report = load(folder, builder)
    assert report == load(folder, builder, on_meta=True)[1]
    for name, tensor in model.state_dict().items():
        assert name in report.new or torch.equal(tensor, theirs[name]), name
    assert not any(name.startswith(("model.layers", "bert.encoder", "encoder", "transformer.h")) for name in report.new)
    noted = any("which is left out" in note for note in report.notes)
    assert noted or prefix == "model.", "transformers itself removes the prefix of the base model of some"


def test_an_unknown_prefix_is_refused(write: Write) -> None:
    folder = rewrite(write("llama", "AutoModelForCausalLM"), lambda old: {f"foo.{key}": old[key] for key in old})
    error = refused(folder, "AutoModelForCausalLM")
    assert "lack model.embed_tokens.weight" in error.message
    assert "(20 weights), which LlamaForCausalLM needs" in error.message
    assert "they have foo.lm_head.weight" in error.message


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_new_head_is_noted_and_lost_weights_are_refused(kind: str, write: Write) -> None:
    """For each head that transformers has on the architecture, from the base model's files."""
    source = write(kind, "AutoModel")
    config = transformers.AutoConfig.from_pretrained(source)
    heads = ["CausalLM", "MaskedLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "MultipleChoice"]
    known = {name: getattr(transformers, f"AutoModelFor{name}") for name in (*heads, "QuestionAnswering")}
    tried = 0
    for name, builder in known.items():
        if type(config) not in builder._model_mapping:
            continue
        if (kind, name) == ("bart", "CausalLM"):  # transformers does not find the shared embedding for it
            assert "lack model.decoder.embed_tokens.weight" in refused(source, f"AutoModelFor{name}").message
            continue
        model, report = load(source, f"AutoModelFor{name}")
        bases = load_file(source / "model.safetensors")
        loaded = {key: item for key, item in model.state_dict().items() if key not in report.new}
        assert (
            sum(any(torch.equal(item, base) for base in bases.values()) for item in loaded.values()) >= len(loaded) - 4
        )
        assert bool(report.new) == any(note.startswith("new, because") for note in report.notes)
        last = sorted(key for key in bases if ".1." in key or ".0." in key)[-1]
        shorn = rewrite(source, partial(without, last))
        if any(last in key for key in model.state_dict()):
            assert last in refused(shorn, f"AutoModelFor{name}").message
            tried += 1
    assert tried


def test_an_encoder_alone_is_no_encoder_decoder(write: Write) -> None:
    folder = write("t5", "T5EncoderModel")
    assert "lack decoder.block.0" in refused(folder, "AutoModelForSeq2SeqLM").message
    load(folder, "AutoModelForTokenClassification")


def test_a_base_model_under_another_name(write: Write) -> None:
    """LlamaForQuestionAnswering calls it `transformer`, its siblings `model`; transformers would load nothing."""
    lm, qa = write("llama", "AutoModelForCausalLM"), write("llama", "AutoModelForQuestionAnswering")
    for folder, builder in ((lm, "AutoModelForQuestionAnswering"), (qa, "AutoModelForSequenceClassification")):
        model, _ = load(folder, builder)
        weights = load_file(folder / "model.safetensors")
        own = model.state_dict()
        norms = [name for name in own if name.endswith("layers.1.self_attn.q_proj.weight")]
        held = [name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight")]
        assert torch.equal(own[norms[0]], weights[held[0]])


def test_a_head_that_the_files_should_have(write: Write) -> None:
    whole = write("llama", "AutoModelForCausalLM", tie_word_embeddings=False)
    folder = rewrite(whole, partial(without, "lm_head.weight"))
    error = refused(folder, "AutoModelForCausalLM")
    assert "lack lm_head.weight, which LlamaForCausalLM needs" in error.message
    assert "model.new_head: true" in error.hint
    assert load(folder, "AutoModelForCausalLM", new_head=True)[1].new == ("lm_head.weight",)
    assert load(folder, "AutoModelForSequenceClassification")[1].new == ("score.weight",)


@pytest.mark.parametrize(
    ("source", "builder", "labels", "sizes"),
    [
        (
            "SequenceClassification",
            "SequenceClassification",
            2,
            "classifier.weight is [3, 32] in the files and [2, 32]",
        ),
        ("SequenceClassification", "SequenceClassification", 1, "classifier.bias is [3] in the files and [1] here"),
        ("TokenClassification", "TokenClassification", 5, "classifier.weight is [3, 32] in the files and [5, 32] here"),
        ("SequenceClassification", "MultipleChoice", 3, "classifier.weight is [3, 32] in the files and [1, 32] here"),
        ("QuestionAnswering", "QuestionAnswering", 2, "qa_outputs.weight is [3, 32] in the files and [2, 32] here"),
    ],
)
def test_a_head_of_another_size(source: str, builder: str, labels: int, sizes: str, write: Write) -> None:
    folder, builder = write("bert", f"BertFor{source}", num_labels=3), f"AutoModelFor{builder}"
    changed = {"config": {"num_labels": labels}}
    error = refused(folder, builder, **changed)
    assert sizes in error.message
    assert "model.new_head: true" in error.hint
    torch.manual_seed(4)
    model, report = load(folder, builder, new_head=True, **changed)
    assert len(report.new) == 2
    assert sizes in " ".join(report.notes)
    torch.manual_seed(4)
    theirs = getattr(transformers, builder).from_pretrained(folder, ignore_mismatched_sizes=True, num_labels=labels)
    assert all(torch.equal(item, theirs.state_dict()[name]) for name, item in model.state_dict().items())


def test_other_weights_of_another_size_are_always_refused(write: Write) -> None:
    folder = write("bert", "AutoModelForMaskedLM")
    error = refused(folder, "AutoModelForMaskedLM", new_head=True, config={"intermediate_size": 64})
    assert "intermediate.dense.weight is [48, 32] in the files and [64, 32] here" in error.message


def test_new_weights_are_those_of_the_constructor_where_transformers_leaves_them_unset(write: Write) -> None:
    """`_init_weights` leaves out Longformer's bias, whose memory then holds whatever was there before."""
    from outlast.trainers.config.data import DataSettings
    from outlast.trainers.config.model import ModelSettings
    from outlast.trainers.data.tokenizer import train_bpe
    from outlast.trainers.models.build import build_model
    from outlast.trainers.tasks.masked_lm import MaskedLM

    folder = write("longformer", "AutoModel", pad_token_id=1)
    tokenizer = train_bpe(iter(["the same text"]), 300, MaskedLM.special_tokens)
    task = MaskedLM(DataSettings(train="-"), tokenizer, {})
    model: Any = build_model(ModelSettings(path=str(folder)), task, tokenizer, 7, fresh=True)[0]
    assert torch.equal(model.lm_head.bias, torch.zeros(90))
    std = model.lm_head.dense.weight.std().item()
    assert std == pytest.approx(model.config.initializer_range, rel=0.2)
