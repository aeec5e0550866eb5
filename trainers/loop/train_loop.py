"""The step loop. A step is a pure function of (seed, step): nothing else decides what it computes.

One step is one optimizer update over one global batch, cut into micro-batches that the ranks share out. Before each
micro-batch every generator is seeded from (seed, step, micro-batch), so there is no generator state to save and no
batch to skip: a run that resumes at step k computes what the uninterrupted run computed from step k on.

The loop knows nothing of Ray. What it needs from outside is a `Control`: whether to stop, and whom to tell.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, DamagedError, NoCheckpointError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.run_store.retention import RetentionCandidate
from outlast.trainers.config.train import Exactness, NonFinite
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import Samples
from outlast.trainers.data.sampler import make_plan, share
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.distributed.fsdp import whole
from outlast.trainers.distributed.tree_allreduce import TreeReducer
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.buffer_guard import watch_buffers
from outlast.trainers.loop.compilation import prepare_module
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.early_stopping import patience
from outlast.trainers.loop.evaluation import evaluate
from outlast.trainers.loop.lr_schedule import learning_rate
from outlast.trainers.loop.mixed_precision import apply_gradients, load_scaler, make_scaler, scaler_state
from outlast.trainers.loop.non_finite import NonFiniteError, NonFiniteGuard, RolledBack, gradient_norm, or_nan
from outlast.trainers.loop.optimizer import group_numbers, load_group_numbers, make_optimizer
from outlast.trainers.loop.progress import StepPhase, Stopwatch
from outlast.trainers.loop.save_timer import SaveTimer
from outlast.trainers.loop.step_state import DeferredMetrics, PlannedSave, StepConsensus
from outlast.trainers.tasks.base import Batch, Task


class Outcome(Enum):
    """How an attempt ended that did not fail."""

    DONE = "done"
    STOPPED = "stopped"
    SUPERSEDED = "superseded"

    @property
    def exit_code(self) -> int:
        """0 done, 75 interrupted and resumable."""
        return 0 if self is Outcome.DONE else 75


class Loop:
    """Trains one attempt, from its resume point to the end, a stop, or being superseded.

    Args:
        config: The settings.
        world: This rank.
        checkpointer: Holds the claim.
        model: The unwrapped model, on `world.device`.
        task: What the model learns.
        train_data: Training samples.
        eval_data: Held-out samples, or None.
        control: The line to the outside.
        non_finite: What becomes of a step whose loss or gradient is not finite.
    """

    def __init__(
        self,
        config: TrainingConfig,
        world: World,
        checkpointer: Checkpointer,
        model: nn.Module,
        task: Task,
        train_data: Samples,
        eval_data: Samples | None,
        control: Control,
        *,
        non_finite: NonFinite = NonFinite.STOP,
    ) -> None:
        self.config, self.world, self.checkpointer = config, world, checkpointer
        self.task, self.train_data, self.eval_data, self.control = task, train_data, eval_data, control
        self.plan = make_plan(config, len(train_data), world.size)
        self.model = model
        self.exactness = Exactness(config.exactness)
        is_elastic = self.exactness is Exactness.ELASTIC
        self._tree = TreeReducer(model.parameters(), world.rank, world.size) if is_elastic else None
        self.optimizer = make_optimizer(model, config.train)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scaler = make_scaler(config.train, world.device)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.log_history: list[dict[str, Any]] = []
        self._pending: DeferredMetrics | None = None
        self._finite = NonFiniteGuard(non_finite, world, model)
        checkpointer.listener = control.progress
        self._pace = SaveTimer(config.checkpoint.interval, checkpointer)
        self._work = Stopwatch(world.device, control.worked)

    def run(self) -> Outcome:
        """Runs to one of the three ends. Raises what the checkpointer raises."""
        fresh = self._resume()
        self.world.mark("restore")
        if self.checkpointer.superseded:
            return Outcome.SUPERSEDED
        prepare_module(self.model, self.config.train, self.world, self.world.device)
        self.wrapped = self.world.parallelize(self.model, self.exactness)
        self._still = watch_buffers(self.model, self.exactness, recomputes=self.config.train.gradient_checkpointing)
        self.model.train()
        plan = {"num_steps": self.plan.num_steps, "batch": self.plan.batch}
        self._tell("plan", **plan, world_size=self.world.size, step=self.step)
        if fresh and self.eval_data is not None:
            self._evaluate()
        first = True
        while not self._is_over():
            agreed = self._train_step()
            self.step += 1
            if first:
                self._get_ready_to_save()
                first = False
                self._tell("under-way", step=self.step, marks=self.world.mark("first_step"))
            if agreed.trouble and not self.checkpointer.wait():
                return Outcome.SUPERSEDED
            evaluated = self._evaluation_is_due(self.step == self.plan.num_steps) and self._evaluate()
            stop, last = agreed.stop, self._is_over()
            if last and self.step < self.plan.num_steps:
                self._tell_early_stop()
            interval = self.config.checkpoint.interval
            due = (
                interval.due_at_step(self.step, self.plan.batch, self.plan.num_samples)
                or agreed.save is PlannedSave.DUE
            )
            best = evaluated and self.config.checkpoint.keep_best > 0
            urgent = stop or last or agreed.save is PlannedSave.URGENT
            if (urgent or best or due) and not self._save(urgent=urgent, skippable=not best):
                return Outcome.SUPERSEDED
            if stop and not last:
                self._tell("stop", step=self.step)
                self.checkpointer.flush()
                return Outcome.STOPPED
        return self._finish()

    # -- one step ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> StepConsensus:
        """One optimizer update. Returns what all ranks agree to do after it."""
        plan, train, step = self.plan, self.config.train, self.step
        began = time.monotonic()
        self.control.at(StepPhase.DATA, step)
        num_micro = plan.num_micro_batches(step)
        mine = share(num_micro, self.world.rank, self.world.size)
        cut = self._cut(step)
        batches = {m: self._batch(cut[m]) for m in mine}
        data_s = time.monotonic() - began
        counts = [(self.task.count(batch), self.task.num_tokens(batch)) for batch in batches.values()]
        agree = self._agree(sum(count for count, _ in counts), sum(tokens for _, tokens in counts))
        self._work.tell(data_s, len(mine))
        self.control.at(StepPhase.COMPUTE, step)
        losses: dict[int, torch.Tensor] = {}
        self._finite.begin()
        for micro, batch in batches.items():
            seed_everything(plan.seed, step, micro)
            losses[micro] = self._forward_backward(batch, lambda: agree().count, sync=micro == mine[-1])
            if self._tree is not None:
                self._tree.take(micro, num_micro)
            fault_point(FaultPoint.ACCUMULATING, step)
        for _ in range(self.world.num_idle(num_micro, self.wrapped)):  # the others wait for gradients, which are zero
            seed_everything(plan.seed, step, 0)  # what it leaves in buffers may be what is saved
            self._forward_backward(self._batch(cut[0]), lambda: math.inf, sync=True)
        agreed = agree()
        self.control.at(StepPhase.EXCHANGE, step)
        if self._tree is not None:
            self._tree.finish(num_micro)
        self.control.at(StepPhase.UPDATE, step)
        for still in self._still:
            still.check()

        fault_point(FaultPoint.STEP, step)
        self.scaler.unscale_(self.optimizer)
        norm: torch.Tensor | None = whole(gradient_norm(self._trained, train.clip))
        is_left_out = self._finite.is_to_leave_out(step + 1, None if self.scaler.is_enabled() else norm, losses)
        if is_left_out:
            self._leave_out(losses, cut)
            norm = None
        lr = learning_rate(train, step, plan.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not is_left_out and not apply_gradients(self.optimizer, self.scaler):  # the data moves on all the same
            norm = None
            self._tell("step-skipped", step=step + 1, reason="overflow", scale=self.scaler.get_scale())
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        self._pending = DeferredMetrics(step, agreed.count, agreed.num_tokens, losses, norm, lr, seconds, time.time())
        return agreed

    def _leave_out(self, losses: dict[int, torch.Tensor], cut: list[npt.NDArray[np.int64]]) -> None:
        """Deals with a step that is not to change the weights. Returns when training goes on without it."""
        step, action = self.step + 1, self._finite.action(self.step + 1)
        self._finite.undo()
        said = self._finite.explain(step, losses, {m: self.plan.samples(cut[m]).tolist() for m in losses})
        self._tell("non-finite", step=step, action=action.value, message=said)
        if action is NonFinite.STOP:
            if self.step:
                self._save(urgent=True, skippable=False)
            raise NonFiniteError.of(said, is_one_too_many=self._finite.mode is not NonFinite.STOP)
        if step not in self._finite.left_out:
            self.checkpointer.note("left-out", step=step, message=said)
        if action is NonFinite.ROLL_BACK:
            raise RolledBack(f"{said}; going back to the newest checkpoint, to go on without this step")
        self._finite.left_out.append(step)
        self.scaler.update(self.scaler.get_scale())  # forgets this step's gradients, and keeps the scale

    def _cut(self, step: int) -> list[npt.NDArray[np.int64]]:
        """Which positions each micro-batch of a step holds, the same on every rank."""
        positions = self.plan.positions(step)
        by_length = self.config.train.group_by_length
        return self.plan.cut(positions, self.train_data.lengths(self.plan.samples(positions)) if by_length else None)

    def _batch(self, positions: npt.NDArray[np.int64]) -> Batch:
        """A micro-batch on the host."""
        return self.task.collate(self.train_data.take(self.plan.samples(positions)), self.plan.keys(positions))

    def _forward_backward(
        self, batch: dict[str, torch.Tensor], count: Callable[[], float], *, sync: bool
    ) -> torch.Tensor:
        """Adds the gradient of `loss_sum / count`; the ranks add theirs up when `sync`. Returns the loss sum.

        The count is asked for once the loss is there.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = sync
        with self.world.autocast(self.config.train.precision):
            on_device = {key: value.to(self.world.device, non_blocking=True) for key, value in batch.items()}
            with self._work.running():
                loss_sum = self.task.loss_sum(self.wrapped, on_device)
        if self.config.train.gradient_checkpointing:
            for still in self._still:  # before the backward pass stumbles over it
                still.check()
        loss = loss_sum / count()
        if sync and self._tree is None:
            self.control.at(StepPhase.EXCHANGE, self.step)
        self.scaler.scale(loss if self.scaler.is_enabled() else or_nan(loss)).backward()  # type: ignore[no-untyped-call]
        return loss_sum.detach()

    def _agree(self, count: int, num_tokens: int) -> Callable[[], StepConsensus]:
        """Begins the step's one small all-reduce: its count, the ranks' flags, and the losses of the step before.

        What is returned waits for it when first called, raising ConfigError if the step has nothing to learn from.
        """
        save = self._save_is_wanted() if self.world.rank == 0 else PlannedSave.NO
        stop, trouble = self.control.stop_requested(), self.checkpointer.has_failed_or_superseded
        wait = self._add(count, num_tokens, float(stop), float(save.value), float(trouble))

        @cache
        def agreed() -> StepConsensus:
            self.control.at(StepPhase.AGREE, self.step)
            count_sum, token_sum, stop_sum, save_sum, trouble_sum = wait()
            self.control.at(StepPhase.COMPUTE, self.step)
            if not count_sum:
                raise ConfigError(
                    f"step {self.step + 1} has nothing to learn from: none of its samples has a target",
                    hint="take such rows out of the data, or set a larger train.batch",
                )
            return StepConsensus(count_sum, token_sum, stop_sum > 0, PlannedSave(int(save_sum)), trouble_sum > 0)

        return agreed

    def _settle(self) -> None:
        """Adds up the losses of the step before now, because somebody wants to know them."""
        if self._pending is not None:
            self._add(0)()

    def _add(self, *head: float) -> Callable[[], list[float]]:
        """Begins to add `head` over the ranks, and the losses of the step before, which go to the journal.

        Each micro-batch's loss has a place of its own, zero on every rank but one, so that adding over the ranks is
        exact; they are then added up in micro-batch order.
        """
        values = torch.zeros(len(head) + self.plan.batch // self.plan.micro_batch, dtype=torch.float64)
        values[: len(head)] = torch.tensor(head, dtype=torch.float64)
        pending, self._pending = self._pending, None
        for micro, loss_sum in (pending.micro_losses if pending else {}).items():
            values[len(head) + micro] = loss_sum.double().cpu()
        wait = self.world.add_meanwhile(values)

        def added() -> list[float]:
            sums: list[float] = wait().tolist()
            if pending is not None:
                self._log(pending, sum(sums[len(head) :]))
            return sums[: len(head)]

        return added

    def _save_is_wanted(self) -> PlannedSave:
        """Rank 0: whether somebody outside or time asks for a save."""
        if reason := self.control.save_requested():
            self._tell("save-requested", step=self.step + 1, reason=reason)
            return PlannedSave.URGENT
        return PlannedSave.DUE if self._pace.is_due() else PlannedSave.NO

    def _log(self, done: DeferredMetrics, loss_sum: float) -> None:
        loss = loss_sum / done.count
        if math.isfinite(loss):
            self.metrics["loss"] = loss
        if self.world.rank == 0:
            event = {
                "step": done.step + 1,
                "loss": loss if math.isfinite(loss) else None,
                "lr": done.lr,
                "grad_norm": done.grad_norm.item() if done.grad_norm is not None else None,
                "count": int(done.count),
                "tokens": int(done.num_tokens),
                "seconds": round(done.seconds, 4),
                "ended_at": round(done.ended_at, 4),
            }
            self._tell("step", **event)

    # -- evaluating and saving -----------------------------------------------------------------------------------------

    def _evaluation_is_due(self, last: bool) -> bool:
        every = self.config.train.eval_interval
        due = every is not None and every.due_at_step(self.step, self.plan.batch, self.plan.num_samples)
        return self.eval_data is not None and (last or due)

    def _evaluate(self) -> bool:
        assert self.eval_data is not None
        train = self.config.train
        began = time.monotonic()
        self._settle()
        self.control.at(StepPhase.EVALUATE, self.step)
        fault_point(FaultPoint.EVALUATING, self.step)
        found = evaluate(self.model, self.task, self.eval_data, self.world, train.micro_batch, train.precision)
        self.metrics |= found
        self.log_history.append({"step": self.step, "epoch": self.plan.epoch(self.step), **found})
        self._tell("eval", step=self.step, **found, seconds=round(time.monotonic() - began, 4))
        return True

    def _is_over(self) -> bool:
        """Whether no step is left to do; the same on all ranks and after a resume."""
        stopping = self.config.train.early_stopping
        too_long = stopping is not None and patience(stopping, self.log_history).num_waited >= stopping.patience
        return too_long or self.step == self.plan.num_steps

    def _tell_early_stop(self) -> None:
        stopping = self.config.train.early_stopping
        assert stopping is not None
        best = patience(stopping, self.log_history)
        reason = f"{best.num_waited} evaluations without a better {stopping.metric}"
        self._tell("early-stop", step=self.step, reason=reason, best=best.best, best_step=best.best_step)

    def _get_ready_to_save(self) -> None:
        """After the first step, when the optimizer has its state: takes the memory that saves will need."""
        if self.config.checkpoint.overlap:
            self.checkpointer.reserve(self.model, self.optimizer)
        if self.world.rank == 0:
            self._pace.first_step_is_done()

    def _save(self, *, urgent: bool, skippable: bool) -> bool:
        """Saves the state after `self.step` steps. False when superseded.

        Args:
            urgent: Go on only when it is committed.
            skippable: It may be left out while another save is in flight.
        """
        self.control.at(StepPhase.SAVE, self.step)
        self._settle()
        metrics = dict(self.metrics)
        if not (self.log_history and self.log_history[-1]["step"] == self.step):
            metrics = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
        state = {
            "step": self.step,
            "epoch": self.plan.epoch(self.step),
            "position": self.step * self.plan.batch % self.plan.num_samples,
            "metrics": self.metrics,
            "log_history": self.log_history,
            "num_threads": torch.get_num_threads(),
            "scaler": scaler_state(self.scaler),
            "groups": group_numbers(self.optimizer),
            "left_out": self._finite.left_out,
        }
        files = {"trainer_state.json": self._trainer_state()}
        saver = self.checkpointer
        if not skippable and not saver.wait():
            return False
        save = saver.save if urgent or not self.config.checkpoint.overlap else saver.async_save
        self._pace.saved(urgent=urgent)
        return save(self.step, self.model, self.optimizer, state, metrics=metrics, files=files)

    def _trainer_state(self) -> bytes:
        """What the Hugging Face Trainer would leave here, for tools that read it."""
        state = {
            "global_step": self.step,
            "epoch": self.plan.epoch(self.step),
            "max_steps": self.plan.num_steps,
            "num_train_epochs": math.ceil(self.plan.epoch(self.plan.num_steps)),
            "train_batch_size": self.plan.micro_batch,
            "log_history": self.log_history,
            "is_world_process_zero": True,
            "is_local_process_zero": True,
        }
        return json.dumps(state, indent=1, sort_keys=True).encode() + b"\n"

    def _resume(self) -> bool:
        """Restores the resume point, if there is one. Returns True on a fresh start."""
        state = self.checkpointer.resume(self.model, self.optimizer)
        if state is None:
            if not self.checkpointer.superseded:
                self._finite.restore(self.checkpointer, [])
            return not self.checkpointer.superseded
        self.step, self.metrics, self.log_history = state["step"], state["metrics"], state["log_history"]
        load_scaler(self.scaler, state["scaler"])
        load_group_numbers(self.optimizer, state["groups"])
        self._finite.restore(self.checkpointer, state.get("left_out", []))
        return False

    def _finish(self) -> Outcome:
        """Publishes the model."""
        self.control.at(StepPhase.FINISH, self.step)
        for source in self._candidates():
            try:
                published = self.checkpointer.finish(source, self.step)
            except DamagedError as error:
                self._tell("rejected", checkpoint=str(source), reasons=[error.message])
                continue
            return Outcome.SUPERSEDED if published is None else Outcome.DONE
        raise NoCheckpointError(
            f"run {self.config.name!r} is trained, and no checkpoint is whole enough to publish",
            hint="`outlast checkpoints verify` names what is damaged",
        )

    def _candidates(self) -> list[CheckpointRef]:
        """What may be published: the best first if the best is wanted, then the newest first."""
        accepted = self.checkpointer.accepted
        rated = [RetentionCandidate(item.ref, item.metrics) for item in accepted]
        best = self.config.checkpoint.retention.best(rated) if self.config.checkpoint.load_best else []
        return list(dict.fromkeys([*(item.ref for item in best), *(item.ref for item in accepted)]))

    def _tell(self, kind: str, /, **fields: Any) -> None:
        if self.checkpointer.journal is not None:
            self.checkpointer.journal.event(kind, **fields)
            self.control.progress({"event": kind, **fields})
