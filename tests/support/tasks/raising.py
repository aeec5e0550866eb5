"""A task that raises an error on rank 1 whenever it meets certain samples."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from outlast.trainers.tasks.base import Batch
from outlast.trainers.tasks.causal_lm import CausalLM

MESSAGE = "this sample is bad"


class Raising(CausalLM):
    """Predicts the next token, until it meets a bad sample."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        is_rank_1 = dist.is_initialized() and dist.get_world_size() > 1 and dist.get_rank() == 1
        if model.training and is_rank_1 and int(batch["input_ids"].sum()) % 5 == 0:
            raise ValueError(MESSAGE)
        return super().loss_sum(model, batch)
