"""Tiny configurations of every text architecture of transformers: rules by the names of settings, and exceptions.

A rule gives a setting of a known name a small value; settings by layer keep one layer of each kind. What the rules do
not get right stands in `EXCEPTIONS`, by model type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

VOCABULARY = 320
POSITIONS = 64
MAX_LAYERS = 4

#: The tables of model classes by model type, by task of outlast.
TABLES: dict[str, Mapping[str, Any]] = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "multiple-choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

#: Patterns of whole names, the first that matches counts. None keeps the default.
RULES: dict[str, int | None] = {
    r"(src_|tgt_|decoder_)?vocab_size|vocab_size_per_layer_input|unpadded_vocab_size": VOCABULARY,
    r"(\w+_)?vocab_size|pretraining_tp|.*chunk_size_(feed_forward|lm_head)": None,
    r"(max|n)_(encoder_|decoder_|source_|target_)?positions?(_embeddings)?|max_position_embeddings": POSITIONS,
    r"max_(encoder|decoder)_position_embeddings|n_ctx|max_seq_len|context_length|model_max_length": POSITIONS,
    r"original_max_position_embeddings|keep_window_size": POSITIONS,
    r"(hidden|embedding|input_embedding|output_embedding|attention_hidden|pooler_hidden|true_hidden)_size": 32,
    r"(d_model|n_embd|dim|embed_dim|embedding_dim|emb_dim|lru_width|word_embed_proj_dim|prediction_head_size)": 32,
    r"(\w*head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_size|mamba_d_head|head_size|rotary_dim)": 8,
    r"qk_head_dim": 16,
    r"\w*(key_value_heads|kv_heads)": 2,
    r"\w*(attention_heads|num_heads|n_heads?|linear_num_(key|value)_heads)": 4,
    r"(num|n)_(hidden_|encoder_|decoder_)?layers?|encoder_layers|decoder_layers|num_layers|num_blocks": 2,
    r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|expert_ffn_hidden_size)|d_inner|d_ff|dff|dim_ff|hidden_dim": 48,
    r"(intermediate_size_mlp|feed_forward_size)": 48,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k": 2,
    r"n_group|topk_group|num_expert_group": 1,
    r"kv_lora_rank|q_lora_rank|o_lora_rank": 16,
    r"\w*_rank": 8,
    r"(mamba_d_state|ssm_state_size|state_size)": 8,
    r"\w*(first_k_dense_replace|num_dense_layers)": 1,
    r"(num_nextn_predict_layers)": 0,
    r"\w*chunk_size": 8,
    r"\w*(sliding_window|sliding_window_size|attention_window|window_size|local_attention)": 8,
    r"max_window_layers": 1,
    r"\w*sparse_step|sliding_window_pattern|no_rope_layer_interval": 2,
}

#: Types in the tables that cannot be trained on text alone, with what they need.
NOT_TEXT: dict[str, str] = {
    **dict.fromkeys(
        ("audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moshi", "moss_transcribe_diarize")
        + ("musicflamingo", "musicgen", "musicgen_melody", "nemo_speechlm", "omniasr", "qwen2_audio", "qwen3_asr")
        + ("vibevoice_asr", "voxtral", "voxtral_realtime", "whisper"),
        "a model of audio",
    ),
    **dict.fromkeys(("fuyu", "git", "got_ocr2", "lxmert", "trocr"), "a model of images"),
    "bros": "needs the bounding box of each token",
    "gemma4_assistant": "needs the keys and values of another model",
    "gemma4_unified_assistant": "needs the keys and values of another model",
    "layoutlmv2": "needs detectron2 and the image of the page",
}

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}

#: What the rules do not get right, by model type. It replaces settings of the same name.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": None}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 48,
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {},
        },
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "adapter_input_size": 32,
            "adapter_out_dim": 32,
        },
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "ministral": _HEADS,
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "mistral4": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
        | {"original_max_position_embeddings": POSITIONS}
    },
    "nemotron": _HEADS,
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2},
    "neomme": {"head_dim": 16, "embedding_rank": 16, "embedding_dim": 16, "per_layer_config": None},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4}
    | {"num_cross_attention_heads": 4, "_label_trainable_num_channels": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> dict[str, Any]:
    """Settings that make this architecture tiny, as `model.config` takes them."""
    default = transformers.CONFIG_MAPPING[model_type]().to_dict()
    return {"model_type": model_type, **_tiny(default, model_type)}


def _tiny(default: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    exceptions = EXCEPTIONS.get(model_type, {})
    layers, given = _layers(default), dict[str, Any]()
    for name, value in default.items():
        if name in exceptions:
            given[name] = exceptions[name]
        elif isinstance(value, Mapping) and "model_type" in value:
            part = {key: True for key in ("is_decoder", "add_cross_attention") if value.get(key)}
            given[name] = {"model_type": value["model_type"], **part, **_tiny(value, value["model_type"])}
        elif isinstance(value, int) and not isinstance(value, bool):
            small = 4 if _is_latent(default) and name == "num_key_value_heads" else _small(name, value)
            if small is not None and small != value:
                given[name] = small
    if layers:
        num_layers = next(iter(_by_layer(default).values())).__len__()
        for name in default:
            if given.get(name) and default[name] == num_layers and "layers" in name:
                given[name] = len(layers)
        for name, value in _by_layer(default).items():
            given.setdefault(name, [value[layer] for layer in layers])
    return {**given, **{name: value for name, value in exceptions.items() if name in default}}


def _small(name: str, value: int) -> int | None:
    if name.endswith("token_id"):
        is_special = name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
        return 2 if is_special and value >= VOCABULARY else None
    small = next((small for pattern, small in RULES.items() if re.fullmatch(pattern, name)), None)
    return small if small is None or value > 0 else None


def _is_latent(default: Mapping[str, Any]) -> bool:
    """Whether all heads attend to keys and values of their own, unfolded from a latent vector."""
    return "kv_lora_rank" in default


def _by_layer(default: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings with one value for each layer."""
    number = default.get("num_hidden_layers")
    return {
        name: list(value) for name, value in default.items() if isinstance(value, list | tuple) and len(value) == number
    }


def _layers(default: Mapping[str, Any]) -> list[int]:
    """The first layer of each kind, at least two layers."""
    settings = _by_layer(default)
    if not settings:
        return []
    kinds = list(zip(*(map(str, value) for value in settings.values()), strict=True))
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    return (first if len(first) > 1 else [0, 1])[:MAX_LAYERS]
