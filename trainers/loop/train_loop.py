"""The training loop: when to evaluate, save and stop, and how an attempt ends.

`train_step` computes a step; the loop decides what happens between two of them. It must never import Ray: a `Control`
passes it requests to stop or save, and receives its progress.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import DamagedError, NoCheckpointError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format.layout import LOOP_STATE, CheckpointRef, checkpoint_name
from outlast.checkpointing.regrouping_checkpointer import RegroupingCheckpointer
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.retention_policy import RetentionCandidate
from outlast.checkpointing.run_store.typed_json import misfits
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import Samples
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.memory_snapshots import MemorySnapshots
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.evaluation import evaluate
from outlast.trainers.loop.event_log import EventLog, recorded_events
from outlast.trainers.loop.log_history import LogHistory, patience_state
from outlast.trainers.loop.non_finite import NonFiniteError
from outlast.trainers.loop.rank_activity import StepPhase
from outlast.trainers.loop.save_timer import SaveFailures, SaveTimer
from outlast.trainers.loop.step_exchange import PlannedSave, StepRequests
from outlast.trainers.loop.train_step import TrainStep
from outlast.trainers.tasks.base import Task

#: Steps, entries of the history, and whether the newest step's end is done: more of it is newer.
Progress = tuple[int, int, int]

#: The loop state by key, as the loop and its parts rely on it.
_STATE = {
    "step": int,
    "metrics": Mapping[str, float],
    "log_history": tuple[Mapping[str, float], ...],
    "unlogged": tuple[float, ...],
    "scaler": Mapping[str, float],
    "groups": tuple[Mapping[str, bool | int | float], ...],
    "left_out": tuple[int, ...],
}
_LATER = {"unlogged", "left_out"}  #: earlier releases left them out


class Outcome(Enum):
    """How an attempt ended without failing."""

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
        control: The connection to the environment.
        listeners: Called with each event before `control`, on rank 0.
        static_graph: Whether each backward pass is known to give every trained parameter a gradient.
        may_regroup: Keep on every rank what the others need to go on in memory if this one is lost.
        snapshots_of: Keep snapshots in memory for this launch; None for none.
        optimizer: The optimizer of a training that goes on in memory.

    Attributes:
        step: Steps done.
    """

    def __init__(
        self,
        config: TrainingConfig,
        world: World,
        checkpointer: RegroupingCheckpointer,
        model: nn.Module,
        task: Task,
        train_data: Samples,
        eval_data: Samples | None,
        control: Control,
        *,
        listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
        static_graph: bool = False,
        may_regroup: bool = False,
        snapshots_of: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.config, self.world, self.checkpointer, self.model = config, world, checkpointer, model
        self.task, self.eval_data, self.control = task, eval_data, control
        self._static_graph = static_graph
        self.step = 0
        self._is_in_memory = self._lacks_first_evaluation = False
        self._owes_save = False  # one was in flight when a rank was lost
        self._unfinished: StepRequests | None = None  # of the newest step, until its end is done
        self.metrics: dict[str, float] = {}
        self.plan = make_plan(config, len(train_data), world.size)
        self.history = LogHistory(self.plan, config.train.log_every)
        keeps = may_regroup or (snapshots_of is not None and world.rank == 0)
        self._log = EventLog(checkpointer, self.history, *listeners, control.progress, keeps=keeps)
        self._snapshots = (
            None
            if snapshots_of is None
            else MemorySnapshots(config, snapshots_of, world, checkpointer, self._log.write)
        )
        self._train_step = TrainStep(
            config,
            self.plan,
            world,
            model,
            task,
            train_data,
            control,
            self._log,
            optimizer=optimizer,
            settles_at_once=may_regroup,
        )
        self._save_timer = SaveTimer(config.checkpoint.every, checkpointer)
        self._save_failures = SaveFailures(config.failure, checkpointer, world, self._log)

    def run(self) -> Outcome:
        """Run to one of the three outcomes. Raises what the checkpointer and the steps raise."""
        outcome = self._run()
        if self._snapshots is not None:
            self._snapshots.close(is_over=outcome is not Outcome.SUPERSEDED)
        return outcome

    def _run(self) -> Outcome:
        if not self._is_in_memory:
            is_fresh = self._resume()
            self.world.mark("restore")
            if self.checkpointer.superseded:
                return Outcome.SUPERSEDED
            self._is_in_memory = True
            self._lacks_first_evaluation = is_fresh and self.eval_data is not None
        self._train_step.prepare(static_graph=self._static_graph)
        plan = {"num_steps": self.plan.num_steps, "batch": self.plan.batch}
        self._log.write(events.PlanEvent(**plan, world_size=self.world.size, step=self.step))
        if self._lacks_first_evaluation:
            self._evaluate()
            self._lacks_first_evaluation = False
        is_first = True
        while self._unfinished is not None or not self.is_over:
            if self._unfinished is None:
                self._unfinished = self._update()
                if is_first:
                    self._first_step_done()
                    is_first = False
            if outcome := self._end_step(self._unfinished):
                return outcome
            self._unfinished = None
        return self._finish()

    def _end_step(self, agreed: StepRequests) -> Outcome | None:
        """Evaluate, save and stop after a step, as due. Returns how the attempt ends, if it does."""
        if agreed.trouble and not self._save_failures.guard(self.checkpointer.wait, self.step):
            return Outcome.SUPERSEDED
        if is_evaluated := self._evaluation_is_due():
            self._evaluate()
        is_over = self.is_over
        if is_over and self.step < self.plan.num_steps:
            self._record_early_stop()
        if not self._save_if_due(agreed, is_evaluated=is_evaluated, is_over=is_over):
            return Outcome.SUPERSEDED
        if agreed.snapshot and agreed.num_idle == self.world.size and not (agreed.stop or is_over):
            self._take_snapshot()
        if agreed.stop and not is_over:
            self._log.write(events.StopEvent(step=self.step))
            self.checkpointer.flush()
            return Outcome.STOPPED
        return None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._train_step.optimizer

    @property
    def progress(self) -> Progress | None:
        """How far this rank is; None before it has a state."""
        if not self._is_in_memory:
            return None
        return self.step, len(self.history.entries), int(self._unfinished is None)

    def state_in_memory(self) -> dict[str, Any]:
        """Return all that another rank needs to go on from here, besides the tensors."""
        agreed = self._unfinished
        return {
            "step": self.step,
            "metrics": self.metrics,
            **self.history.state(),
            **self._train_step.state_in_memory(),
            "unfinished": None if agreed is None else [agreed.stop, agreed.save.value, agreed.trouble],
            "lacks_first_evaluation": self._lacks_first_evaluation,
            "static_graph": self._static_graph,
            "owes_save": self._owes_save,
            "waited_s": self._save_timer.waited_s,
            "kept": [event.to_json() for event in self._log.kept],
        }

    def drop_step(self) -> None:
        """Drop what an interrupted step has begun, and a save in flight, which is then begun again later."""
        self._owes_save |= self.checkpointer.is_busy or self.checkpointer.has_failed_or_superseded
        self._train_step.drop()

    def forget_state(self) -> None:
        """Record that this rank holds no state, because its tensors are about to be overwritten."""
        self._is_in_memory = False

    def load_in_memory(self, state: Mapping[str, Any]) -> list[events.StepEvent | events.EvalEvent]:
        """Take over `state_in_memory` of any rank, whose tensors are here already. `run` then goes on from there.

        Returns the events of steps that may not be in the run's journals.
        """
        self.step, self.metrics = state["step"], dict(state["metrics"])
        self.history.load(state)
        self._train_step.load_in_memory(state)
        agreed = state["unfinished"]
        # The save in flight is dropped, so there is none to wait for.
        self._unfinished = None if agreed is None else StepRequests(agreed[0], PlannedSave(agreed[1]), trouble=False)
        self._lacks_first_evaluation = state["lacks_first_evaluation"]
        self._static_graph, self._owes_save = state["static_graph"], state["owes_save"]
        self._save_timer.continue_after(state["waited_s"])
        self._is_in_memory = True
        for event in map(events.parse_event, state["kept"]):
            assert isinstance(event, events.StepEvent | events.EvalEvent)
            self._log.keep(event)
        return list(self._log.kept)

    def _record(self, kept: Sequence[Mapping[str, Any]], recorded: Collection[tuple[str, int]]) -> None:
        """Record the kept events of an earlier attempt, unless the run's journals have them."""
        for event in map(events.parse_event, kept):
            assert isinstance(event, events.StepEvent | events.EvalEvent)
            self._log.keep(event)
            if (event.kind, event.step) not in recorded:
                self._log.write(event)

    def _update(self) -> StepRequests:
        """Make one step. If it ends the run because it is not finite, save the state before it."""
        began = time.monotonic()
        try:
            agreed = self._train_step.update(self.step, self._requests)
        except NonFiniteError:
            if self.step:
                self._save(urgent=True, skippable=False)
            raise
        self.step += 1
        if self._snapshots is not None:
            self._snapshots.step_done(time.monotonic() - began)
        return agreed

    def _requests(self) -> StepRequests:
        """Return this rank's requests for the end of the step that has begun."""
        save = self._requested_save() if self.world.rank == 0 else PlannedSave.NO
        snapshot = (0, False) if self._snapshots is None else self._snapshots.requests()
        return StepRequests(self.control.stop_requested(), save, self.checkpointer.has_failed_or_superseded, *snapshot)

    def _requested_save(self) -> PlannedSave:
        """Return, on rank 0, whether a save is requested or due by time."""
        if reason := self.control.save_requested():
            self._log.write(events.SaveRequestedEvent(step=self.step + 1, reason=reason))
            return PlannedSave.URGENT
        return PlannedSave.DUE if self._owes_save or self._save_timer.is_due() else PlannedSave.NO

    def _first_step_done(self) -> None:
        """Reserve the memory that saves will need, now that the optimizer has its state."""
        if self.config.checkpoint.overlap:
            self.checkpointer.reserve(self.model, self._train_step.optimizer)
        if self._snapshots is not None:
            self._snapshots.first_step_done(self.model, self._train_step.optimizer)
        if self.world.rank == 0:
            self._save_timer.first_step_done()
        self._log.write(events.UnderWayEvent(step=self.step, marks=self.world.mark("first_step")))

    @property
    def is_over(self) -> bool:
        """Return whether no step is left; the same on all ranks and after a resume."""
        stopping = self.config.train.early_stopping
        too_long = (
            stopping is not None and patience_state(stopping, self.history.evaluations).num_waited >= stopping.patience
        )
        return too_long or self.step == self.plan.num_steps

    def _record_early_stop(self) -> None:
        stopping = self.config.train.early_stopping
        assert stopping is not None
        best = patience_state(stopping, self.history.evaluations)
        reason = f"{best.num_waited} evaluations without a better {stopping.metric}"
        self._log.write(events.EarlyStopEvent(step=self.step, reason=reason, best=best.best, best_step=best.best_step))

    def _evaluation_is_due(self) -> bool:
        every = self.config.train.eval_every
        is_due = every is not None and every.due_at_step(self.step, self.plan.batch, self.plan.num_samples)
        return self.eval_data is not None and (is_due or self.step == self.plan.num_steps)

    def _evaluate(self) -> None:
        if self.history.evaluations and self.history.evaluations[-1]["step"] == self.step:
            return  # before the group was formed anew
        assert self.eval_data is not None
        train = self.config.train
        began = time.monotonic()
        self._train_step.settle()
        self.control.at(StepPhase.EVALUATE, self.step)
        fault_point(FaultPoint.EVALUATING, self.step)
        scores = evaluate(self.model, self.task, self.eval_data, self.world, train.micro_batch, train.precision)
        self.metrics |= scores
        self.history.add_evaluation(self.step, scores)
        seconds = round(time.monotonic() - began, 4)
        self._log.evaluation(events.EvalEvent(step=self.step, scores=scores, seconds=seconds))

    def _save_if_due(self, agreed: StepRequests, *, is_evaluated: bool, is_over: bool) -> bool:
        """Save if a save is due. False when superseded."""
        is_due = self.config.checkpoint.every.due_at_step(self.step, self.plan.batch, self.plan.num_samples)
        may_be_best = is_evaluated and self.config.checkpoint.keep_best > 0
        urgent = agreed.stop or is_over or agreed.save is PlannedSave.URGENT
        if urgent or may_be_best or is_due or agreed.save is PlannedSave.DUE:
            return self._save(urgent=urgent, skippable=not may_be_best, is_last=agreed.stop or is_over)
        return True

    def _save(self, *, urgent: bool, skippable: bool, is_last: bool = False) -> bool:
        """Save the state after `self.step` steps. False when superseded.

        Args:
            urgent: Wait until it is committed.
            skippable: Skip it while another save is in flight.
            is_last: The attempt ends with it, so it must succeed.
        """
        self.control.at(StepPhase.SAVE, self.step)
        self._train_step.settle()
        if self._train_step.loss is not None:
            self.metrics["loss"] = self._train_step.loss
        checkpointer, guard = self.checkpointer, self._save_failures.guard
        in_flight = checkpointer.step_in_flight
        waits = urgent or not skippable or self._save_failures.earlier_save_failed()
        if waits and not guard(checkpointer.wait, self.step, is_last=is_last):
            return False
        if in_flight == self.step:
            return True  # committed, or failed just now: a step is written once
        metrics = dict(self.metrics)
        evaluations = self.history.evaluations
        if not (evaluations and evaluations[-1]["step"] == self.step):
            metrics = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
        state = self._loop_state()
        files = {"trainer_state.json": self._trainer_state()}
        method = checkpointer.save if urgent or not self.config.checkpoint.overlap else checkpointer.async_save
        self._save_timer.saved(urgent=urgent)
        self._owes_save = False

        def save() -> bool:
            return method(self.step, self.model, self._train_step.optimizer, state, metrics=metrics, files=files)

        return save() if is_last else guard(save, self.step)

    def _take_snapshot(self) -> None:
        """Begin a snapshot in memory."""
        assert self._snapshots is not None
        began = time.monotonic()
        self._train_step.settle()
        if self._train_step.loss is not None:
            self.metrics["loss"] = self._train_step.loss
        state, optimizer = self._loop_state(), self._train_step.optimizer
        self._snapshots.take(self.step, self.model, optimizer, state, self._log.kept, began)

    def _loop_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.plan.epoch(self.step),
            "position": self.step * self.plan.batch % self.plan.num_samples,
            "metrics": self.metrics,
            **self.history.state(),
            "num_threads": torch.get_num_threads(),
            **self._train_step.state(),
        }

    def _trainer_state(self) -> bytes:
        """Return the Hugging Face Trainer's `trainer_state.json`, for tools that read it."""
        settings = self.config.checkpoint
        state = self.history.trainer_state(self.step, settings.metric, settings.metric_mode)
        if settings.keep_best and state["best_global_step"] is not None:  # else it may not be kept, or never was saved
            state["best_model_checkpoint"] = checkpoint_name(state["best_global_step"])
        return json.dumps(state, sort_keys=True).encode() + b"\n"  # indented, it takes four times as long

    def _resume(self) -> bool:
        """Restore the resume point, if any. Returns True on a fresh start."""
        restored = self._snapshots.restore(self.model, self._train_step.optimizer) if self._snapshots else None
        state, kept = restored or (self.checkpointer.resume(self.model, self._train_step.optimizer), [])
        if self.checkpointer.superseded:
            return False
        if state is not None and not restored:
            self._check_state(state)
        self._train_step.load(state, self.checkpointer)
        if state is not None:
            self.step, self.metrics = state["step"], state["metrics"]
            self.history.load(state)
        if restored and self.world.rank == 0:
            self._record(kept, recorded_events(self.checkpointer, kept))
        return state is None

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise DamagedError for a state that no loop saved here: it may come from anywhere."""
        ref = self.checkpointer.accepted[0].ref
        num_groups = len(self._train_step.optimizer.param_groups)
        wrong = (_STATE.keys() - _LATER - state.keys()) | misfits(state, _STATE)
        if not wrong:
            faults = {
                "step": state["step"] != ref.step,
                "groups": len(state["groups"]) != num_groups or any("params" in group for group in state["groups"]),
                "log_history": not all(type(entry.get("step")) is int for entry in state["log_history"]),
                "unlogged": len(state.get("unlogged", (0.0, 0))) != 2,
            }
            wrong = {name for name, is_wrong in faults.items() if is_wrong}
        if wrong:
            raise DamagedError(
                f"{self.checkpointer.store.checkpoint_url(ref)}: {LOOP_STATE}: {', '.join(sorted(wrong))} cannot be "
                "that of this run",
                hint="move this checkpoint away to continue from the one before it",
            )

    def _finish(self) -> Outcome:
        """Publish the model."""
        self.control.at(StepPhase.FINISH, self.step)
        for source in self._candidates():
            try:
                published = self.checkpointer.finish(source, self.step)
            except DamagedError as error:
                self._log.write(events.ModelRejectedEvent(checkpoint=str(source), reasons=(error.message,)))
                continue
            return Outcome.SUPERSEDED if published is None else Outcome.DONE
        raise NoCheckpointError(
            f"run {self.config.name!r} is trained, but all its checkpoints are damaged; no model was published",
            hint="`outlast checkpoints verify` names what is damaged",
        )

    def _candidates(self) -> list[CheckpointRef]:
        """Return the checkpoints that may be published: with `load_best` the best first, then the newest first."""
        accepted = self.checkpointer.accepted
        rated = [RetentionCandidate(item.ref, item.metrics) for item in accepted]
        best = self.config.checkpoint.retention.best(rated) if self.config.checkpoint.load_best else []
        return list(dict.fromkeys([*(item.ref for item in best), *(item.ref for item in accepted)]))
