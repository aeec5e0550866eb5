"""What the memory tier decides: how often, who keeps whose copy, from which step to restart."""

from __future__ import annotations

import pytest

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.memory_tier.buddies import buddy_shift
from outlast.checkpointing.memory_tier.schedule import SnapshotSchedule
from outlast.checkpointing.memory_tier.snapshot_reader import FoundSnapshot, plan_restores

FIRST, SECOND = AttemptId(1, "aaaa"), AttemptId(2, "bbbb")


def found(step: int, *ranks: int, attempt: AttemptId = FIRST, **other: object) -> list[FoundSnapshot]:
    values = {"world_size": 2, "declaration": "d", **other}
    return [FoundSnapshot(attempt, step, rank, **values) for rank in ranks]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("here", "steps", "reason"),
    [
        pytest.param([found(5, 0), found(5, 1)], [(5, (0, 1))], "", id="own"),
        pytest.param([found(5, 0, 1), []], [(5, (0, 0))], "", id="one-node-has-all"),
        pytest.param([found(5, 1), found(5, 0)], [(5, (1, 0))], "", id="swapped"),
        pytest.param(
            [found(5, 0, 1) + found(7, 0, 1), found(5, 0, 1) + found(7, 0, 1)],
            [(7, (0, 1)), (5, (0, 1))],
            "",
            id="newest-first",
        ),
        pytest.param([found(5, 0) + found(7, 0), found(5, 1)], [(5, (0, 1))], "of rank 1", id="newest-incomplete"),
        pytest.param([found(2, 0), found(2, 1)], [], "", id="older-than-the-checkpoint"),
        pytest.param([found(3, 0), found(3, 1)], [(3, (0, 1))], "", id="as-old-as-the-checkpoint"),
        pytest.param([found(5, 0, world_size=3), found(5, 1, world_size=3)], [], "3 workers, not 2", id="world"),
        pytest.param([found(5, 0, declaration="e"), found(5, 1, declaration="e")], [], "settings", id="declaration"),
        pytest.param([found(5, 0), found(5, 1, num_starts=2)], [], "2 starts from it failed", id="starts"),
        pytest.param(
            [found(9, 0) + found(5, 0, attempt=SECOND), found(9, 1) + found(5, 1, attempt=SECOND)],
            [(5, (0, 1)), (9, (0, 1))],
            "",
            id="newer-attempt-first",
        ),
        pytest.param([[], []], [], "", id="none"),
    ],
)
def test_the_step_to_restart_from(
    here: list[list[FoundSnapshot]], steps: list[tuple[int, tuple[int, ...]]], reason: str
) -> None:
    plans, reasons = plan_restores(here, "d", above=3)
    assert [(plan.step, plan.sources) for plan in plans] == steps
    assert len(reasons) == bool(reason)
    assert all(reason in text for text in reasons)


@pytest.mark.parametrize(
    ("nodes", "shift"),
    [("a", 0), ("aa", 0), ("ab", 1), ("abc", 1), ("aabb", 2), ("aaaabbbb", 4), ("abab", 1), ("aab", 1), ("aabbcc", 2)],
)
def test_buddies_are_on_other_nodes(nodes: str, shift: int) -> None:
    assert buddy_shift(nodes) == shift


def interval(costs: list[float], step_s: float = 1.0) -> int:
    schedule = SnapshotSchedule()
    for cost in costs:
        for _ in range(4):
            schedule.step_done(step_s, is_disturbed=False)
        schedule.begun()
        schedule.step_done(step_s + cost, is_disturbed=True)
        schedule.ended(0.0, cost / 2)  # what is known directly is half of what it took
    return schedule.interval


@pytest.mark.parametrize(
    ("costs", "expected"),
    [([0.1], 5), ([0.1, 0.1], 5), ([0.1] * 3, 10), ([0.0] * 3, 1), ([0.1, 0.1, 9.0], 10), ([0.05] * 5, 5)],
)
def test_the_interval_keeps_the_cost_below_one_percent(costs: list[float], expected: int) -> None:
    assert interval(costs) == pytest.approx(expected, abs=1)


def test_a_fixed_interval() -> None:
    schedule = SnapshotSchedule(4)
    due = []
    for _ in range(9):
        due.append(schedule.is_due())
        schedule.step_done(1.0, is_disturbed=False)
        if due[-1]:
            schedule.begun()
            schedule.ended(5.0, 5.0)
    assert due == [False, False, False, True] * 2 + [False]
