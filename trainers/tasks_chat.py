"""Conversations: the model learns to say what the assistant says, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.weights import unwrap
from outlast.trainers.chat import ASSISTANT, chat_template, encode_chat
from outlast.trainers.columns import Column, Kind
from outlast.trainers.config import DataSettings
from outlast.trainers.models import Tokenizer
from outlast.trainers.samples import Sample
from outlast.trainers.tasks import IGNORED, Batch, Record, Task, ints

_NUM_NEW_TOKENS = 64


class Chat(Task):
    """Predict the tokens of the answers. A conversation is a sample; what is longer than `max_length` is cut off."""

    auto_class = "AutoModelForCausalLM"
    columns = (Column("messages", Kind.ANY),)
    options = ("chat_template",)

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        if settings.chat_template is not None:
            tokenizer.inner.chat_template = settings.chat_template
        chat_template(tokenizer.inner)

    def fault(self, record: Record) -> str | None:
        try:
            _, is_answer = encode_chat(self.tokenizer.inner, record["messages"])
        except ConfigError as error:
            return error.message
        length = self.settings.max_length
        return None if any(is_answer[1:length]) else f"no answer begins within data.max_length ({length} tokens)"

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record in records:
            tokens, is_answer = encode_chat(self.tokenizer.inner, record["messages"])
            ids = ints(tokens[: self.settings.max_length])
            yield {"input_ids": ids, "labels": np.where(is_answer[: len(ids)], ids, ints([IGNORED]))}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def count(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        logits, labels = outputs.logits[:, :-1].float(), batch["labels"][:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """The answer to the last message that is none; the oldest tokens go when the conversation is too long."""
        inner, writer = self.tokenizer.inner, unwrap(model)  # type: Any, Any
        limit = getattr(writer.config, "max_position_embeddings", None) or self.settings.max_length + _NUM_NEW_TOKENS
        for record in records:
            turns = list(record["messages"])
            while turns and turns[-1]["role"] == ASSISTANT:
                turns.pop()
            made = inner.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
            given = made["input_ids"][:, -min(self.settings.max_length, limit - 1) :].to(
                next(model.parameters()).device
            )
            said = writer.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=min(_NUM_NEW_TOKENS, limit - given.shape[1]),
                do_sample=False,
                pad_token_id=inner.pad_token_id,
            )
            answer = inner.decode(said[0][given.shape[1] :], skip_special_tokens=True)
            yield {"messages": turns, "answer": answer}
