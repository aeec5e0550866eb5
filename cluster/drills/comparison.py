"""Comparison of two runs that should be equal: what differs, where it begins, and why.

Weights and moments are compared bit by bit, losses number by number. Nothing here changes a run.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.reader import read_tensors
from outlast.checkpointing.restore.verify import tensor_digest, tensor_digests
from outlast.checkpointing.run_store.catalog import build_catalog, run_events
from outlast.checkpointing.run_store.events import Event, StepEvent, parse_event
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.state.named_weights import named_weights
from outlast.checkpointing.tools.diff import ChangeKind, compare_tensors
from outlast.cluster.formatting import counted
from outlast.trainers.checks.model_checks import check_model
from outlast.trainers.config.train import Exactness
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.models.build import build_model, weight_naming
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.tasks.base import find_task
from outlast.trainers.user_code import make_importable

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class FinalState:
    """SHA-256 of every weight and optimizer tensor, and all losses of each step over all attempts."""

    weights: dict[str, str]
    optimizer: dict[str, str]
    losses: dict[int, set[float | None]]


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """Where a run begins to differ from the undisturbed one."""

    step: int | None  #: the first step whose loss differs; None if all losses agree
    losses: tuple[float | None, float | None]  #: loss of that step in the undisturbed run, and in this one
    checkpoint: int | None  #: step of the first checkpoint that differs, of those that both have; None if they agree
    tensor: str  #: its first tensor that differs, in the order of the model, weights before moments
    largest: float | None  #: largest absolute difference of an element of that tensor; None unless shapes are equal
    before_fault: bool  #: whether a difference occurred before the fault

    def __str__(self) -> str:
        places = []
        if self.step is not None:
            expected, found = ("none" if loss is None else f"{loss:.9g}" for loss in self.losses)
            places.append(f"loss of step {self.step} ({found}, undisturbed {expected})")
        if self.checkpoint is not None:
            size = "" if self.largest is None else f" (by up to {self.largest:.2g})"
            places.append(f"{self.tensor}{size} in checkpoint {self.checkpoint}")
        return ", ".join(places)


class DifferenceCause(StrEnum):
    """Why a run does not end with the bits of the undisturbed one."""

    NOT_DETERMINISTIC = "not-deterministic"  #: undisturbed runs differ from each other
    RESUME = "resume"  #: undisturbed runs agree, and only resumed ones differ


def events_of(store: RunStore, kind: type[E]) -> list[E]:
    """All events of one kind, lowest attempt first."""
    return [event for _, body in run_events(store) if isinstance(event := parse_event(body), kind)]


def final_state(store: RunStore) -> FinalState:
    """Return the final state of a finished run."""
    newest = build_catalog(store).accepted[0]
    state = FinalState({}, {}, {})
    for name, digest in tensor_digests(store.storage, store.checkpoint_dir(newest.ref), newest).items():
        (state.optimizer if "/" in name else state.weights)[name] = digest
    for event in events_of(store, StepEvent):
        state.losses.setdefault(event.step, set()).add(event.loss)
    return state


def differences(one: FinalState, other: FinalState) -> list[str]:
    """Return the names of the tensors, and the steps of the losses, that differ."""
    tensors, expected = one.weights | one.optimizer, other.weights | other.optimizer
    names = sorted(name for name in tensors.keys() | expected.keys() if tensors.get(name) != expected.get(name))
    steps = sorted(one.losses.keys() | other.losses.keys())
    return names + [f"loss of step {step}" for step in steps if one.losses.get(step) != other.losses.get(step)]


def first_difference(
    store: RunStore,
    undisturbed: RunStore,
    order: Sequence[str],
    *,
    fault_at: float | None = None,
    resumed_from: int | None = None,
) -> FirstDifference | None:
    """Find where a run begins to differ from the undisturbed one; None if losses and common checkpoints agree.

    Args:
        store: The run.
        undisturbed: The run to compare it with.
        order: Names of the weights in the order of the model.
        fault_at: Time of the fault, in seconds since the epoch; None if there was none.
        resumed_from: Step of the checkpoint that the run resumed from after the fault.
    """
    expected = {event.step: event.loss for event in events_of(undisturbed, StepEvent)}
    events = [event for event in events_of(store, StepEvent) if event.loss != expected.get(event.step)]
    event = min(events, key=lambda event: event.step, default=None)
    checkpoint, tensor, largest = _first_tensor(store, undisturbed, order) or (None, "", None)
    if event is None and checkpoint is None:
        return None
    before_fault = (
        fault_at is None
        or any((event.ended_at or event.t) <= fault_at for event in events)
        or (checkpoint is not None and resumed_from is not None and checkpoint <= resumed_from)
    )
    losses = (None, None) if event is None else (expected.get(event.step), event.loss)
    return FirstDifference(None if event is None else event.step, losses, checkpoint, tensor, largest, before_fault)


def _first_tensor(store: RunStore, undisturbed: RunStore, order: Sequence[str]) -> tuple[int, str, float | None] | None:
    """Return step, name and largest difference of the first tensor that differs in a checkpoint that both have."""
    place = {name: index for index, name in enumerate(order)}
    mine, theirs = _manifests(store), _manifests(undisturbed)
    for step in sorted(mine.keys() & theirs.keys()):
        found = read_tensors(store.storage, store.checkpoint_dir(mine[step].ref), mine[step])
        expected = read_tensors(undisturbed.storage, undisturbed.checkpoint_dir(theirs[step].ref), theirs[step])
        names = found.keys() | expected.keys()
        # Moments are called WEIGHT/exp_avg.
        for name in sorted(names, key=lambda name: ("/" in name, place.get(name.split("/")[0], len(place)), name)):
            change = compare_tensors(name, expected.get(name), found.get(name))
            if change.change is not ChangeKind.EQUAL:
                return step, name, change.largest
    return None


def _manifests(store: RunStore) -> dict[int, Manifest]:
    return {manifest.ref.step: manifest for manifest in build_catalog(store).accepted}


def weight_order(config: TrainingConfig, store: RunStore, code: str) -> list[str]:
    """Return the names of a run's saved weights in the order of the model."""
    make_importable(code)
    model, _ = check_model(config, prepare(config, store.storage), store.storage)
    return list(named_weights(model, weight_naming(model)))


