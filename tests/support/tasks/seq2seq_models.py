"""A tiny model of each architecture that reads a text and writes one."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

PAD, START, END, VOCABULARY = 1, 3, 2, 90

_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODES = {"is_decoder": True, "add_cross_attention": True}
_GEMMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY}
_GEMMA |= {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
_PROPHETNET = {"layers": 1, "attention_heads": 2}
_SEAMLESS = {**_BART, "hidden_size": 16, "speech_encoder_layers": 1, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1}
#: A tiny configuration of each architecture that reads and writes text.
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "pegasus"), _BART),
    **dict.fromkeys(("pegasus_x", "plbart"), _BART),
    "bigbird_pegasus": {**_BART, "attention_type": "original_full"},
    "encoder-decoder": {
        "encoder": {"model_type": "bert", "vocab_size": VOCABULARY, **_BERT},
        "decoder": {"model_type": "bert", "vocab_size": VOCABULARY, **_BERT, **DECODES},
    },
    "fsmt": {**_BART, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    "led": {
        **_BART,
        "attention_window": 8,
        "max_encoder_position_embeddings": 32,
        "max_decoder_position_embeddings": 32,
    },
    "nllb-moe": {**_BART, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _T5),
    "switch_transformers": {**_T5, "num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "prophetnet": {
        "hidden_size": 16,
        **{f"num_{part}_{what}": size for part in ("encoder", "decoder") for what, size in _PROPHETNET.items()},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        "eps": 0.1,
    },
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), _SEAMLESS),
    "t5gemma": {"encoder": _GEMMA, "decoder": {**_GEMMA, "cross_attention_hidden_size": 16}},
    "t5gemma2": {
        "encoder": {
            "text_config": _GEMMA,
            "vision_config": {**_BERT, "image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
        },
        "decoder": _GEMMA,
    },
}
_OF_PARTS = {"t5gemma", "t5gemma2", "encoder-decoder"}  # which have the vocabulary


def tiny(model_type: str, **more: Any) -> Any:
    """The configuration of a type, with special tokens."""
    given = dict(CONFIGS[model_type])
    if model_type not in _OF_PARTS:
        given["vocab_size"] = VOCABULARY
    special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": START}
    return transformers.AutoConfig.for_model(model_type, **{**special, **given, **more})


def build(config: Any) -> Any:
    """A model with random weights that are always the same."""
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()
