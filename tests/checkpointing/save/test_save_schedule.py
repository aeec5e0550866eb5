"""When to save: tables, no clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpointing.save.save_schedule import FIRST_AUTO_S, IntervalUnit, SaveCosts, SaveInterval


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        (200, 200, IntervalUnit.STEPS),
        ("200", 200, IntervalUnit.STEPS),
        ("200 steps", 200, IntervalUnit.STEPS),
        ("1 step", 1, IntervalUnit.STEPS),
        (" 7 ", 7, IntervalUnit.STEPS),
        ("90s", 90, IntervalUnit.SECONDS),
        ("0.5s", 0.5, IntervalUnit.SECONDS),
        ("10m", 600, IntervalUnit.SECONDS),
        ("1.5 h", 5400, IntervalUnit.SECONDS),
        ("1 epoch", 1, IntervalUnit.EPOCHS),
        ("2 epochs", 2, IntervalUnit.EPOCHS),
        ("2epochs", 2, IntervalUnit.EPOCHS),
        ("3.0 steps", 3, IntervalUnit.STEPS),
    ],
)
def test_intervals(text: str | int, amount: float, unit: IntervalUnit) -> None:
    assert SaveInterval.parse(text) == SaveInterval(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        0,
        -3,
        "-3",
        "0m",
        "0 epochs",
        "1.5",
        "1.5 steps",
        "0.5 epoch",
        "10 min",
        "10 M",
        "m",
        "1e3",
        "nan",
        "inf",
    ],
)
def test_what_is_no_interval(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not an interval: write 200"):
        SaveInterval.parse(text)


@pytest.mark.parametrize(
    ("text", "batch", "num_samples", "due"),
    [
        (3, 8, 1000, [3, 6, 9, 12]),
        (1, 8, 1000, list(range(1, 13))),
        (20, 8, 1000, []),
        ("1 epoch", 4, 12, [3, 6, 9, 12]),
        ("2 epochs", 4, 12, [6, 12]),
        ("1 epoch", 4, 10, [3, 5, 8, 10]),  # the step that crosses the border, or ends on it
        ("1 epoch", 4, 3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),  # more than an epoch a step
        ("5m", 8, 10, []),
    ],
)
def test_due_steps(text: str | int, batch: int, num_samples: int, due: list[int]) -> None:
    every = SaveInterval.parse(text)
    assert [step for step in range(1, 13) if every.due_at_step(step, batch, num_samples)] == due


@pytest.mark.parametrize(
    ("text", "seconds", "due"),
    [("10s", 9.9, False), ("10s", 10.0, True), ("10s", 1e9, True), ("1m", 59.0, False), (5, 1e9, False)],
)
def test_due_times(text: str | int, seconds: float, due: bool) -> None:
    assert SaveInterval.parse(text).due_at_time(seconds) is due


@given(
    batch=st.integers(1, 50), num_samples=st.integers(1, 200), amount=st.integers(1, 3), num_steps=st.integers(1, 99)
)
def test_epochs_are_counted_once_each(batch: int, num_samples: int, amount: int, num_steps: int) -> None:
    """As many saves as epochs were passed, unless several passed in one step."""
    every = SaveInterval(amount, IntervalUnit.EPOCHS)
    due = [step for step in range(1, num_steps + 1) if every.due_at_step(step, batch, num_samples)]
    passed = num_steps * batch // (amount * num_samples)
    assert len(due) == passed if batch <= amount * num_samples else len(due) == num_steps


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (SaveCosts(2.0, 2.0, 0.0, 10_000.0), 200.0),
        (SaveCosts(2.0, 2.0, 10_000.0, 10_000.0), math.sqrt(2 * 2.0 * 20_000.0)),
        (SaveCosts(0.001, 30.0, 0.0, 10_000.0), 300.0),  # a tenth of the time, for storage's sake
        (SaveCosts(0.0, 0.0, 0.0, 10_000.0), 1.0),
    ],
)
def test_the_interval_that_loses_least(costs: SaveCosts, expected: float) -> None:
    assert costs.interval_s == pytest.approx(expected)


def test_young_and_daly_are_right_about_what_is_lost() -> None:
    """Lost time per second: the saves, and half an interval and a restart for each failure."""
    costs = SaveCosts(5.0, 0.1, 60.0, 3600.0)

    def lost(interval_s: float) -> float:
        return costs.blocked_s / interval_s + (interval_s / 2 + costs.restart_s) / costs.between_failures_s

    best = costs.interval_s
    assert lost(best) < lost(best / 2)
    assert lost(best) < lost(best * 2)


def test_auto_waits_for_the_first_costs() -> None:
    every = SaveInterval.parse("auto")
    assert not every.due_at_step(10, 1, 10)
    assert not every.due_at_time(FIRST_AUTO_S - 1)
    assert every.due_at_time(FIRST_AUTO_S)
    costs = SaveCosts(2.0, 2.0, 0.0, 10_000.0)
    assert not every.due_at_time(199.0, costs)
    assert every.due_at_time(200.0, costs)
