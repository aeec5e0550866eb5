"""A training that outlives the loss of its processes: attempts that follow each other in memory, by generation.

Each generation of the group is an attempt of its own: it claims the run before its first commit, so a member of an
older one that was only cut off can commit nothing that counts. The first generation resumes from the storage as any
attempt. Each later one takes the state from the rank that has done the most steps; the step that was interrupted is
computed again from its beginning, and nothing that was applied is done twice.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from outlast.checkpointing import fault_injection as faults
from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.regrouping_checkpointer import RegroupingCheckpointer
from outlast.checkpointing.run_store.attempt_claim import Continuation, Origin
from outlast.checkpointing.run_store.events import (
    CommitEvent,
    EvalEvent,
    PlanEvent,
    RegroupedEvent,
    StepEvent,
    UnderWayEvent,
    parse_event,
)
from outlast.checkpointing.storage.base import Storage
from outlast.trainers.attempt import (
    Assignment,
    BuiltModel,
    LoopOptions,
    PreparedAttempt,
    build,
    claim_attempt,
    make_loop,
    prepare_attempt,
)
from outlast.trainers.config.train import TrainSettings
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.distributed.process_group import GenerationWorld, GroupConnections, connect, disconnect
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.control import Control
from outlast.trainers.loop.non_finite import NonFiniteError, RolledBack
from outlast.trainers.loop.optimizer import make_optimizer
from outlast.trainers.loop.rank_activity import StepPhase
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.regrouping.membership import CONFIRM_S, Member, RegroupFailed, Seat
from outlast.trainers.regrouping.peer_state import share_state
from outlast.trainers.user_code import make_importable

#: An error that is not of a collective is rarely the consequence of a loss.
_CONFIRM_OWN_S = 0.1
#: Events that count for an attempt, and how long they wait for its claim.
_PROGRESS, _HOLD_S = (PlanEvent, UnderWayEvent, StepEvent, EvalEvent, CommitEvent), 10.0
#: What the attempts of one training in memory declare alike, besides their settings.
_DECLARED = ("num_threads", "static_graph", "base")


@dataclass
class MemberControl:
    """A `Control` that also tells the roster which step this process is at.

    After `hold`, progress waits until the attempt is claimed: before, it would count as the last attempt's. It does not
    wait for a storage that refuses, nor do other events, such as of a save that failed.
    """

    inner: Control
    member: Member
    _held: list[dict[str, Any]] | None = field(default=None, init=False)
    _held_at: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def hold(self) -> None:
        with self._lock:
            self._held, self._held_at = [], time.monotonic()

    def stop_requested(self) -> bool:
        return self.inner.stop_requested()

    def save_requested(self) -> str | None:
        return self.inner.save_requested()

    def claimed(self, attempt: str, *first: dict[str, Any]) -> None:
        with self._lock:
            self.inner.claimed(attempt)
            for event in first:
                self.inner.progress(event)
            self._release()

    def at(self, phase: StepPhase, step: int) -> None:
        self.member.at_step(step)
        self.inner.at(phase, step)

    def worked(self, seconds: float) -> None:
        self.inner.worked(seconds)

    def progress(self, event: dict[str, Any]) -> None:
        with self._lock:
            if self._held is not None and time.monotonic() - self._held_at > _HOLD_S:
                self._release()
            if self._held is None or not isinstance(parse_event(event), _PROGRESS):
                self.inner.progress(event)
            else:
                self._held.append({"t": time.time(), **event})

    def _release(self) -> None:
        held, self._held = self._held, None
        for event in held or ():
            self.inner.progress(event)


@dataclass(frozen=True)
class Environment:
    """What surrounds a member.

    Attributes:
        control: The connection to the environment.
        device: Device of this process.
        backend: Of the gradients: gloo or nccl.
        node: Name of the machine in the cluster.
        log: Path of this process' standard error, if it is kept.
        marks: When this process reached what comes before its first generation, in seconds since the epoch.
        watch: Entered by every rank of a generation for its duration.
        is_stopping: Whether the run is to stop; asked while a lost process is not replaced.
        failing: Called with an error that a restart does not fix, before this process leaves the group.
    """

    control: Control
    device: torch.device
    backend: str = "gloo"
    node: str = ""
    log: str = ""
    marks: Mapping[str, float] = field(default_factory=dict)
    watch: Callable[[World], AbstractContextManager[Any]] = lambda world: nullcontext()
    is_stopping: Callable[[], bool] = lambda: False
    failing: Callable[[OutlastError], object] = lambda error: None


def run_in_place(
    assignment: Assignment,
    storage: Storage,
    join: Callable[[], Member],
    environment: Environment,
    *,
    is_spare: bool = False,
    wait_s: float = 60.0,
) -> Outcome:
    """Train as a member of a group that regroups after losses, until the run ends.

    Args:
        assignment: The work.
        storage: The storage root.
        join: Joins the group; a spare does so when its model is built.
        environment: What surrounds this process.
        is_spare: Whether this process waits to replace another one.
        wait_s: Longest time without a group after a loss: beyond it, a restart of all is better.

    Returns:
        How the run ended. If it is stopped while a lost process is not replaced, the steps since the newest checkpoint
        are lost.

    Raises:
        RegroupFailed: The group cannot go on in memory.
        OutlastError: As `run_attempt`.
    """
    built = _build_spare(assignment, storage, environment.device) if is_spare else None
    member = join()
    training = _Training(assignment, storage, environment, MemberControl(environment.control, member), member, built)
    outcome: Outcome | None = None
    try:
        seat = member.take_seat()
        while seat is not None:
            if (outcome := training.run(seat)) is not None:
                break
            if (seat := member.take_seat(wait_s, environment.is_stopping)) is None and not member.outcome:
                outcome = Outcome.STOPPED
        if outcome is not None:
            member.finish(outcome.value)
        return Outcome(member.outcome)
    except OutlastError as error:
        if error.permanent:
            environment.failing(error)
        member.give_up(error)
        raise
    except Exception as error:
        member.fail(error)
        raise
    finally:
        member.leave()


@dataclass
class _Training:
    """This process' part in the training, and what it keeps from one generation to the next."""

    assignment: Assignment
    storage: Storage
    environment: Environment
    control: MemberControl
    member: Member
    built: BuiltModel | None
    held: PreparedAttempt | None = None

    def run(self, seat: Seat) -> Outcome | None:
        """Train as a member of one generation. Returns None if it has ended because a process was lost."""
        connections, number = GroupConnections(), seat.generation.number
        self.member.abort = connections.abort
        try:
            marks = {"noticed": self.member.noticed_at, "seat": time.time()}
            connect(connections, seat.meeting, number, seat.rank, seat.size, self.environment.backend)
            world = self._world(connections, number)
            marks["group"] = time.time()
            with self.environment.watch(world):
                if number:
                    self.held = _regroup(
                        self.assignment, self.storage, world, self.control, seat, self.held, self.built, marks
                    )
                else:
                    self.held = prepare_attempt(self.assignment, self.storage, world, self.control, may_regroup=True)
                if self.held is None:
                    return Outcome.SUPERSEDED
                self.held = replace(self.held, members=seat.generation.members)
                return self.held.train()
        except Exception as error:  # raised again unless the generation has ended
            if not _is_of_loss(error, self.member, seat):
                if self.held is not None:
                    self.held.record_error(error)
                raise
            connections.abort()
            if self.held is not None:
                self.held.loop.drop_step()
                self.held.checkpointer.abandon()
                self.built = self.held.built
        disconnect()
        self.member.abort = lambda: None
        return None

    def _world(self, connections: GroupConnections, number: int) -> GenerationWorld:
        environment = self.environment
        marks = {} if number else environment.marks
        return GenerationWorld(connections, environment.device, environment.node, environment.log, marks)


