"""Steps whose loss or gradient is not finite: noticed by all ranks before the weights change, and dealt with alike.

Such a step is either the last one, or it is left out: the data moves on, the weights, the moments and the loss scale
stay. Which steps are left out stands in every checkpoint and, at once, in the attempt's durable journal, so a resumed
run leaves out the same ones even where they would come out finite this time. An overflow of fp16's scaled gradients is
something else: the loss scale's own affair.
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
from outlast.checkpointing.state.model_weights import carried_state
from outlast.trainers.config.train import NonFinite
from outlast.trainers.distributed.world import World

#: So many steps in a row that had to be left out mean that the run is broken, not a batch.
MAX_IN_A_ROW = 10


class NonFiniteError(OutlastError):
    """The loss or the gradient of a step is not finite, and the run ends there."""

    permanent = True

    @classmethod
    def of(cls, said: str, *, is_one_too_many: bool) -> NonFiniteError:
        """For a step that ends the run by itself, or for the one after as many as may be left out."""
        said += f"; {MAX_IN_A_ROW} steps before it were left out already" if is_one_too_many else ""
        hint = "look at these samples; a smaller train.lr or train.clip is a new run, with a name of its own"
        if not is_one_too_many:
            hint += "; failure.non_finite: skip leaves such steps out, roll-back also reads the newest checkpoint again"
        return cls(f"{said}; the weights are those before it", hint=hint)


class RolledBack(OutlastError):
    """The attempt ends so that the next one goes back to the newest checkpoint and leaves a step out."""


def or_nan(loss: torch.Tensor) -> torch.Tensor:
    """`loss`; if it is not finite, one whose every gradient is NaN, so that all ranks see it in the gradient's norm.

    A loss may be infinite and its gradient not: such as the cross-entropy of a label whose logit is minus infinity.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def gradient_norm(parameters: Iterable[nn.Parameter], clip: float | None) -> torch.Tensor:
    """The norm of the whole gradient, which is then clipped to `clip` if that is given."""
    if clip:
        return torch.nn.utils.clip_grad_norm_(parameters, clip)
    return torch.nn.utils.get_total_norm([item.grad for item in parameters if item.grad is not None])


class NonFiniteGuard:
    """Looks at each step before its update.

    Args:
        mode: What becomes of a step that is not finite.
        world: This rank.
        model: The unwrapped model.

    Attributes:
        mode: As given.
        left_out: Steps that were left out, counted from 1, in order.
    """

    def __init__(self, mode: NonFinite, world: World, model: nn.Module) -> None:
        self.mode, self._world, self._model = mode, world, model
        self.left_out: list[int] = []
        self._told: frozenset[int] = frozenset()
        self._carried = carried_state(model)
        self._kept: dict[str, torch.Tensor] = {}

    def restore(self, checkpointer: Checkpointer, left_out: list[int]) -> None:
        """Takes up what a checkpoint says, and what earlier attempts said since. Every rank calls it."""
        self.left_out = list(left_out)
        self._told = self._world.run_on_rank_0(lambda: _left_out_before(checkpointer))

    def begin(self) -> None:
        """Before a step: keeps what its forward passes may change."""
        if self._carried:
            buffers = dict(self._model.named_buffers())
            self._kept = {name: buffers[name].clone() for name in self._carried if name in buffers}

    def undo(self) -> None:
        """Puts back what the step's forward passes changed."""
        buffers = dict(self._model.named_buffers())
        with torch.no_grad():
            for name, before in self._kept.items():
                buffers[name].copy_(before)

    def is_to_leave_out(self, step: int, norm: torch.Tensor | None, losses: Mapping[int, torch.Tensor]) -> bool:
        """Whether this step, counted from 1, must not change the weights; the same on all ranks. Every rank calls it.

        Args:
            step: The step.
            norm: The norm of the gradient over all ranks, of losses that went through `or_nan`; None where the gradient
                is not to be judged, as under a loss scale.
            losses: The sums of this rank's micro-batches, which are judged then.
        """
        if norm is not None:
            return not bool(norm.isfinite()) or step in self._told
        is_finite = bool(torch.stack(list(losses.values())).isfinite().all()) if losses else True
        bad = self._world.add(torch.tensor([float(not is_finite)], dtype=torch.float64)).item() > 0
        return bad or step in self._told

    def action(self, step: int) -> NonFinite:
        """What becomes of a step that is not finite."""
        if step in self._told:
            return NonFinite.SKIP
        in_a_row = range(step - MAX_IN_A_ROW, step)
        return NonFinite.STOP if set(in_a_row) <= set(self.left_out) else self.mode

    def explain(self, step: int, losses: Mapping[int, torch.Tensor], samples: Mapping[int, list[int]]) -> str:
        """What was not finite, and where first. Every rank calls it.

        Args:
            step: The step, counted from 1.
            losses: The sums of this rank's micro-batches.
            samples: The training samples of each of this rank's micro-batches.
        """
        mine = [(micro, samples[micro]) for micro, loss in losses.items() if not bool(loss.isfinite())]
        for rank, found in enumerate(self._world.gather(mine)):
            for micro, rows in found:
                where = f"rank {rank}, micro-batch {micro}, training samples {rows}"
                return f"step {step}: the loss is not finite (first on {where})"
        return f"step {step}: the loss is finite, and its gradient is not"


def _left_out_before(checkpointer: Checkpointer) -> frozenset[int]:
    """Steps that some earlier attempt of the run has decided to leave out."""
    store = checkpointer.store
    return frozenset(
        event.step
        for attempt in list_attempts(store)
        if attempt < checkpointer.attempt
        for event in map(parse_event, read_events(store, store.attempt_dir(attempt), COMMITS))
        if isinstance(event, LeftOutEvent)
    )
