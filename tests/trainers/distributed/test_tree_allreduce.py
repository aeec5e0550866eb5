"""`exactness: elastic`: the same bits on any number of ranks, also when their number changes on the way.

The reference is one rank that nothing ever happened to. Every other run must end with its digests, its losses, its
evaluations and its gradient norms.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.data.batch_plan import share
from outlast.trainers.distributed import tree_allreduce as elastic
from outlast.trainers.distributed.tree_allreduce import TreeReducer, TreeSum, subtrees
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.buffer_change_check import BufferGuard
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.ranks import on_ranks
from tests.support.groups.worker_group import digests, fault, resumed, run_group

Assign = Callable[..., Assignment]

# -- the tree ----------------------------------------------------------------------------------------------------------


def whole_tree(leaves: range) -> Any:
    """The tree by its definition: a pair is a node, a number is a leaf."""
    if len(leaves) == 1:
        return leaves.start
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return whole_tree(leaves[:half]), whole_tree(leaves[half:])


class Term:
    """A value that records how it was added."""

    def __init__(self, term: Any) -> None:
        self.term = term

    def __iadd__(self, other: Term) -> Term:
        self.term = (self.term, other.term)
        return self


@given(st.integers(1, 80), st.integers(1, 9))
def test_any_assignment_to_ranks_adds_along_one_tree(num_leaves: int, size: int) -> None:
    whole: Any = TreeSum(num_leaves)
    for rank in range(size):
        mine = share(num_leaves, rank, size)
        part: Any = TreeSum(num_leaves)
        for leaf in mine:
            part.add(range(leaf, leaf + 1), Term(leaf))
            assert len(part.parts) <= 2 * num_leaves.bit_length()
        assert [leaves for leaves, _ in part.parts] == subtrees(mine, num_leaves)
        for leaves, term in part.parts:
            whole.add(leaves, term)
    [(leaves, term)] = whole.parts
    assert leaves == range(num_leaves)
    assert term.term == whole_tree(range(num_leaves))


COUNTS = (1, 2, 5, 8)


def reduce_all() -> list[list[Any]]:
    """Return the reducer's results in `.grad` on this rank, for each number of micro-batches."""
    elastic._PIECE = 20  # so that several are needed
    world = World()
    return [reduce_one(count, world) for count in COUNTS]


def reduce_one(count: int, world: World) -> list[Any]:
    """Two steps with gradients of all magnitudes; the second uses the buffers of the first."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 3), (), (0, 2), (5,), (2,), (11,))]
    parameters[4].requires_grad_(False)
    reducer = TreeReducer(parameters, world.rank, world.size)
    left = []
    for step in range(2):
        for micro in share(count, world.rank, world.size):
            generator = torch.Generator().manual_seed(1000 * step + micro)
            for number, parameter in enumerate(parameters):
                value = torch.randn(parameter.shape, generator=generator)
                value *= 10.0 ** torch.randint(-4, 4, parameter.shape, generator=generator)
                value[value < 0] = -0.0
                is_without = number in (4, 5) or (number == 3 and micro % 3 != step)
                parameter.grad = None if is_without else value
            reducer.take(micro, count)
            assert all(parameter.grad is None for parameter in parameters)
        reducer.finish(count)
        left += [None if item.grad is None else item.grad.numpy().tobytes() for item in parameters]
    return left


def test_the_reducer_leaves_the_same_bits_on_every_rank_of_any_number() -> None:
    """Idle ranks, parameters without gradients, negative zeros, sums in several pieces."""
    alone = reduce_all()
    for count, (*_, third, frozen, unused, _, _, _, third_again, _, _) in zip(COUNTS, alone, strict=True):
        assert (frozen, unused) == (None, None)
        assert third is not None
        assert (third_again is None) == (count == 1), "has a gradient if any micro-batch gave it one"
    for size in (2, 3, 4):
        assert on_ranks(size, reduce_all) == [alone] * size


def test_a_model_with_carried_state_is_refused() -> None:
    """A running mean depends on the order of a rank's micro-batches, which no reduction order can fix."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    guard = BufferGuard(model, "exactness: elastic", "")
    model.eval()(torch.randn(4, 3))
    model.get_buffer("1.running_mean").copy_(model.get_buffer("1.running_mean").clone())  # as DDP does
    guard.check()
    model.train()(torch.randn(4, 3))
    with pytest.raises(ConfigError, match=r"buffer 1\.\w+ changes in the forward pass; exactness: elastic"):
        guard.check()


