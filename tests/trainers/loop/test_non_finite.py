"""A step whose loss or gradient is not finite: stop, skip or roll back, killed and resumed to the same bits. 20 s."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import NonFinite
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.non_finite import MAX_IN_A_ROW, NonFiniteError, NonFiniteGuard, RolledBack
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import Ended, digests, fault, losses, newest, resumed, run_group

SIZE = 2
BAD_STEP = 5  # checkpoints are at 3, 6, 9 and 10
#: Counts its passes in a buffer that is saved, and breaks on one sample: the loss, or only the gradient.
BRITTLE = """
from types import SimpleNamespace
import torch
from torch import nn

class Brittle(nn.Module):
    def __init__(self, vocab_size, bad, spoil="loss", width=8):
        super().__init__()
        self.bad, self.spoil = bad, spoil
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, input_ids, **_):
        if self.training:
            self.passes += 1
        logits = self.head(self.embed(input_ids)) * (1 + self.passes / 100)
        if self.training and self.bad in input_ids.sum(1).tolist():
            if self.spoil == "loss":
                logits = logits * float("inf")
            else:
                logits.register_hook(lambda gradient: gradient * float("nan"))
        return SimpleNamespace(logits=logits)
"""

Bring = Callable[..., Assignment]


@pytest.fixture
def bring(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> Bring:
    """Makes the assignment of a run with one bad sample, in `BAD_STEP`."""
    (tmp_path / "brittle.py").write_text(BRITTLE)
    plain = assign("plain")
    plan = make_plan(plain.config, plain.prepared.num_samples, SIZE)
    [sample] = plain.prepared.split(storage, "train").take(plan.samples(plan.positions(BAD_STEP - 1)[-1:]))
    bad = int(sum(sample["input_ids"]))

    def make(
        name: str, mode: NonFinite, *, spoil: str = "loss", overlap: bool = False, **options: object
    ) -> Assignment:
        model = {"class": "brittle:Brittle", "config": {"bad": bad, "spoil": spoil}}
        failure = {"non_finite": mode.value}
        sections = {"model": model, "checkpoint": {"overlap": overlap}, "failure": failure}
        return replace(assign(f"finite-{name}", sections=sections, **options), code=str(tmp_path))

    return make


def non_finite_steps(storage: LocalStorage, run: str) -> list[tuple[int, str]]:
    return [
        (event["step"], event["action"])
        for _, event in run_events(RunStore(storage, run))
        if event["event"] == "non-finite"
    ]


def done(ended: list[Ended]) -> bool:
    return [item.outcome for item in ended] == [Outcome.DONE] * SIZE


@pytest.mark.parametrize(("precision", "spoil"), [("fp32", "loss"), ("fp32", "gradient"), ("fp16", "loss")])
def test_stop_keeps_the_state_before_the_step(precision: str, spoil: str, bring: Bring, storage: LocalStorage) -> None:
    """And the run that goes on from it, skipping, is the run that always skipped."""
    name = f"stop-{precision}-{spoil}"
    stopped = bring(name, NonFinite.STOP, spoil=spoil, precision=precision)
    for _ in range(2):  # again, with the same settings: the same end
        ended = run_group(stopped, storage, SIZE)
        assert all(isinstance(item.error, NonFiniteError) for item in ended)
        assert f"step {BAD_STEP}" in str(ended[0].error)
    assert ("rank 1, micro-batch" in str(ended[0].error)) == (spoil == "loss")
    assert newest(storage, f"finite-{name}").ref.step == BAD_STEP - 1
    skipping = bring(f"{name}-skipped", NonFinite.SKIP, spoil=spoil, precision=precision)
    assert done(run_group(skipping, storage, SIZE))
    assert done(run_group(bring(name, NonFinite.SKIP, spoil=spoil, precision=precision), storage, SIZE))
    assert digests(storage, f"finite-{name}") == digests(storage, f"finite-{name}-skipped")


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.faults)])
@pytest.mark.parametrize("step", [BAD_STEP - 1, BAD_STEP, BAD_STEP + 2])
def test_a_skipping_run_that_is_killed_ends_with_the_same_bits(
    step: int, overlap: bool, bring: Bring, storage: LocalStorage, tmp_path: Path
) -> None:
    reference = f"skip-reference-{step}-{overlap}"
    assert done(run_group(bring(reference, NonFinite.SKIP, overlap=overlap), storage, SIZE))
    name = f"skip-killed-{step}-{overlap}"
    faults = (fault(FaultPoint.STEP, step, 0, FaultAction.SIGKILL, tmp_path),)
    killed = bring(name, NonFinite.SKIP, overlap=overlap, faults=faults)
    assert not done(run_group(killed, storage, SIZE))
    assert done(run_group(killed, storage, SIZE))
    assert digests(storage, f"finite-{name}") == digests(storage, f"finite-{reference}")
    found = losses(storage, f"finite-{name}")
    assert found == losses(storage, f"finite-{reference}")
    assert [number for number, loss in found.items() if loss is None] == [BAD_STEP]
    assert all(loss is None or math.isfinite(loss) for loss in found.values())


def test_roll_back_goes_to_the_newest_checkpoint_and_ends_as_a_skip(
    bring: Bring, storage: LocalStorage, tmp_path: Path
) -> None:
    assert done(run_group(bring("roll-reference", NonFinite.SKIP), storage, SIZE))
    faults = (fault(FaultPoint.STEP, BAD_STEP + 1, 0, FaultAction.SIGKILL, tmp_path),)
    rolling = bring("roll", NonFinite.ROLL_BACK, faults=faults)
    ended = run_group(rolling, storage, SIZE)
    assert all(isinstance(item.error, RolledBack) and not item.error.permanent for item in ended)
    assert not done(run_group(rolling, storage, SIZE))
    assert done(run_group(rolling, storage, SIZE))
    assert [event["step"] for event in resumed(storage, "finite-roll")] == [3, 6]
    assert non_finite_steps(storage, "finite-roll") == [(BAD_STEP, "roll-back"), (BAD_STEP, "skip")]
    assert digests(storage, "finite-roll") == digests(storage, "finite-roll-reference")


def test_what_was_left_out_once_stays_left_out(bring: Bring, storage: LocalStorage, tmp_path: Path) -> None:
    """Also where it would come out finite the second time, as after a fault of the machine."""
    assert done(run_group(bring("once-reference", NonFinite.SKIP), storage, SIZE))
    faults = (fault(FaultPoint.STEP, BAD_STEP, 0, FaultAction.SIGKILL, tmp_path),)
    healed = bring("once", NonFinite.SKIP, faults=faults)
    assert not done(run_group(healed, storage, SIZE))
    assert newest(storage, "finite-once").ref.step == 3
    source = tmp_path / "brittle.py"
    source.write_text(source.read_text().replace("logits * float", "logits + 0 * float").replace("inf", "0"))
    assert done(run_group(replace(healed, faults=()), storage, SIZE))
    assert digests(storage, "finite-once") == digests(storage, "finite-once-reference")


def test_too_many_in_a_row_is_no_bad_batch() -> None:
    finite = NonFiniteGuard(NonFinite.SKIP, World(), torch.nn.Linear(1, 1))
    for step in range(1, MAX_IN_A_ROW + 1):
        assert finite.action(step) is NonFinite.SKIP
        finite.left_out.append(step)
    assert finite.action(MAX_IN_A_ROW + 1) is NonFinite.STOP
    error = NonFiniteError.of("step 11", is_one_too_many=True)
    assert f"{MAX_IN_A_ROW} steps before it were left out already" in error.message
    assert "failure.non_finite" not in (error.hint or ""), "that is what it does"
    assert "failure.non_finite: skip" in (NonFiniteError.of("step 1", is_one_too_many=False).hint or "")


def test_an_overflow_of_scaled_gradients_is_not_one(bring: Bring, storage: LocalStorage) -> None:
    """fp16's loss scale deals with it, whatever the mode."""
    overflowing = bring("overflow", NonFinite.STOP, spoil="gradient", precision="fp16")
    assert done(run_group(overflowing, storage, SIZE))
    skipped = [
        event for _, event in run_events(RunStore(storage, "finite-overflow")) if event["event"] == "step-skipped"
    ]
    assert BAD_STEP in [event["step"] for event in skipped]
    assert not non_finite_steps(storage, "finite-overflow")
    assert len(read_catalog(storage, "finite-overflow").accepted) == 3
