"""Causal language modelling: predict the next token of packed documents, with no padding.

Samples have `input_ids` only, all of one length; a task with padding or masked labels is `chat`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.tasks.base import Batch, Record, Task, ints, next_token_loss
from outlast.trainers.tasks.greedy_decoding import NUM_NEW_TOKENS, generate_continuation


class CausalLM(Task):
    """Predict the next token at every position but the last. Samples are documents packed to `max_length` tokens."""

    auto_class = "AutoModelForCausalLM"
    columns: ClassVar[tuple[Column, ...]] = (Column("text", ColumnType.TEXT),)
    packs = True

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for ids in self.tokenizer.encode([record["text"] for record in records]):
            yield {"input_ids": ints(ids)}

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        return {"input_ids": torch.from_numpy(np.stack([sample["input_ids"] for sample in samples]).astype(np.int64))}

    def configure(self, config: Any) -> None:
        """Change nothing: packed samples need no padding token."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(input_ids=batch["input_ids"], use_cache=False)

    def count(self, batch: Batch) -> int:
        samples, length = batch["input_ids"].shape
        return int(samples * (length - 1))

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return next_token_loss(outputs.logits, batch["input_ids"])

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        inner = self.tokenizer.inner
        for record in records:
            tokens = generate_continuation(
                self, unwrap(model), inner(record["text"], return_tensors="pt"), NUM_NEW_TOKENS
            )
            yield {"text": record["text"], "continuation": inner.decode(tokens, skip_special_tokens=True)}