def _is_of_loss(error: Exception, member: Member, seat: Seat) -> bool:
    """Return whether an error is the consequence of the end of the generation."""
    if isinstance(error, RegroupFailed | NonFiniteError | RolledBack):
        return False  # every rank raises them
    if isinstance(error, OutlastError):
        return member.has_ended(seat.generation.number) and not error.permanent
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    is_of_group = "gloo" in str(error) or any("torch/distributed" in name for name in files)
    return member.has_ended(seat.generation.number, CONFIRM_S if is_of_group else _CONFIRM_OWN_S)


def _build_spare(assignment: Assignment, storage: Storage, device: torch.device) -> BuiltModel:
    """Build what a spare needs, all but the state."""
    make_importable(assignment.code)
    make_deterministic(assignment.config.deterministic, assignment.num_threads)
    built = build(assignment, storage, fresh=False)
    built.model.to(device)
    _rehearse(built, assignment.config.train, device)
    return built


def _rehearse(built: BuiltModel, train: TrainSettings, device: torch.device) -> None:
    """Run one pass and drop its result: the first pass of a process takes several times as long as the next ones."""
    model, buffers = built.model, {name: buffer.clone() for name, buffer in built.model.named_buffers()}
    samples = range(min(train.micro_batch, len(built.data[0])))  # a model may refuse fewer than it will get
    batch = built.task.collate(built.data[0].take(samples), list(samples))
    was_training = model.training
    model.train()
    built.task.loss_sum(model, {key: value.to(device) for key, value in batch.items()}).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    layer = nn.Linear(2, 2, device=device)
    layer(torch.ones(1, 2, device=device)).sum().backward()
    make_optimizer(layer, train).step()


