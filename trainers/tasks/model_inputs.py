"""Inputs in the form that single architectures of transformers need; most take them as a task makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import unwrap


def base_model(model: nn.Module) -> Any:
    """Return the model inside wrappers and adapters."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


#: Types whose sequence classifiers read the last end token of a text, and fail if two texts have not equally many.
CLASSIFY_AT_END = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")


def padding_id(model: nn.Module) -> int | None:
    """Return the padding token of a model's configuration; None if it has none.

    Decoders with images classify by that of the text part of their configuration.
    """
    config = getattr(model, "config", None)
    parts = [config]
    if "ForSequenceClassification" in type(model).__name__ and not getattr(config, "is_encoder_decoder", False):
        parts = [text_config(config), config]
    ids = [getattr(part, "pad_token_id", None) for part in parts]
    return next((token_id for token_id in ids if isinstance(token_id, int)), None)


def text_config(config: Any) -> Any:
    """Return the text part of a model's configuration, or all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def run_model(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """Run a model on token ids with padding on the right, shape [samples, …, length]. Returns its outputs.

    - Padding becomes the token that the model's own configuration calls so: GPT-like models classify from the last
      token that is not that one. BART-like models classify from the last end token: there padding is never that.
    - RoBERTa-like models have one type of tokens, and a tokenizer may give two.
    - XLNet, which classifies from the last position, gets the padding on the left.
    - T5Gemma classifies from the token after the last one of its shifted input: there is padding after each text.
    - Funnel pools pairs of positions in each block but the first, and fails if too few remain: it gets more padding.

    Raises ConfigError if the head's summary of a text would read padding.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape:
        return model(**inputs)
    inner = base_model(model)
    config = getattr(inner, "config", None)
    padding, model_type = padding_id(inner), getattr(config, "model_type", None)
    end = getattr(config, "eos_token_id", None)
    if padding == end and model_type in CLASSIFY_AT_END and hasattr(inner, "classification_head"):
        padding = int(end == 0)
    if (getattr(config, "type_vocab_size", None) or 2) < 2:
        inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    if padding is not None:
        inputs = {**inputs, "input_ids": ids.masked_fill(mask == 0, padding)}
    summary = getattr(getattr(inner, "sequence_summary", None), "summary_type", "first")
    if model_type == "xlnet" and summary in ("last", "cls_index"):
        inputs = {
            name: _pad_left(value, mask) if value.shape == mask.shape else value for name, value in inputs.items()
        }
    elif summary != "first":
        raise ConfigError(
            f"{type(inner).__name__} would read padding: the summary_type of its configuration is {summary!r}",
            hint="set summary_type to first in the model's configuration",
        )
    if type(inner).__name__ in ("T5GemmaForSequenceClassification", "T5Gemma2ForSequenceClassification"):
        ids_and_mask = {"input_ids": padding or 0, "attention_mask": 0}
        return model(
            **{name: functional.pad(inputs[name], (0, 1), value=value) for name, value in ids_and_mask.items()}
        )
    if model_type == "funnel":
        return _run_funnel(model, inputs, config)
    return model(**inputs)


def _run_funnel(model: nn.Module, inputs: dict[str, torch.Tensor], config: Any) -> Any:
    """Run a Funnel model; short texts with padding, which is cut from its outputs."""
    length = inputs["input_ids"].shape[-1]
    halvings = len(config.block_sizes) - 1
    shortest = 2**halvings + 1 if config.truncate_seq else 2 ** (halvings + 1)
    if length >= shortest:
        return model(**inputs)
    outputs = model(**{name: functional.pad(value, (0, shortest - length)) for name, value in inputs.items()})
    for name in ("logits", "start_logits", "end_logits"):
        value = getattr(outputs, name, None)
        if value is not None and (value.ndim == 3 or name != "logits"):
            setattr(outputs, name, value[:, :length])
    return outputs


def _pad_left(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Move the padding of each text from its end to its beginning."""
    length = mask.shape[-1]
    places = torch.arange(length, device=mask.device) + mask.sum(-1, keepdim=True)
    return values.gather(-1, places % length)
