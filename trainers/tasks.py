"""Tasks: from rows to a batch, and from a batch to `(loss_sum, count)`.

The model's own `outputs.loss` is not used: most heads average over the micro-batch, and an average of averages is not
the average over the global batch when counts differ.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

Batch = dict[str, torch.Tensor]
Rows = npt.NDArray[np.int32]


class Task(Protocol):
    """What the data room and the step loop ask of a task. A row is a vector of int32 that only the task understands."""

    #: Name of the Auto class in transformers that carries the task's head.
    auto_class: str
    #: Whether rows carry labels, from the column `data.label`.
    has_labels: bool
    #: Names of what `measure` finds besides the loss.
    scores: tuple[str, ...]

    def collate(self, rows: Rows) -> Batch:
        """Rows of a data set, shape [samples, width], as tensors on the host."""

    def count(self, batch: Batch) -> int:
        """How many terms the loss of this batch sums over."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum (not the mean) of the loss over the batch, a float32 scalar."""

    def measure(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss sum and then the sum of each of `scores`, shape [1 + len(scores)]."""


class CausalLM:
    """Predict the next token, in every place but the last. A row is `max_length` tokens."""

    auto_class = "AutoModelForCausalLM"
    has_labels = False
    scores: tuple[str, ...] = ()

    def collate(self, rows: Rows) -> Batch:
        return {"input_ids": torch.from_numpy(rows.astype(np.int64))}

    def count(self, batch: Batch) -> int:
        samples, length = batch["input_ids"].shape
        return int(samples * (length - 1))

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs: Any = model(input_ids=batch["input_ids"], use_cache=False)
        logits = outputs.logits[:, :-1].float()
        targets = batch["input_ids"][:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def measure(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_sum(model, batch).reshape(1)


class SequenceClassification:
    """Name the class of a text. A row is `max_length` tokens, padded, then their true number, then the label."""

    auto_class = "AutoModelForSequenceClassification"
    has_labels = True
    scores: tuple[str, ...] = ("accuracy",)

    def collate(self, rows: Rows) -> Batch:
        lengths, whole = rows[:, -2], rows.astype(np.int64)
        longest = int(lengths.max())
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(whole[:, :longest])),
            "attention_mask": torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)),
            "labels": torch.from_numpy(np.ascontiguousarray(whole[:, -1])),
        }

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(self._logits(model, batch), batch["labels"], reduction="sum")

    def measure(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = self._logits(model, batch), batch["labels"]
        right = (logits.argmax(-1) == labels).sum()
        return torch.stack([functional.cross_entropy(logits, labels, reduction="sum"), right.float()])

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits: torch.Tensor = outputs.logits.float()
        return logits


TASKS: dict[str, Task] = {"causal-lm": CausalLM(), "sequence-classification": SequenceClassification()}
