"""One optimizer update: forward and backward passes, the ranks' agreement, the sum of gradients, clipping, the update.

A step is a pure function of (seed, step). Its global batch is cut into micro-batches that the ranks share; before
each one every generator is seeded from (seed, step, micro-batch). So there is no generator state to save and no batch
to skip: a run that resumes at step k computes what the uninterrupted run computed from step k on.

It must never decide when to evaluate, save or stop: it carries those requests in its all-reduce, and returns the ranks'
agreement.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.run_store.events import LeftOutEvent, NonFiniteEvent, StepSkippedEvent
from outlast.trainers.config.train import Exactness, NonFinite
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import Samples
from outlast.trainers.data.batch_plan import BatchPlan, share
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.distributed.fsdp import BlockOrder, whole
from outlast.trainers.distributed.tree_allreduce import TreeReducer
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.buffer_change_check import watch_buffers, watch_frozen
from outlast.trainers.loop.compile_and_recompute import prepare_module
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.event_log import EventLog
from outlast.trainers.loop.loss_scale import apply_gradients, load_scaler, make_scaler, scaler_state
from outlast.trainers.loop.lr_schedule import learning_rate
from outlast.trainers.loop.non_finite import NonFiniteError, NonFiniteGuard, RolledBack, gradient_norm, or_nan
from outlast.trainers.loop.optimizer import group_numbers, load_group_numbers, make_optimizer
from outlast.trainers.loop.rank_activity import StepPhase, Stopwatch
from outlast.trainers.loop.step_exchange import DeferredMetrics, PlannedSave, StepConsensus, StepRequests
from outlast.trainers.tasks.base import Batch, Task
from outlast.trainers.tasks.model_inputs import base_model

Positions = npt.NDArray[np.int64]


class TrainStep:
    """The update of a model's weights, step by step.

    Args:
        config: The settings.
        plan: The order of the data.
        world: This rank.
        model: The unwrapped model, on `world.device`.
        task: What the model learns.
        data: Training samples.
        control: Receives the step's phase.
        log: Records the steps.
        optimizer: The optimizer of a training that goes on in memory; None to make one.
        settles_at_once: Add the losses up before the weights change, not with the next step: then no rank's loss can be
            lost that is in the weights. It costs one more small all-reduce, during the last backward pass.

    Attributes:
        optimizer: The optimizer.
        loss: The newest finite loss over all ranks; None before the first.
    """

    def __init__(
        self,
        config: TrainingConfig,
        plan: BatchPlan,
        world: World,
        model: nn.Module,
        task: Task,
        data: Samples,
        control: Control,
        log: EventLog,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        settles_at_once: bool = False,
    ) -> None:
        self._train, self._plan, self._world, self._model = config.train, plan, world, model
        self._task, self._data, self._control, self._log = task, data, control, log
        self._exactness = config.exactness
        is_elastic = config.exactness is Exactness.ELASTIC
        self._tree = TreeReducer(model.parameters(), world.rank, world.size) if is_elastic else None
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer or make_optimizer(model, config.train)
        self._settles_at_once = settles_at_once
        self._loss_sums: Callable[[], torch.Tensor] | None = None
        self._scaler = make_scaler(config.train, world.device)
        self._non_finite = NonFiniteGuard(config.failure.non_finite, world, model)
        self._stopwatch = Stopwatch(world.device, control.worked)
        self._pending: DeferredMetrics | None = None
        self.loss: float | None = None

    def state(self) -> dict[str, Any]:
        """Return the state besides weights and optimizer tensors, as JSON."""
        return {
            "scaler": scaler_state(self._scaler),
            "groups": group_numbers(self.optimizer),
            "left_out": self._non_finite.left_out,
        }

    def load(self, saved: Mapping[str, Any] | None, checkpointer: Checkpointer) -> None:
        """Restore `state`; None for a fresh start. Every rank calls it."""
        if saved is not None:
            load_scaler(self._scaler, saved["scaler"])
            load_group_numbers(self.optimizer, saved["groups"])
        self._non_finite.restore(checkpointer, (saved or {}).get("left_out", []))

    def state_in_memory(self) -> dict[str, Any]:
        """Return all that another rank needs to go on after the newest step, besides the tensors."""
        return {**self.state(), "decided": sorted(self._non_finite.decided), "loss": self.loss}

    def load_in_memory(self, state: Mapping[str, Any]) -> None:
        """Take over `state_in_memory` of any rank."""
        load_scaler(self._scaler, state["scaler"])
        load_group_numbers(self.optimizer, state["groups"])
        self._non_finite.take_over(state["left_out"], state["decided"])
        self.loss = state["loss"]

    def drop(self) -> None:
        """Drop what an interrupted step has begun: gradients, and the changes of its forward passes."""
        self.optimizer.zero_grad(set_to_none=True)
        self._non_finite.undo()

    def prepare(self, *, static_graph: bool = False) -> None:
        """Compile, parallelize and guard the model, once its weights are restored. Raises as `prepare_module`.

        Args:
            static_graph: Whether each backward pass gives every trained parameter a gradient.
        """
        prepare_module(self._model, self._train, self._world, self._world.device)
        self._wrapped = self._world.parallelize(self._model, self._exactness, static_graph=static_graph)
        self._block_order = BlockOrder(self._model) if isinstance(self._model, FSDPModule) else None
        recomputes = self._train.gradient_checkpointing
        self._buffer_guards = watch_buffers(self._model, self._exactness, recomputes=recomputes)
        is_own = not type(base_model(self._model)).__module__.startswith("transformers.")  # those change no parameter
        if is_own and not isinstance(self._model, FSDPModule) and (self._world.size > 1 or self._tree is not None):
            self._buffer_guards.append(watch_frozen(self._model))
        self._model.train()

    def update(self, step: int, requests: Callable[[], StepRequests]) -> StepRequests:
        """Make the update number `step`, from 0.

        Args:
            step: Steps done so far.
            requests: Called once the step's data is read.

        Returns:
            The combined requests of all ranks.

        Raises:
            ConfigError: The step has no targets, or a buffer changed that must not.
            NonFiniteError: The run ends; weights, optimizer and buffers are those from before this step.
            RolledBack: The attempt ends, to resume from the newest checkpoint without this step.
        """
        began = time.monotonic()
        self._control.at(StepPhase.DATA, step)
        cut = self._cut(step)
        batches = {micro: self._batch(cut[micro]) for micro in share(len(cut), self._world.rank, self._world.size)}
        data_s = time.monotonic() - began
        agree = self._agree(step, batches, requests)
        self._stopwatch.report(data_s, len(batches))

        losses = self._compute_gradients(step, cut, batches, lambda: agree().count)
        agreed = agree()
        self._control.at(StepPhase.EXCHANGE, step)
        if self._block_order is not None:
            self._block_order.check(self._world)
        if self._tree is not None:
            self._tree.finish(len(cut))
        self._control.at(StepPhase.UPDATE, step)
        for guard in self._buffer_guards:
            guard.check()
        fault_point(FaultPoint.STEP, step)

        shared = self._shared_losses(losses)
        lr = learning_rate(self._train, step, self._plan.num_steps)
        norm = self._apply(step, lr, losses, cut)
        seconds = time.monotonic() - began
        done = DeferredMetrics(step, agreed.count, agreed.num_tokens, losses, norm, lr, seconds, time.time())
        if shared is None:
            self._pending = done
        else:
            self._record(done, shared)
        return agreed.requests

    def settle(self) -> None:
        """Add up and record the losses of the newest step now, not with the next one. Every rank calls it."""
        if self._pending is not None:
            self._add(0)()

    def _cut(self, step: int) -> list[Positions]:
        """Return the positions of each micro-batch of a step, the same on every rank."""
        positions = self._plan.positions(step)
        by_length = self._train.group_by_length
        return self._plan.cut(positions, self._data.lengths(self._plan.samples(positions)) if by_length else None)

    def _batch(self, positions: Positions) -> Batch:
        """Return a micro-batch on the host."""
        return self._task.collate(self._data.take(self._plan.samples(positions)), self._plan.keys(positions))

    def _compute_gradients(
        self, step: int, cut: list[Positions], batches: Mapping[int, Batch], count: Callable[[], float]
    ) -> dict[int, torch.Tensor]:
        """Run this rank's forward and backward passes. Returns the loss sum of each of its micro-batches."""
        self._control.at(StepPhase.COMPUTE, step)
        losses: dict[int, torch.Tensor] = {}
        self._non_finite.begin()
        for micro, batch in batches.items():
            seed_everything(self._plan.seed, step, micro)
            is_last = len(losses) + 1 == len(batches)
            self._forward_backward(step, batch, count, losses, micro, is_last=is_last)
            if self._tree is not None:
                self._tree.take(micro, len(cut))
            fault_point(FaultPoint.ACCUMULATING, step)
        for _ in range(self._world.num_idle(len(cut), self._wrapped)):  # other ranks wait for gradients, which are zero
            seed_everything(self._plan.seed, step, 0)  # the buffers that it changes may be the saved ones
            self._forward_backward(step, self._batch(cut[0]), lambda: math.inf, losses, None, is_last=True)
        return losses

    def _forward_backward(
        self,
        step: int,
        batch: Batch,
        count: Callable[[], float],
        losses: dict[int, torch.Tensor],
        micro: int | None,
        *,
        is_last: bool,
    ) -> None:
        """Add the gradient of `loss_sum / count`; the last pass also adds it over the ranks.

        The loss sum is put into `losses` under `micro`, unless that is None. `count` is called once it is computed.
        """
        if isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped.require_backward_grad_sync = is_last
        with self._world.autocast(self._train.precision):
            on_device = {key: value.to(self._world.device, non_blocking=True) for key, value in batch.items()}
            with self._stopwatch.running():
                loss_sum = self._task.loss_sum(self._wrapped, on_device)
        if self._train.gradient_checkpointing:
            for guard in self._buffer_guards:  # before the backward pass fails on it
                guard.check()
        loss = loss_sum / count()
        if micro is not None:
            losses[micro] = loss_sum.detach()
        if is_last:
            self._begin_sharing(losses)
            if self._tree is None:
                self._control.at(StepPhase.EXCHANGE, step)
        self._scaler.scale(loss if self._scaler.is_enabled() else or_nan(loss)).backward()  # type: ignore[no-untyped-call]

    def _begin_sharing(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Start adding the step's losses over the ranks, if they are settled at once, and it has not begun yet."""
        if self._settles_at_once and self._loss_sums is None:
            self._loss_sums = self._world.add_meanwhile(self._by_micro(losses))

    def _shared_losses(self, losses: Mapping[int, torch.Tensor]) -> list[float] | None:
        """Wait for the sum of each micro-batch's loss over the ranks; None if they are added with the next step."""
        self._begin_sharing(losses)  # a rank may have no pass at all in a short step
        wait, self._loss_sums = self._loss_sums, None
        return None if wait is None else wait().tolist()

    def _by_micro(self, losses: Mapping[int, torch.Tensor], num_before: int = 0) -> torch.Tensor:
        """Return `num_before` zeros, and one element for each micro-batch: its loss where this rank has it, or zero."""
        values = torch.zeros(num_before + self._plan.batch // self._plan.micro_batch, dtype=torch.float64)
        for micro, loss_sum in losses.items():
            values[num_before + micro] = loss_sum.double().cpu()
        return values

    def _agree(
        self, step: int, batches: Mapping[int, Batch], requests: Callable[[], StepRequests]
    ) -> Callable[[], StepConsensus]:
        """Start the step's one small all-reduce: its count, the ranks' requests, and the losses of the step before.

        The returned function waits for it when first called, and raises ConfigError if the step has no targets.
        """
        count = sum(self._task.count(batch) for batch in batches.values())
        num_tokens = sum(self._task.num_tokens(batch) for batch in batches.values())
        mine = requests()
        asked = (mine.stop, mine.save.value, mine.trouble, mine.num_idle, mine.snapshot)
        wait = self._add(count, num_tokens, *map(float, asked))

        @cache
        def agreed() -> StepConsensus:
            self._control.at(StepPhase.AGREE, step)
            count_sum, token_sum, stop_sum, save_sum, trouble_sum, idle_sum, snapshot_sum = wait()
            self._control.at(StepPhase.COMPUTE, step)
            if not count_sum:
                raise ConfigError(
                    f"step {step + 1} has nothing to learn from: none of its samples has a target",
                    hint="take such rows out of the data, or set a larger train.batch",
                )
            combined = StepRequests(
                stop_sum > 0, PlannedSave(int(save_sum)), trouble_sum > 0, int(idle_sum), snapshot_sum > 0
            )
            return StepConsensus(count_sum, token_sum, combined)

        return agreed

    def _add(self, *head: float) -> Callable[[], list[float]]:
        """Start adding `head` over the ranks, and the losses of the step before, which are then recorded.

        Each micro-batch's loss has an element of its own, zero on every rank but one, so that adding over the ranks is
        exact; they are then added up in micro-batch order.
        """
        pending, self._pending = self._pending, None
        values = self._by_micro(pending.micro_losses if pending else {}, len(head))
        values[: len(head)] = torch.tensor(head, dtype=torch.float64)
        wait = self._world.add_meanwhile(values)

        def added() -> list[float]:
            sums: list[float] = wait().tolist()
            if pending is not None:
                self._record(pending, sums[len(head) :])
            return sums[: len(head)]

        return added

    def _record(self, done: DeferredMetrics, losses: list[float]) -> None:
        """Record a step, given its losses over all ranks; they are added up in micro-batch order."""
        loss = sum(losses) / done.count
        self.loss = loss if math.isfinite(loss) else self.loss
        self._log.step(done, loss)

    def _apply(
        self, step: int, lr: float, losses: Mapping[int, torch.Tensor], cut: list[Positions]
    ) -> torch.Tensor | None:
        """Clip the gradient and update the weights. Returns the gradient's norm; None if the step was left out."""
        self._scaler.unscale_(self.optimizer)
        norm: torch.Tensor | None = whole(gradient_norm(self._trained, self._train.clip))
        checked = None if self._scaler.is_enabled() else norm
        is_left_out = self._non_finite.is_to_leave_out(step + 1, checked, losses)
        if is_left_out:
            self._leave_out(step + 1, losses, cut)
            norm = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not is_left_out and not apply_gradients(self.optimizer, self._scaler):  # the data advances nevertheless
            norm = None
            self._log.write(StepSkippedEvent(step=step + 1, reason="overflow", scale=self._scaler.get_scale()))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _leave_out(self, step: int, losses: Mapping[int, torch.Tensor], cut: list[Positions]) -> None:
        """Handle step `step`, from 1, which must not change the weights. Returns if training continues without it.

        Raises:
            NonFiniteError: The run ends.
            RolledBack: The attempt ends.
        """
        guard = self._non_finite
        action = guard.action(step)
        guard.undo()
        message = guard.explain(step, losses, {micro: self._plan.samples(cut[micro]).tolist() for micro in losses})
        self._log.write(NonFiniteEvent(step=step, action=action.value, message=message))
        if action is NonFinite.STOP:
            raise NonFiniteError.of(message, is_one_too_many=guard.mode is not NonFinite.STOP)
        if step not in guard.left_out:
            self._log.write_durably(LeftOutEvent(step=step, message=message))
        if action is NonFinite.ROLL_BACK:
            raise RolledBack(f"{message}; returning to the newest checkpoint to continue without this step")
        guard.left_out.append(step)
        self._scaler.update(self._scaler.get_scale())  # drops this step's overflow checks, keeps the scale
