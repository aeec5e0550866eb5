"""The kill matrix again, with saves in the background: every named point, four ways to fail, two ranks.

Each evaluation saves and never skips, so that the faults meet a save. What a case must come to: the run, started again
if it has to be, ends with the bits of the reference.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.faults import Action, Point
from outlast.checkpointing.lineage import catalogue, run_events
from outlast.checkpointing.storage import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop import Outcome
from tests.conftest import Reference
from tests.group import digests, fault, losses, resumed, run_group

SECTIONS = {"checkpoint": {"overlap": True, "keep_last": 2, "keep_best": 1}}
ACTIONS = [action for action in Action if action is not Action.PAUSE]  # that one is for drills
TRAIN = {"eval_every": 3}
STOPPED_S = 1.0


@dataclass(frozen=True)
class Case:
    point: Point
    action: Action
    rank: int

    def __str__(self) -> str:
        return f"{self.point.value}-{self.action.value}-rank{self.rank}"

    @property
    def step(self) -> int:
        return 9 if self.point is Point.AFTER_RETENTION else 6

    @property
    def is_fast(self) -> bool:
        wanted = {Point.AFTER_SNAPSHOT: 0, Point.BEFORE_MANIFEST: 1}
        return wanted.get(self.point) == self.rank and self.action is not Action.HANG


def all_cases() -> list[Any]:
    points = [point for point in Point if point not in (Point.ACCUMULATING, Point.STEP, Point.EVALUATING)]
    cases = [Case(point, action, rank) for point in points for action in ACTIONS for rank in (0, 1)]
    return [pytest.param(item, id=str(item), marks=() if item.is_fast else pytest.mark.faults) for item in cases]


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> Reference:
    run = "overlapped-reference"
    ended = run_group(assign(run, sections=SECTIONS, **TRAIN), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert [item.ref.step for item in catalogue(storage, run).accepted] == [10, 9]
    return Reference(run, digests(storage, run), losses(storage, run))


def test_overlapping_changes_no_bit(reference: Reference, assign: Callable[..., Assignment], storage: Any) -> None:
    run_group(assign("not-overlapped", **TRAIN), storage, 2)
    assert digests(storage, "not-overlapped") == reference.digests
    assert losses(storage, "not-overlapped") == reference.losses
    saves = [event for _, event in run_events(storage, reference.run) if event["event"] == "save"]
    assert [event["step"] for event in saves] == [3, 6, 9, 10]
    assert not [event for _, event in run_events(storage, reference.run) if event["event"] == "save-skipped"]


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
    assignment = assign(run, faults=(strike,), sections=SECTIONS, **TRAIN)
    watcher = threading.Thread(target=wake_or_end, args=(Path(strike.record), case.action), daemon=True)
    watcher.start()
    ended = run_group(assignment, storage, 2)
    assert Path(strike.record).exists(), "the fault did not fire"
    watcher.join(30)

    if case.action is Action.STOP:  # it was only slow
        assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    else:
        assert all(item.outcome is None and item.exit_code != 0 for item in ended)
        acknowledged = max(event["step"] for _, event in run_events(storage, run) if event["event"] == "commit")
        ended = run_group(assign(run, launch="second", sections=SECTIONS, **TRAIN), storage, 2)
        assert [item.outcome for item in ended] == [Outcome.DONE] * 2
        assert resumed(storage, run)[-1]["step"] >= acknowledged >= 3
    assert digests(storage, run) == reference.digests
    assert losses(storage, run) == reference.losses
    cover("Processes that die, hang or stop in a save in the background", case.action.value, case.point.value)


def wake_or_end(record: Path, action: Action) -> None:
    """After the fault: wakes the process that stopped; ends the one that hangs, as a watchdog would."""
    if action not in (Action.STOP, Action.HANG):
        return
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, ValueError):
            pid = json.loads(record.read_text())["pid"]
            time.sleep(STOPPED_S)  # long enough for the other rank to come to wait
            os.kill(pid, signal.SIGCONT if action is Action.STOP else signal.SIGKILL)
            return
        time.sleep(0.02)
