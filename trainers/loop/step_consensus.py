"""What a step is asked, what it answers, and what it leaves to the next one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class PlannedSave(Enum):
    """Whether to save after a step, as it travels in the all-reduce."""

    NO = 0
    DUE = 1
    URGENT = 2


@dataclass(frozen=True, slots=True)
class StepRequests:
    """What is to happen after a step: for one rank, or once they have agreed for all of them.

    Attributes:
        stop: End the attempt.
        save: Save the state; rank 0 alone decides.
        trouble: Wait for the save in flight, which failed or found the attempt superseded.
    """

    stop: bool
    save: PlannedSave
    trouble: bool


@dataclass(frozen=True, slots=True)
class StepConsensus:
    """What the ranks agreed on at the beginning of a step.

    Attributes:
        count: The step's global count.
        num_tokens: Tokens that the model read in it, on all ranks.
        requests: Every rank's requests together.
    """

    count: float
    num_tokens: float
    requests: StepRequests


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
