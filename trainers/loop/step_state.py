"""What passes from one step to the next: what the ranks agreed on, and the losses that are not added up yet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class PlannedSave(Enum):
    """What rank 0 says of a save after this step, as it rides in the all-reduce."""

    NO = 0
    DUE = 1
    URGENT = 2


@dataclass(frozen=True, slots=True)
class StepConsensus:
    """What the ranks agreed on at the beginning of a step.

    Attributes:
        count: The step's global count.
        num_tokens: Tokens that the model read in it, on all ranks.
        stop: Some rank was asked to end.
        save: What rank 0 says.
        trouble: On some rank the save in flight failed, or found the attempt superseded.
    """

    count: float
    num_tokens: float
    stop: bool
    save: PlannedSave
    trouble: bool


@dataclass(slots=True)
class DeferredMetrics:
    """A step whose losses are computed but not yet added over the ranks."""

    step: int
    count: float
    num_tokens: float
    micro_losses: dict[int, torch.Tensor]
    grad_norm: torch.Tensor | None
    lr: float
    seconds: float
    ended_at: float
