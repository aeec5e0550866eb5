"""The kill matrix again, with saves in the background: every named point, four ways to fail, two ranks.

Each evaluation saves and never skips, so that the faults meet a save. What a case must come to: the run, started again
if it has to be, ends with the bits of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.worker_group import (
    ACTIONS,
    IN_TRAINING,
    digests,
    fault,
    losses,
    resumed,
    run_group,
    run_struck,
)

SECTIONS = {"checkpoint": {"overlap": True, "keep_last": 2, "keep_best": 1}}
TRAIN = {"eval_every": 3}


@dataclass(frozen=True)
class Case:
    point: FaultPoint
    action: FaultAction
    rank: int

    def __str__(self) -> str:
        return f"{self.point.value}-{self.action.value}-rank{self.rank}"

    @property
    def step(self) -> int:
        return 9 if self.point is FaultPoint.AFTER_RETENTION else 6

    @property
    def is_fast(self) -> bool:
        wanted = {FaultPoint.AFTER_SNAPSHOT: 0, FaultPoint.BEFORE_MANIFEST: 1}
        return wanted.get(self.point) == self.rank and self.action is not FaultAction.HANG


def all_cases() -> list[Any]:
    points = [point for point in FaultPoint if point not in IN_TRAINING]
    cases = [Case(point, action, rank) for point in points for action in ACTIONS for rank in (0, 1)]
    return [pytest.param(item, id=str(item), marks=() if item.is_fast else pytest.mark.faults) for item in cases]


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> Reference:
    run = "overlapped-reference"
    ended = run_group(assign(run, sections=SECTIONS, **TRAIN), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert [item.ref.step for item in read_catalog(storage, run).accepted] == [10, 9]
    return Reference(run, digests(storage, run), losses(storage, run))


def test_overlapping_changes_no_bit(reference: Reference, assign: Callable[..., Assignment], storage: Any) -> None:
    run_group(assign("not-overlapped", **TRAIN), storage, 2)
    assert digests(storage, "not-overlapped") == reference.digests
    assert losses(storage, "not-overlapped") == reference.losses
    saves = [event for _, event in run_events(RunStore(storage, reference.run)) if event["event"] == "save"]
    assert [event["step"] for event in saves] == [3, 6, 9, 10]
    assert not [event for _, event in run_events(RunStore(storage, reference.run)) if event["event"] == "save-skipped"]


@pytest.mark.parametrize("case", all_cases())
def test_struck_in_the_background_equals_undisturbed(
    case: Case,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    reference: Reference,
    tmp_path: Path,
    cover: Callable[..., None],
) -> None:
    run = f"overlapped-{case}"
    strike = fault(case.point, case.step, case.rank, case.action, tmp_path)
    run_struck(assign(run, sections=SECTIONS, **TRAIN), storage, 2, strike)
    if case.action is not FaultAction.STOP:
        acknowledged = max(
            event["step"] for _, event in run_events(RunStore(storage, run)) if event["event"] == "commit"
        )
        ended = run_group(assign(run, launch="second", sections=SECTIONS, **TRAIN), storage, 2)
        assert [item.outcome for item in ended] == [Outcome.DONE] * 2
        assert resumed(storage, run)[-1]["step"] >= acknowledged >= 3
    assert digests(storage, run) == reference.digests
    assert losses(storage, run) == reference.losses
    rank = "another rank" if case.rank else "rank 0"
    cover(
        "Processes that die, hang or stop in a save in the background", case.action.value, f"{case.point.value}, {rank}"
    )
