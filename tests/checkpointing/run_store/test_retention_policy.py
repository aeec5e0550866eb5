"""What stays and what goes: tables, no disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store.retention_policy import Retention, RetentionCandidate

NAN, INF = math.nan, math.inf


def kept(step: int, attempt: int = 1, **metrics: float) -> RetentionCandidate:
    return RetentionCandidate(CheckpointRef(step, AttemptId(attempt, "aaaa")), metrics)


def steps(refs: set[CheckpointRef]) -> list[int]:
    return sorted(ref.step for ref in refs)


@pytest.mark.parametrize(
    ("keep_last", "given_steps", "stay"),
    [
        (2, [], []),
        (2, [3], [3]),
        (2, [3, 6], [3, 6]),
        (2, [3, 6, 9], [6, 9]),
        (3, [9, 3, 12, 6], [6, 9, 12]),
        (3, [100, 20, 3, 1], [3, 20, 100]),
        (9, [3, 6, 9], [3, 6, 9]),
    ],
)
def test_the_newest_stay(keep_last: int, given_steps: list[int], stay: list[int]) -> None:
    assert steps(Retention(keep_last).keep([kept(step) for step in given_steps])) == stay


LOSSES = {3: 0.9, 6: 0.1, 9: 0.5, 12: 0.7, 15: 0.8}


@pytest.mark.parametrize(
    ("keep_best", "mode", "losses", "stay"),
    [
        (0, "min", LOSSES, [12, 15]),
        (1, "min", LOSSES, [6, 12, 15]),
        (2, "min", LOSSES, [6, 9, 12, 15]),
        (1, "max", LOSSES, [3, 12, 15]),
        (9, "min", LOSSES, [3, 6, 9, 12, 15]),
        (1, "min", {3: 0.5, 6: 0.5, 9: 0.6, 12: 0.7}, [3, 9, 12]),  # of equals the older
        (1, "max", {3: 0.5, 6: 0.5, 9: 0.4, 12: 0.3}, [3, 9, 12]),
        (1, "min", {3: NAN, 6: 0.9, 9: NAN, 12: 0.95}, [6, 9, 12]),  # a NaN is never best
        (2, "max", {3: NAN, 6: NAN, 9: NAN, 12: NAN}, [9, 12]),
        (1, "min", {3: INF, 6: 5.0, 9: INF, 12: INF}, [6, 9, 12]),
        (1, "max", {3: -INF, 6: 5.0, 9: 1.0, 12: 2.0}, [6, 9, 12]),
        (1, "min", {3: -1.0, 6: -2.0, 9: 0.0, 12: 0.0}, [6, 9, 12]),
    ],
)
def test_the_best_stay_as_well(keep_best: int, mode: str, losses: dict[int, float], stay: list[int]) -> None:
    policy = Retention(2, keep_best, metric_mode=mode)
    assert steps(policy.keep([kept(step, eval_loss=loss) for step, loss in losses.items()])) == stay


def test_only_the_named_metric_counts() -> None:
    policy = Retention(2, 1, metric="accuracy", metric_mode="max")
    given_checkpoints = [kept(3, accuracy=0.9, eval_loss=5.0), kept(6, eval_loss=0.0), kept(9), kept(12)]
    assert steps(policy.keep(given_checkpoints)) == [3, 9, 12]
    assert [item.ref.step for item in policy.best(given_checkpoints)] == [3]


@pytest.mark.parametrize(
    ("keep_every", "given_steps", "stay"),
    [
        (0, range(1, 9), [7, 8]),
        (3, range(1, 9), [3, 6, 7, 8]),
        (1, range(1, 9), list(range(1, 9))),
        (100, range(1, 9), [7, 8]),
        (500, range(200, 1800, 200), [400, 1000, 1400, 1600]),  # where no save is at a multiple, the last before it
        (1000, [130, 970, 1010, 1990, 2040, 5000, 5001], [970, 1990, 2040, 5000, 5001]),  # saves by the clock
        (4, [0, 4, 8, 12, 16], [0, 4, 8, 12, 16]),
        (4, [], []),
    ],
)
def test_one_of_every_so_many_steps_stays(keep_every: int, given_steps: Sequence[int], stay: list[int]) -> None:
    assert steps(Retention(2, keep_every=keep_every).keep([kept(step) for step in given_steps])) == stay


@pytest.mark.parametrize("keep_every", [3, 7, 10])
def test_what_every_so_many_steps_keeps_is_the_same_whenever_one_asks(keep_every: int) -> None:
    """Asked after each save, as a run does, or once at the end."""
    policy = Retention(2, keep_every=keep_every)
    there: list[RetentionCandidate] = []
    for step in range(2, 60, 2):
        there.append(kept(step))
        stay = policy.keep(there)
        there = [item for item in there if item.ref in stay]
    assert {item.ref for item in there} == policy.keep([kept(step) for step in range(2, 60, 2)])


@pytest.mark.parametrize(
    ("pinned", "stay"),
    [([], [12, 15]), ([3], [3, 12, 15]), ([3, 9], [3, 9, 12, 15]), ([15], [12, 15]), ([99], [12, 15])],
)
def test_the_pinned_stay_as_well(pinned: list[int], stay: list[int]) -> None:
    there = [kept(step) for step in LOSSES]
    assert steps(Retention(2).keep(there, {kept(step).ref for step in pinned})) == stay
    assert steps(Retention(2).keep(there, {kept(step, attempt=2).ref for step in pinned})) == [12, 15], "another's pin"


def test_of_one_step_the_later_attempt_is_newer() -> None:
    """A run that resumes at its very end commits that step once more."""
    stay = Retention(2).keep([kept(10, attempt=1), kept(10, attempt=2), kept(9, attempt=1)])
    assert stay == {kept(10, attempt=1).ref, kept(10, attempt=2).ref}


@pytest.mark.parametrize(
    "setting",
    [
        {"keep_last": -1},
        {"keep_last": 0},
        {"keep_last": 1},
        {"keep_every": -1},
        {"keep_best": -1},
        {"metric_mode": "x"},
    ],
)
def test_a_policy_that_would_delete_by_mistake_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Retention(**setting)


@given(
    found=st.dictionaries(st.integers(0, 50), st.floats(allow_nan=True), max_size=12),
    keep_last=st.integers(2, 5),
    keep_best=st.integers(0, 4),
    mode=st.sampled_from(["min", "max"]),
    keep_every=st.integers(0, 20),
    pinned=st.sets(st.integers(0, 50), max_size=3),
)
def test_what_always_holds(
    found: dict[int, float], keep_last: int, keep_best: int, mode: str, keep_every: int, pinned: set[int]
) -> None:
    policy = Retention(keep_last, keep_best, metric_mode=mode, keep_every=keep_every)
    checkpoints = [kept(step, eval_loss=loss) for step, loss in found.items()]
    pins = {kept(step).ref for step in pinned}
    stay = policy.keep(checkpoints, pins)
    assert stay <= {item.ref for item in checkpoints}
    assert set(sorted((item.ref for item in checkpoints), reverse=True)[:2]) <= stay, "the newest two always stay"
    if not keep_every:
        assert len(stay) <= keep_last + keep_best + len(pins)
    else:
        assert {step for step in found if step % keep_every == 0} <= {ref.step for ref in stay}
    assert stay == policy.keep(checkpoints[::-1], pins), "the order in which they come says nothing"
    assert policy.keep([item for item in checkpoints if item.ref in stay], pins) == stay, "asking again deletes no more"
