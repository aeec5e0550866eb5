"""Greedy text generation, for the predictions of `outlast try` only: training and evaluation must not use it."""

from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.tasks.base import Task
from outlast.trainers.tasks.model_inputs import base_model

NUM_NEW_TOKENS = 64
#: What training gives to a model that generates; a tokenizer may return more, such as `token_type_ids`.
_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def generate_continuation(task: Task, model: Any, encoded: Any, limit: int) -> torch.Tensor:
    """Generate at most `limit` tokens greedily: the continuation of a decoder, or the output of an encoder-decoder.

    Raises ConfigError if the text is empty, or as long as the model's context.
    """
    if not hasattr(base_model(model), "generate"):
        return _greedy_continuation(task, model, encoded["input_ids"], limit)
    given, config = encoded["input_ids"].shape[1], model.config
    context = None if config.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
    num_new = limit if context is None else min(limit, context - given)
    if given < 1:
        raise ConfigError("the text is empty: generation needs at least one token", hint="give at least one word")
    if num_new < 1:
        begin = task.tokenizer.inner.decode(encoded["input_ids"][0, :8])
        raise ConfigError(
            f"the text {begin!r}… has {given} tokens and fills the model's context of {context} tokens",
            hint="give a shorter text",
        )
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": task.tokenizer.inner.pad_token_id}
    inputs = {name: encoded[name].to(model.device) for name in _INPUTS if name in encoded}
    if "decoder_input_ids" in inputs:
        options["decoder_start_token_id"] = int(inputs["decoder_input_ids"][0, 0])  # else another may be put before it
    tokens = model.generate(**inputs, **options)[0]
    generated: torch.Tensor = tokens if config.is_encoder_decoder else tokens[given:]
    return generated


def _greedy_continuation(task: Task, model: nn.Module, tokens: torch.Tensor, limit: int) -> torch.Tensor:
    """Generate with a model that has no `generate`. It reads at most the `max_length` tokens it was trained on."""
    given, end = tokens.shape[1], task.tokenizer.inner.eos_token_id
    while tokens.shape[1] < given + limit and (tokens.shape[1] == given or tokens[0, -1] != end):
        seen = tokens[:, -task.settings.max_length :]
        outputs = task.forward(model, {"input_ids": seen, "attention_mask": torch.ones_like(seen)})
        tokens = torch.cat([tokens, outputs.logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, given:]
