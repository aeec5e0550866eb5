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
from outlast.trainers.data.chat_template import ChatTemplate, answer_text
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.data.conversation_forms import ASSISTANT, FORMS, TOOLS, read_conversation
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.tasks.base import IGNORED, Batch, Record, Task, begins_late, ints, next_token_loss, require_fast
from outlast.trainers.tasks.greedy_decoding import NUM_NEW_TOKENS, generate_continuation

_Tokens = tuple[list[int], list[bool]]


class Chat(Task):
    """Predict the tokens of the assistant's answers. A conversation is one sample, truncated to `max_length`."""

    auto_class = "AutoModelForCausalLM"
    columns: ClassVar[tuple[Column, ...]] = (Column("messages", ColumnType.MESSAGES), TOOLS)
    forms = FORMS
    options = ("chat_template", "tools", "roles", "train_on", "template_arguments")
    version = 2

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        name = "the tokenizer's chat template"
        if settings.chat_template is not None:
            tokenizer.inner.chat_template, name = settings.chat_template, "data.chat_template"
        self._encoded: dict[int, tuple[Record, _Tokens]] = {}
        self._template = ChatTemplate(tokenizer.inner, settings.template_arguments, name)
        require_fast(tokenizer, "chat")

    def fault(self, record: Record) -> str | None:
        try:
            encoded = self._encode(record)
        except ConfigError as error:
            return error.message
        if not any(encoded[1][1 : self.settings.max_length]):
            return begins_late("first answer", encoded[1], self.settings)
        self._encoded[id(record)] = record, encoded  # holding the record keeps its id from being reused
        return None

    def _encode(self, record: Record) -> _Tokens:
        turns, tools = read_conversation(record, self.settings, self._template.text)
        return self._template.encode(turns, tools, train_on=self.settings.train_on)

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record in records:
            _, cached = self._encoded.pop(id(record), (record, None))
            tokens, is_answer = cached or self._encode(record)
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
        """Answer conversations, each a list of messages or one question as a text.

        The answers that a conversation ends with are what is to be predicted, and not shown to the model.
        """
        for record in records:
            turns, tools = read_conversation(record, self.settings, self._template.text)
            expected = list[str]()
            while "prompt" not in record and len(turns) > 1 and turns[-1]["role"] == ASSISTANT:
                expected.insert(0, answer_text(turns.pop()))
            tokens = generate_continuation(self, unwrap(model), self._template.prompt(turns, tools), NUM_NEW_TOKENS)
            answer = self.tokenizer.inner.decode(tokens, skip_special_tokens=True)
            yield {"messages": turns, "answer": answer, **({"expected": "\n".join(expected)} if expected else {})}
