"""Plain data that passes between the ranks of a step, and from a step to the next one."""

from dataclasses import dataclass
from enum import Enum

import torch


class PlannedSave(Enum):
    """Whether to save after a step, as encoded in the all-reduce."""

    NO = 0
    DUE = 1
    URGENT = 2


@dataclass(frozen=True, slots=True)
class StepRequests:
    """Requests for what to do after a step: one rank's, or all ranks' combined.

    Attributes:
        stop: End the attempt.
        save: Save the state; rank 0 alone decides.
        trouble: Wait for the save in flight, which failed or was superseded.
        num_idle: Number of ranks that can begin a snapshot in memory.
        snapshot: Take one; rank 0 alone decides.
    """

    stop: bool
    save: PlannedSave
    trouble: bool
    num_idle: int = 0
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class StepConsensus:
    """The ranks' agreement at the beginning of a step.

    Attributes:
        count: The step's global count.
        num_tokens: Tokens that the model reads in it, on all ranks.
        requests: The combined requests of all ranks.
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