# -- whole runs --------------------------------------------------------------------------------------------------------

#: 10 samples in 5 micro-batches a step: never a whole number of aligned subtrees to a rank.
UNEVEN = {"batch": 10, "micro_batch": 2}


def elastic_run(assign: Assign, run: str, **options: Any) -> Assignment:
    return assign(run, sections={"exactness": "elastic"}, **{**UNEVEN, **options})


def run_to_the_end(assignment: Assignment, storage: LocalStorage, size: int) -> None:
    assert [item.outcome for item in run_group(assignment, storage, size)] == [Outcome.DONE] * size


def course(storage: LocalStorage, run: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    """The journal's numbers of each step and each evaluation; what was computed twice must be equal."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for _, event in run_events(RunStore(storage, run)):
        if event["event"] in ("step", "eval"):
            key, numbers = (
                (event["event"], event["step"]),
                tuple(event.get(k) for k in ("loss", "grad_norm", "eval_loss")),
            )
            assert found.setdefault(key, numbers) == numbers, key
    return found


@pytest.fixture(scope="module")
def alone(assign: Assign, storage: LocalStorage) -> str:
    run_to_the_end(elastic_run(assign, "elastic-1"), storage, 1)
    return "elastic-1"


@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.faults), 3, pytest.param(4, marks=pytest.mark.faults)]
)
def test_any_number_of_ranks_ends_with_the_same_bits(
    size: int, assign: Assign, storage: LocalStorage, alone: str
) -> None:
    run = f"elastic-{size}"
    ended = run_group(elastic_run(assign, run), storage, size)
    assert [item.outcome for item in ended] == [Outcome.DONE] * size
    assert digests(storage, run) == digests(storage, alone)
    assert course(storage, run) == course(storage, alone)


def test_the_number_of_ranks_changes_after_kills(
    assign: Assign, storage: LocalStorage, alone: str, tmp_path: Path
) -> None:
    """4 → 2 → 3, each change after a kill: in a step, and in a save."""
    run = "elastic-4-2-3"
    injected_faults = [
        (4, fault(FaultPoint.STEP, 4, 2, FaultAction.SIGKILL, tmp_path)),
        (2, fault(FaultPoint.WHILE_WRITING, 9, 1, FaultAction.SIGKILL, tmp_path)),
    ]
    for launch, (size, injected) in enumerate(injected_faults):
        ended = run_group(elastic_run(assign, run, faults=(injected,), launch=f"{launch}"), storage, size)
        assert Path(injected.record).exists(), "the fault did not fire"
        assert ended[injected.rank].exit_code == -signal.SIGKILL
    assert [item.outcome for item in run_group(elastic_run(assign, run, launch="last"), storage, 3)] == [
        Outcome.DONE
    ] * 3
    assert [event["step"] for event in resumed(storage, run)] == [3, 6]
    assert digests(storage, run) == digests(storage, alone)
    assert course(storage, run) == course(storage, alone)
    changed = [event for _, event in run_events(RunStore(storage, run)) if event["event"] == "changed"]
    assert [(item["what"], item["before"], item["now"], item["same_bits"]) for item in changed] == [
        ("world_size", 4, 2, True),
        ("world_size", 2, 3, True),
    ]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("short", {"batch": 8, "micro_batch": 1, "steps": None, "epochs": 0.2}),
        ("bf16", {"precision": "bf16"}),
        ("unclipped", {"clip": 0.0}),
        ("single", {"batch": 4, "micro_batch": 1}),
    ],
)
def test_other_shapes_of_a_step(name: str, options: dict[str, Any], assign: Assign, storage: LocalStorage) -> None:
    """Including a short last step that leaves a rank idle, and one micro-batch per rank."""
    first = None
    for size in (1, 2, 3, 4):
        run = f"elastic-{name}-{size}"
        assignment = elastic_run(assign, run, eval_every=None, **options)
        if name == "short":
            epochs = 17.0 / assignment.prepared.num_samples
            assignment = elastic_run(assign, run, eval_every=None, **{**options, "epochs": epochs})
        run_to_the_end(assignment, storage, size)
        found = digests(storage, run), course(storage, run)
        first = first or found
        assert found == first
