"""Text generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError

if TYPE_CHECKING:
    pass
from outlast.trainers.tasks.base import Task

NUM_NEW_TOKENS = 64


def generate_continuation(task: Task, model: Any, encoded: Any, limit: int) -> torch.Tensor:
    """What the model writes, greedily, after the tokens given, or for them; at most `limit` tokens, as far as it has
    places.
    """
    if not hasattr(model.get_base_model() if hasattr(model, "get_base_model") else model, "generate"):
        return _greedy_continuation(task, model, encoded["input_ids"], limit)
    given, config = encoded["input_ids"].shape[1], model.config
    places = None if config.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
    room = limit if places is None else min(limit, places - given)
    if given < 1:
        raise ConfigError("the text is empty: there is nothing to go on from", hint="write a word at least")
    if room < 1:
        begin = task.tokenizer.inner.decode(encoded["input_ids"][0, :8])
        raise ConfigError(
            f"{given} tokens leave no room: the model has {places} places, and the text is {begin!r}…",
            hint="write a shorter text",
        )
    padding = task.tokenizer.inner.pad_token_id
    tokens = model.generate(**encoded.to(model.device), max_new_tokens=room, do_sample=False, pad_token_id=padding)[0]
    written: torch.Tensor = tokens if config.is_encoder_decoder else tokens[given:]
    return written


def _greedy_continuation(task: Task, model: nn.Module, tokens: torch.Tensor, limit: int) -> torch.Tensor:
    """The same for a model that cannot write by itself: it reads no more than the `max_length` tokens it trained on."""
    given, end = tokens.shape[1], task.tokenizer.inner.eos_token_id
    while tokens.shape[1] < given + limit and (tokens.shape[1] == given or tokens[0, -1] != end):
        seen = tokens[:, -task.settings.max_length :]
        outputs = task.forward(model, {"input_ids": seen, "attention_mask": torch.ones_like(seen)})
        tokens = torch.cat([tokens, outputs.logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, given:]
