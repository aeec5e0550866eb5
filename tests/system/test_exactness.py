"""The exactness matrix: whatever is trained, however it is spread, whenever it dies, the same bits come out.

Each case trains twice through an epoch of few samples, is killed once or three times, and must end with the digests and
losses of the same run undisturbed. The steps of the further kills are random, from a seed that follows from the case.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Parallel
from outlast.trainers.data.batch_plan import BatchPlan, make_plan
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.worker_group import digests, fault, losses, resumed, run_group, with_parallel
from tests.support.tasks.cases import CASES
from tests.support.tasks.recording import FOLDER

NUM_ROWS = 56
TASKS = ("causal-lm", *CASES)
WORLDS = ((1, Parallel.DDP), (2, Parallel.DDP), (3, Parallel.DDP), (2, Parallel.FSDP), (3, Parallel.FSDP))
MOMENTS = ("mid-epoch", "epoch-end", "evaluation", "accumulation")
FAST = {
    "causal-lm-2-fsdp-evaluation-1",
    "completions-2-ddp-accumulation-1",
    "masked-lm-3-ddp-epoch-end-3",
    "seq2seq-lm-2-ddp-accumulation-1",
    "tags-1-ddp-mid-epoch-3",
    "unpacked-2-fsdp-mid-epoch-1",
}


@dataclass(frozen=True)
class Case:
    task: str
    size: int
    parallel: Parallel
    moment: str
    kills: int

    def __str__(self) -> str:
        return f"{self.task}-{self.size}-{self.parallel.value}-{self.moment}-{self.kills}".replace(" ", "-")

    def strikes(self, plan: BatchPlan) -> list[tuple[FaultPoint, int]]:
        """Where to strike, in the order in which the run gets there: at the moment, and at random steps."""
        crossing = plan.num_samples // plan.batch  # the step, from 0, in which the first epoch ends
        moment = {
            "mid-epoch": (FaultPoint.STEP, crossing // 2 + 1),
            "epoch-end": (FaultPoint.STEP, crossing),
            "evaluation": (FaultPoint.EVALUATING, 8),
            "accumulation": (FaultPoint.ACCUMULATING, crossing - 1),
        }[self.moment]
        others = [step for step in range(1, plan.num_steps) if step != moment[1]]
        chosen = random.Random(str(self)).sample(others, self.kills - 1)
        return sorted([moment, *((FaultPoint.STEP, step) for step in chosen)], key=lambda strike: strike[1])


def all_cases() -> list[Any]:
    cases = [
        Case(task, *world, moment, kills) for task, world, moment, kills in product(TASKS, WORLDS, MOMENTS, (1, 3))
    ]
    return [pytest.param(item, id=str(item), marks=() if str(item) in FAST else pytest.mark.faults) for item in cases]


@pytest.fixture(scope="module")
def make(assign: Callable[..., Assignment], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Assignment]:
    folder = tmp_path_factory.mktemp("rows")

    def make(name: str, case: Case, **options: Any) -> Assignment:
        sections = {} if case.task == "causal-lm" else CASES[case.task].sections(folder, NUM_ROWS)
        if case.task == "causal-lm":
            rows = CASES["masked-lm"].sections(folder, NUM_ROWS)["data"]
            sections = {"data": {**rows, "max_length": 32}, "train": {"steps": 12}}
        return with_parallel(assign(name, sections=sections, **options), case.parallel)

    return make


@pytest.fixture(scope="module")
def undisturbed(make: Callable[..., Assignment], storage: LocalStorage) -> Callable[[str, int, Parallel], Reference]:
    @cache
    def train(task: str, size: int, parallel: Parallel) -> Reference:
        case = Case(task, size, parallel, "never", 0)
        run = str(case)
        assert [item.outcome for item in run_group(make(run, case), storage, size)] == [Outcome.DONE] * size
        return Reference(run, digests(storage, run), losses(storage, run))

    return train


@pytest.mark.parametrize("case", all_cases())
def test_killed_and_resumed_equals_uninterrupted(
    case: Case,
    make: Callable[..., Assignment],
    undisturbed: Callable[[str, int, Parallel], Reference],
    storage: LocalStorage,
    tmp_path: Path,
    cover: Callable[..., None],
) -> None:
    run, victim = f"exact-{case}", case.size - 1
    plain = make(run, case)
    plan = make_plan(plain.config, plain.prepared.num_samples, case.size)
    assert plan.num_samples < plan.num_steps * plan.batch, "the run must go through an epoch's end"
    for number, (point, step) in enumerate(case.strikes(plan)):
        strike = fault(point, step, victim, FaultAction.SIGKILL, tmp_path)
        ended = run_group(replace(plain, faults=(strike,), launch=str(number)), storage, case.size)
        assert Path(strike.record).exists(), f"{point} at {step} did not fire"
        assert ended[victim].exit_code == -signal.SIGKILL
    ended = run_group(replace(plain, launch="last"), storage, case.size)
    assert [item.outcome for item in ended] == [Outcome.DONE] * case.size
    expected = undisturbed(case.task, case.size, case.parallel)
    assert digests(storage, run) == expected.digests
    assert losses(storage, run) == expected.losses
    kind = f"{case.moment}, {'once' if case.kills == 1 else 'three times'}"
    cover("Exactness: task and world", kind, f"{case.task}, {case.size} × {case.parallel.value}")


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.faults)])
def test_every_sample_of_an_epoch_is_consumed_once(
    size: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any world size; and a killed run consumes again just the samples of the steps that it does again."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    sections = {"model": {"task": "tests.support.tasks.recording:Recording"}}

    def consumed(assignment: Assignment) -> Counter[int]:
        run_group(assignment, storage, size)
        found = Counter(int(line) for path in tmp_path.iterdir() for line in path.read_text().split())
        for path in tmp_path.iterdir():
            path.unlink()
        return found

    run = f"consumed-{size}"
    assignment = assign(run, sections=sections)
    plan = make_plan(assignment.config, assignment.prepared.num_samples, size)

    def keys_of(steps: range) -> Counter[int]:
        return Counter(key for step in steps for key in plan.keys(plan.positions(step)))

    trained = keys_of(range(plan.num_steps))
    whole = consumed(assignment)
    assert {key: whole[key] for key in trained} == trained
    assert set(trained.values()) == {1}

    strike = fault(FaultPoint.STEP, 7, size - 1, FaultAction.SIGKILL, tmp_path.parent)
    Path(strike.record).unlink(missing_ok=True)
    killed = consumed(assign(f"{run}-killed", sections=sections, faults=(strike,)))
    killed += consumed(assign(f"{run}-killed", sections=sections, launch="second"))
    [again] = resumed(storage, f"{run}-killed")
    assert {key: killed[key] for key in trained} == trained + keys_of(range(again["step"], 8))
