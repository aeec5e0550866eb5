"""A task whose forward pass does on one rank what `OUTLAST_TEST_TROUBLE` says: `spin:1` or `slow:1`.

It spins once for each folder `OUTLAST_TEST_FOLDER`, after some steps; slow it is always.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from outlast.trainers.tasks.base import Batch
from outlast.trainers.tasks.causal_lm import CausalLM

TROUBLE, FOLDER = "OUTLAST_TEST_TROUBLE", "OUTLAST_TEST_FOLDER"
SLOW_S = 0.02
_NUM_CALLS_BEFORE = 20


class Troubled(CausalLM):
    """Predicts the next token, with trouble."""

    num_calls = 0

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        kind, _, rank = os.environ[TROUBLE].partition(":")
        if model.training and dist.get_rank() == int(rank):
            self.num_calls += 1
            if kind == "slow":
                time.sleep(SLOW_S)
            elif self.num_calls > _NUM_CALLS_BEFORE and self._is_first():
                self.spin_for_ever()
        return super().loss_sum(model, batch)

    def _is_first(self) -> bool:
        record = Path(os.environ[FOLDER], "spun")
        if record.exists():
            return False
        record.touch()
        return True

    def spin_for_ever(self) -> None:
        while True:
            pass