def _regroup(
    assignment: Assignment,
    storage: Storage,
    world: GenerationWorld,
    control: MemberControl,
    seat: Seat,
    held: PreparedAttempt | None,
    built: BuiltModel | None,
    marks: dict[str, float],
) -> PreparedAttempt | None:
    """Prepare the next attempt in memory; its claim is made in the background. Every rank calls it.

    If no rank holds a state it resumes from the storage; then None if a later launch has claimed the run.
    """
    loop, tracking = (held.loop, held.tracking) if held is not None else (None, None)
    if not any(world.gather(loop is not None and loop.progress is not None)):
        prepared = prepare_attempt(assignment, storage, world, control, may_regroup=True, tracking=tracking)
        if prepared is not None:
            prepared.checkpointer.origin = Origin(prepared.checkpointer.attempt, seat.generation.number)
        return prepared
    if built is None:
        built = _build_spare(assignment, storage, world.device)
    faults.arm(assignment.faults, world.rank)
    optimizer = loop.optimizer if loop is not None else make_optimizer(built.model, assignment.config.train)
    progress = loop.progress if loop is not None else None
    mine = _state_of(held) if held is not None and progress is not None else None
    forget = loop.forget_state if loop is not None else lambda: None
    source, state = share_state(world, built.model, optimizer, progress, mine, forget)
    world.has_equal_weights = all(parameter.requires_grad for parameter in built.model.parameters())
    marks["state"] = time.time()
    continues = Continuation(_origin(state), seat.generation.number, state["step"])
    checkpointer = claim_attempt(assignment, storage, world, continues, lambda: world.is_aborted)
    checkpointer.files, checkpointer.naming = built.files, built.naming
    checkpointer.declaration |= state["declared"]
    make_deterministic(assignment.config.deterministic, state["declared"]["num_threads"])
    options = LoopOptions(may_regroup=True, optimizer=optimizer, tracking=tracking)
    prepared = make_loop(assignment, world, control, checkpointer, built, options)
    lost = {name: rank for rank, name in enumerate(state["members"]) if name not in seat.generation.members}
    began = RegroupedEvent(
        step=state["step"],
        attempt=state["attempt"],
        lost=tuple(lost),
        ranks=tuple(lost.values()),
        source=source,
        world_size=world.size,
        noticed_at=marks.get("noticed"),
        marks={name: round(at, 4) for name, at in marks.items()},
    )

    if world.rank == 0:
        control.hold()

    def claimed(before: AttemptId) -> None:
        control.claimed(str(checkpointer.attempt), replace(began, attempt=str(before)).to_json())

    kept = prepared.loop.load_in_memory(state)
    for event in (began, *kept):  # trackers leave out what they have
        prepared.tracking.apply(event.to_json())
    before = loop.checkpointer.journal if loop is not None else None
    checkpointer.go_on_in_memory(began, kept, before, claimed)
    if prepared.loop.is_over:
        checkpointer.settle()
    return prepared


def _state_of(held: PreparedAttempt) -> dict[str, Any]:
    loop = held.loop
    declared = {name: value for name, value in loop.checkpointer.declaration.items() if name in _DECLARED}
    checkpointer = loop.checkpointer
    assert isinstance(checkpointer, RegroupingCheckpointer)
    origin = [str(checkpointer.origin.attempt), checkpointer.origin.generation]
    return {
        **loop.state_in_memory(),
        "declared": declared,
        "attempt": str(checkpointer.attempt),
        "origin": origin,
        "members": held.members,
    }


def _origin(state: Mapping[str, Any]) -> Origin:
    name, generation = state["origin"]
    attempt = AttemptId.parse(name)
    assert attempt is not None
    return Origin(attempt, generation)
