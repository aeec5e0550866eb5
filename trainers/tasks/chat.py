"""Chat: train on the assistant's answers of conversations, rendered by the tokenizer's chat template."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.chat_template import chat_template, encode_chat
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.tasks.base import IGNORED, Batch, Record, Task, ints, next_token_loss
from outlast.trainers.tasks.greedy_decoding import NUM_NEW_TOKENS, generate_continuation

_Tokens = tuple[list[int], list[bool]]


class Chat(Task):
    """Predict the tokens of the assistant's answers. A conversation is one sample, truncated to `max_length`."""

    auto_class = "AutoModelForCausalLM"
    columns: ClassVar[tuple[Column, ...]] = (Column("messages", ColumnType.MESSAGES),)
    options = ("chat_template",)

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        if settings.chat_template is not None:
            tokenizer.inner.chat_template = settings.chat_template
        self._encoded: dict[int, tuple[Record, _Tokens]] = {}
        chat_template(tokenizer.inner)  # a missing template must fail here, not at the first row

    def fault(self, record: Record) -> str | None:
        try:
            encoded = encode_chat(self.tokenizer.inner, record["messages"])
        except ConfigError as error:
            return error.message
        if not any(encoded[1][1 : self.settings.max_length]):
            return "its answers begin after data.max_length"
        self._encoded[id(record)] = record, encoded  # holding the record keeps its id from being reused
        return None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record in records:
            _, cached = self._encoded.pop(id(record), (record, None))
            tokens, is_answer = cached or encode_chat(self.tokenizer.inner, record["messages"])
            tokens, is_answer = tokens[: self.settings.max_length], is_answer[: self.settings.max_length]
            yield {"input_ids": ints(tokens), "labels": ints(np.where(is_answer, tokens, IGNORED))}

    def configure(self, config: Any) -> None:
        """Change nothing: the attention mask marks the padding."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def count(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return next_token_loss(outputs.logits, batch["labels"])

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """Answer conversations, each a list of messages or one question as a text."""
        inner = self.tokenizer.inner
        for record in records:
            given = record["messages"]
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
            prompt = inner.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            tokens = generate_continuation(self, unwrap(model), prompt, NUM_NEW_TOKENS)
            yield {"messages": messages, "answer": inner.decode(tokens, skip_special_tokens=True)}
