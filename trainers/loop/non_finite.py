"""Steps whose loss or gradient is not finite: detected by all ranks before the weights change, and handled alike.

Such a step either ends the run or is left out: the data advances, while weights, moments and loss scale stay. The steps
left out are in every checkpoint and, at once, in the attempt's durable journal, so a resumed run leaves out the same
ones even if they are finite this time. An overflow of fp16's scaled gradients is handled by the loss scale instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import LeftOutEvent, parse_event
from outlast.checkpointing.run_store.journal import COMMITS, read_events
from outlast.checkpointing.state.named_weights import carried_state, plain_buffers
from outlast.trainers.config.train import NonFinite
from outlast.trainers.distributed.world import World

#: This many consecutive steps left out mean that the run is broken, not a batch.
MAX_IN_A_ROW = 10


class NonFiniteError(OutlastError):
    """The loss or the gradient of a step is not finite, and the run ends."""

    permanent = True

    @classmethod
    def of(cls, message: str, *, is_one_too_many: bool) -> NonFiniteError:
        """Make the error of a step that ends the run by itself, or that follows `MAX_IN_A_ROW` steps left out."""
        message += f"; {MAX_IN_A_ROW} steps before it were left out already" if is_one_too_many else ""
        hint = "check these samples; a smaller train.lr or train.clip needs a new run with a name of its own"
        if not is_one_too_many:
            hint += "; failure.non_finite: skip leaves such steps out, roll-back also reads the newest checkpoint again"
        return cls(f"{message}; the weights are those from before this step", hint=hint)


class RolledBack(OutlastError):
    """The attempt ends so that the next one resumes from the newest checkpoint and leaves a step out."""


def or_nan(loss: torch.Tensor) -> torch.Tensor:
    """Return `loss`, with NaN gradients if it is not finite, so that all ranks see it in the gradient's norm.

    A loss may be infinite with a finite gradient, as the cross-entropy of a label whose logit is minus infinity.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def gradient_norm(parameters: Iterable[nn.Parameter], clip: float | None) -> torch.Tensor:
    """Return the norm of the whole gradient, and clip the gradient to `clip` if given."""
    if clip:
        return torch.nn.utils.clip_grad_norm_(parameters, clip)
    return torch.nn.utils.get_total_norm([item.grad for item in parameters if item.grad is not None])


class NonFiniteGuard:
    """Checks each step before its update.

    Args:
        mode: The action for a step that is not finite.
        world: This rank.
        model: The unwrapped model.

    Attributes:
        mode: As given.
        left_out: Steps that were left out, counted from 1, in order.
        decided: Steps that earlier attempts decided to leave out.
    """

    def __init__(self, mode: NonFinite, world: World, model: nn.Module) -> None:
        self.mode, self._world, self._model = mode, world, model
        self.left_out: list[int] = []
        self.decided: frozenset[int] = frozenset()
        self._carried = carried_state(model)
        self._kept: dict[str, torch.Tensor] = {}

    def restore(self, checkpointer: Checkpointer, left_out: list[int]) -> None:
        """Restore the checkpoint's list, and the decisions of earlier attempts since. Every rank calls it."""
        self.left_out = list(left_out)
        self.decided = self._world.run_on_rank_0(lambda: _left_out_before(checkpointer))

    def take_over(self, left_out: Iterable[int], decided: Iterable[int]) -> None:
        """Take over another rank's lists."""
        self.left_out, self.decided = list(left_out), frozenset(decided)

    def begin(self) -> None:
        """Copy what a step's forward passes may change."""
        if self._carried:
            buffers = dict(plain_buffers(self._model))
            self._kept = {name: buffers[name].clone() for name in self._carried if name in buffers}

    def undo(self) -> None:
        """Restore what the step's forward passes changed."""
        buffers = dict(plain_buffers(self._model))
        with torch.no_grad():
            for name, before in self._kept.items():
                buffers[name].copy_(before)

    def is_to_leave_out(self, step: int, norm: torch.Tensor | None, losses: Mapping[int, torch.Tensor]) -> bool:
        """Return whether this step, from 1, must not change the weights; equal on all ranks. Every rank calls it.

        Args:
            step: The step.
            norm: The norm of the gradient over all ranks, of losses that went through `or_nan`; None where the gradient
                is not checked, as under a loss scale.
            losses: The sums of this rank's micro-batches, which are checked then.
        """
        if norm is not None:
            return not bool(norm.isfinite()) or step in self.decided
        is_finite = bool(torch.stack(list(losses.values())).isfinite().all()) if losses else True
        bad = self._world.add(torch.tensor([float(not is_finite)], dtype=torch.float64)).item() > 0
        return bad or step in self.decided

    def action(self, step: int) -> NonFinite:
        """Return the action for a step that is not finite."""
        if step in self.decided:
            return NonFinite.SKIP
        in_a_row = range(step - MAX_IN_A_ROW, step)
        return NonFinite.STOP if set(in_a_row) <= set(self.left_out) else self.mode

    def explain(self, step: int, losses: Mapping[int, torch.Tensor], samples: Mapping[int, list[int]]) -> str:
        """Describe what was not finite, and where first. Every rank calls it.

        Args:
            step: The step, counted from 1.
            losses: The sums of this rank's micro-batches.
            samples: The training samples of each of this rank's micro-batches.
        """
        mine = [(micro, samples[micro]) for micro, loss in losses.items() if not bool(loss.isfinite())]
        for rank, bad in enumerate(self._world.gather(mine)):
            for micro, rows in bad:
                where = f"rank {rank}, micro-batch {micro}, training samples {rows}"
                return f"step {step}: the loss is not finite (first on {where})"
        return f"step {step}: the loss is finite, but its gradient is not"


def _left_out_before(checkpointer: Checkpointer) -> frozenset[int]:
    """Return the steps that earlier attempts of the run decided to leave out."""
    store = checkpointer.store
    return frozenset(
        event.step
        for attempt in list_attempts(store)
        if attempt < checkpointer.attempt
        for event in map(parse_event, read_events(store, store.attempt_dir(attempt), COMMITS))
        if isinstance(event, LeftOutEvent)
    )
