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


class Task(Protocol):
    """What the step loop asks of a task."""

    #: Name of the Auto class in transformers that carries the task's head.
    auto_class: str

    def collate(self, rows: npt.NDArray[np.int32]) -> Batch:
        """Rows of a data set, shape [samples, max_length], as tensors on the host."""

    def count(self, batch: Batch) -> int:
        """How many terms the loss of this batch sums over."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum (not the mean) of the loss over the batch, a float32 scalar."""


class CausalLM:
    """Predict the next token, in every place but the last."""

    auto_class = "AutoModelForCausalLM"

    def collate(self, rows: npt.NDArray[np.int32]) -> Batch:
        return {"input_ids": torch.from_numpy(rows.astype(np.int64))}

    def count(self, batch: Batch) -> int:
        samples, length = batch["input_ids"].shape
        return int(samples * (length - 1))

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs: Any = model(input_ids=batch["input_ids"], use_cache=False)
        logits = outputs.logits[:, :-1].float()
        targets = batch["input_ids"][:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


TASKS: dict[str, Task] = {"causal-lm": CausalLM()}