def unequal_builds(config: TrainingConfig, store: RunStore, code: str) -> list[str]:
    """Build the model of a new run twice, each time in a new process. Return the tensors whose bytes differ."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        first, second = pool.map(_build, *zip(*[(config, store, code)] * 2, strict=True))
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def _build(config: TrainingConfig, store: RunStore, code: str) -> Mapping[str, str]:
    make_importable(code)
    prepared = prepare(config, store.storage)
    tokenizer = prepared.tokenizer(store.storage)
    task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
    model, _ = build_model(config.model, task, tokenizer, config.seed, fresh=True)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor_digest(tensor.detach()) for name, tensor in tensors.items()}


def explain(cause: DifferenceCause, config: TrainingConfig, builds: Sequence[str] | None) -> str:
    """Explain a cause in a paragraph.

    Args:
        cause: The cause.
        config: The settings of the run.
        builds: Result of `unequal_builds`; None if it was not called.
    """
    if cause is DifferenceCause.RESUME:
        text = (
            "The undisturbed copy was repeated and gave the same bits, so kernels and code are deterministic; only "
            "resumed copies differ. A resume checks the layout, flags and buffers of the model it builds. So model or "
            "task keep state from step to step that no checkpoint holds (plain attributes, caches), or their "
            "constructors do something else in a resumed run."
        )
    elif builds:
        text = (
            "Undisturbed copies differ, because the model is not built the same each time: "
            f"{counted(len(builds), 'tensor')} of two new models differ, first {builds[0]}. Its constructor uses "
            "random numbers without the run's seed."
        )
    else:
        text = (
            "Undisturbed copies differ: a kernel, or code of the task or of the model's forward pass, is not "
            "deterministic (a clock, random numbers without the run's seed, the order of a set)."
        )
        text += " The model is built the same each time." if builds is not None else ""
    if not config.deterministic:
        text += " `deterministic: false` allows kernels that are not deterministic."
    if config.exactness is Exactness.FAST:
        text += " `exactness: fast` does not fix the order in which gradients are added."
    return text
