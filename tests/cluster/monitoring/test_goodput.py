"""Goodput of timelines made by hand: every second is in one category, even if events are missing or out of order."""

from __future__ import annotations

import random
from typing import Any

import pytest

from outlast.cluster.monitoring.goodput import GoodputReport, TimeCategory, account_time
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_records import LOST_AFTER_S
from tests.support.timelines import (
    attempt,
    done,
    evaluated,
    failure,
    launch,
    make_timeline,
    plan,
    regrouped,
    resized,
    resume,
    saved,
    start,
    steps,
    stopped,
)

LATER = 10_000.0


def check(report: GoodputReport, wall_s: float) -> None:
    """Assert what holds for every report."""
    assert report.wall_s == pytest.approx(wall_s)
    assert sum(report.seconds.values()) == pytest.approx(wall_s)
    assert all(span.end > span.begin for span in report.spans)
    assert all(
        a.end == b.begin and a.category is not b.category for a, b in zip(report.spans, report.spans[1:], strict=False)
    )


#: Ten steps, undisturbed: 10 s until the claim, 5 more until the first step, 5 from the last one to the end.
UNDISTURBED = (
    launch("a", 0, 32, 0),
    attempt(1, 10, start(11), plan(12), steps(1, 10, 15), done(30, 10)),
)


@pytest.mark.parametrize(
    ("parts", "now", "wall_s", "expected"),
    [
        pytest.param((), LATER, 0, {}, id="nothing"),
        pytest.param(
            (launch("a", 0, 5),),
            5 + LOST_AFTER_S / 2,
            5 + LOST_AFTER_S / 2,
            {"startup": 5 + LOST_AFTER_S / 2},
            id="starting",
        ),
        pytest.param((launch("a", 0, 5, 3),), LATER, 5, {"startup": 5}, id="refused-before-it-began"),
        pytest.param(
            UNDISTURBED, LATER, 32, {"startup": 15, "train": 10, "save_stall": 5, "wait": 2}, id="undisturbed"
        ),
        pytest.param(
            (
                launch("a", 0, 40, 0),
                attempt(
                    1,
                    10,
                    start(11),
                    evaluated(0, 12, 15),
                    steps(1, 5, 15),
                    evaluated(5, 20, 22),
                    saved(5, 23),
                    steps(6, 10, 25),
                    evaluated(10, 30, 33),
                    done(38, 10),
                ),
            ),
            LATER,
            40,
            {"startup": 12, "evaluate": 8, "train": 10, "save_stall": 8, "wait": 2},
            id="evaluations-and-a-save",
        ),
        pytest.param(
            (launch("a", 0, 26, 0), attempt(1, 10, steps(1, 5, 10), saved(5, 17, 0.5), steps(6, 10, 16), done(26, 10))),
            LATER,
            26,
            {"startup": 10, "train": 9.5, "save_stall": 6.5},
            id="a-copy-that-the-next-step-waits-for",
        ),
        pytest.param(
            (
                launch("a", 0, 100, 0, failure(1, 30)),
                attempt(1, 10, start(11), steps(1, 10, 15), saved(6, 24)),
                attempt(2, 40, resume(45, 6), steps(7, 20, 50), done(70, 20)),
            ),
            LATER,
            100,
            {
                "startup": 15,
                "restart": 10,
                "train": 20,
                "detect": 5,
                "restore": 10,
                "redo": 4,
                "save_stall": 6,
                "wait": 30,
            },
            id="a-worker-dies",
        ),
        pytest.param(
            (
                launch("a", 0, 60, 0, failure(1, 30, reached={"step": 12, "ended_at": 27})),
                attempt(1, 10, steps(1, 10, 15)),
                attempt(2, 40, resume(45, 6), steps(7, 16, 50), done(60, 16)),
            ),
            LATER,
            60,
            {"startup": 15, "restart": 10, "train": 16, "detect": 3, "restore": 10, "redo": 6},
            id="rank-0-lost-its-journal",
        ),
        pytest.param(
            (
                launch("a", 0, 30),
                launch("b", 100, 160, 0),
                attempt(1, 10, steps(1, 10, 15), saved(6, 24)),
                attempt(2, 110, resume(115, 6), steps(7, 20, 120), done(134, 20), launch="b"),
            ),
            LATER,
            160,
            {"startup": 15, "restart": 10, "train": 20, "restore": 10, "redo": 4, "wait": 101},
            id="driver-and-workers-die",
        ),
        pytest.param(
            (
                launch("a", 0, 32, 75),
                launch("b", 100, 130, 0),
                attempt(1, 10, steps(1, 10, 15), saved(10, 29), stopped(30, 10)),
                attempt(2, 110, resume(112, 10), steps(11, 20, 115), done(125, 20), launch="b"),
            ),
            LATER,
            130,
            {"startup": 15, "restart": 10, "train": 20, "save_stall": 5, "restore": 5, "wait": 7, "idle": 68},
            id="stopped-and-started-again",
        ),
        pytest.param(
            (
                launch("a", 0, 80, 0, resized(1, 30, 2, 3, planned=True)),
                attempt(1, 10, steps(1, 10, 15), saved(10, 28)),
                attempt(2, 40, resume(42, 10), steps(11, 20, 45), done(55, 20)),
            ),
            LATER,
            80,
            {"startup": 15, "restart": 12, "train": 20, "save_stall": 3, "restore": 5, "wait": 25},
            id="resized-on-purpose",
        ),
        pytest.param(
            (
                launch("a", 0, 90, 0, failure(1, 30), {"event": "no-room", "t": 36, "since": 31}),
                attempt(1, 10, steps(1, 10, 15), saved(10, 26)),
                attempt(
                    2,
                    70,
                    {"event": "under-way", "t": 76, "marks": {"actor": 61, "claim": 70}},
                    resume(72, 10),
                    steps(11, 20, 75),
                    done(85, 20),
                ),
            ),
            LATER,
            90,
            {"startup": 15, "restart": 10, "train": 20, "detect": 5, "wait": 35, "restore": 5},
            id="no-room-for-half-a-minute",
        ),
        pytest.param(
            (
                launch("a", 0, 70, 75),
                launch("b", 30, 80, 0),
                attempt(1, 10, steps(1, 40, 15), saved(10, 26)),  # continues until 55, though it was superseded at 45
                attempt(2, 45, resume(47, 10), steps(11, 40, 48), done(78, 40), launch="b"),
            ),
            LATER,
            80,
            {"startup": 15, "train": 40, "restore": 3, "redo": 20, "wait": 2},
            id="taken-over-while-still-running",
        ),
        pytest.param(
            (
                launch("a", 0, 90, 1, failure(1, 30), failure("unclaimed", 45), failure(2, 75)),
                attempt(1, 10, start(11), steps(1, 10, 15), saved(6, 24)),
                attempt(2, 60, resume(66, 6)),
            ),
            LATER,
            90,
            {"startup": 15, "restart": 45, "train": 10, "detect": 14, "restore": 6},
            id="given-up-before-a-new-step",
        ),
        pytest.param(
            (
                launch("a", 0, 40, 0, failure(1, 25.5)),
                attempt(1, 10, start(11), steps(1, 10, 15)),
                attempt(2, 26.5, regrouped(26.6, 10), plan(26.7), steps(11, 20, 27), done(39, 20)),
            ),
            LATER,
            40,
            {"startup": 15, "train": 20, "regroup": 2, "save_stall": 2, "wait": 1},
            id="a-worker-dies-and-training-goes-on-in-memory",
        ),
        pytest.param(
            (
                launch("a", 0, 40, 0),
                attempt(1, 10, start(11), steps(1, 6, 15)),
                attempt(2, 25.6, regrouped(25.7, 10), launch="a"),
                attempt(
                    3,
                    26.5,
                    regrouped(26.6, 10, 2, ranks=(0,)),
                    steps(7, 9, 21, 0.5),
                    evaluated(9, 22.5, 24.5),
                    steps(10, 10, 24.5, 0.5),
                    plan(26.7),
                    steps(11, 20, 27),
                    done(39, 20),
                ),
            ),
            LATER,
            40,
            {"startup": 15, "train": 18, "evaluate": 2, "regroup": 2, "save_stall": 2, "wait": 1},
            id="rank-0-is-lost-twice-in-memory-with-its-journal",
        ),
        pytest.param(
            (
                launch("a", 0, 60, 0, failure(1, 25.5), failure(2, 36)),
                attempt(1, 10, start(11), steps(1, 10, 15), saved(8, 24)),
                attempt(2, 26.5, regrouped(26.6, 10), plan(26.7), evaluated(10, 27, 28), steps(11, 15, 30)),
                attempt(3, 40, resume(42, 8), steps(9, 20, 45), done(57, 20)),
            ),
            LATER,
            60,
            {
                "startup": 15,
                "train": 20,
                "evaluate": 1,
                "regroup": 4,
                "detect": 1,
                "restart": 4,
                "restore": 5,
                "redo": 7,
                "wait": 3,
            },
            id="a-loss-in-memory-and-then-a-restart",
        ),
        pytest.param(
            (launch("a", 0, 26.4), attempt(1, 10, start(11), steps(1, 10, 15)), attempt(2, 25.6, regrouped(25.7, 10))),
            26.4,
            26.4,
            {"startup": 15, "train": 10, "regroup": 1.4},
            id="regrouping",
        ),
        pytest.param(
            (launch("a", 0, 50), attempt(1, 10, start(11), steps(1, 10, 15))),
            52,
            52,
            {"startup": 15, "train": 37},
            id="running",
        ),
        pytest.param(
            (launch("a", 0, 50, None, failure(1, 30)), attempt(1, 10, start(11), steps(1, 10, 15))),
            52,
            52,
            {"startup": 15, "restart": 22, "train": 10, "detect": 5},
            id="about-to-restart",
        ),
        pytest.param(
            (launch("a", 0, 50), attempt(1, 10, start(11), steps(1, 10, 15))),
            LATER,
            50,
            {"startup": 15, "train": 10, "wait": 25},
            id="lost-without-a-recorded-end",
        ),
        pytest.param(
            (attempt(1, 10, start(11), saved(5, 20), launch=""),),
            LATER,
            0,
            {},
            id="custom-loop",
        ),
        pytest.param(
            (  # the driver's clock is 8 s behind the workers'
                launch("a", 0, 60, 0, failure(1, 22)),
                attempt(1, 18, start(19), steps(1, 10, 23)),
                attempt(2, 48, resume(53, 6), steps(7, 12, 58), done(64, 12)),
            ),
            LATER,
            60,
            {"startup": 23, "restart": 15, "train": 10, "restore": 10, "redo": 2},
            id="clocks-that-differ",
        ),
    ],
)
def test_every_second_is_in_one_category(
    parts: tuple[Any, ...], now: float, wall_s: float, expected: dict[str, float]
) -> None:
    report = account_time(make_timeline(*parts), now)
    check(report, wall_s)
    assert {category.value: round(s, 6) for category, s in report.seconds.items() if s} == expected
    active_s = wall_s - expected.get("idle", 0.0)
    assert report.goodput == (expected.get("train", 0.0) / active_s if active_s else None)


def test_idle_time_after_a_requested_stop_does_not_lower_goodput() -> None:
    def goodput(began: float, exit_code: int) -> float | None:
        later = attempt(2, began + 10, resume(began + 12, 10), steps(11, 20, began + 15), launch="b")
        parts = (
            launch("a", 0, 32, exit_code),
            launch("b", began, began + 30, 0),
            attempt(1, 10, steps(1, 10, 15), stopped(30, 10)),
        )
        return account_time(make_timeline(*parts, later), LATER).goodput

    assert goodput(32.0, 75) == goodput(5000.0, 75) == pytest.approx(20 / 62)
    assert goodput(5000.0, 1) == pytest.approx(20 / 5030)  # nothing had stopped it on purpose


def test_time_between_a_stop_and_a_launch_that_had_begun_before_is_not_idle() -> None:
    """A launch took over: the older one stops in order while the newer one is lost."""
    parts = (
        launch("a", 0, 60, 75),
        launch("b", 30, 50),
        launch("c", 100, 130, 0),
        attempt(1, 10, start(11), steps(1, 10, 15)),
        attempt(2, 40, resume(42, 6), steps(7, 10, 45), launch="b"),
        attempt(3, 110, resume(112, 6), steps(7, 20, 115), done(130, 20), launch="c"),
    )
    seconds = account_time(make_timeline(*parts), LATER).seconds
    assert seconds[TimeCategory.IDLE] == 0
    assert seconds[TimeCategory.WAIT] >= 40


def test_steps_lost_are_counted_once_for_each_time_they_were_made() -> None:
    parts = (
        launch("a", 0, 90, 0, failure(1, 30), failure(2, 50)),
        attempt(1, 10, start(11), steps(1, 50, 15, 0.2)),
        attempt(2, 40, resume(41, 40), steps(41, 42, 42)),
        attempt(3, 60, resume(61, 40), steps(41, 60, 62)),
    )
    assert make_timeline(*parts).num_lost_steps == 12


def test_missing_events_and_wrong_clocks_never_make_time_negative() -> None:
    """Any subset of the events, with clocks that are off by up to 20 s."""
    chance = random.Random(7)
    for _ in range(300):
        timeline = Timeline("run")
        for name in ("a", "b"):
            began = chance.uniform(0, 50)
            code = chance.choice([None, 0, 1, 75])
            _, alive, _ = launch(name, began, began + chance.uniform(0, 100), code)
            timeline.launch(name).alive = alive if chance.random() < 0.8 else {}
            timeline.apply_launch_event(name, failure(chance.randint(1, 4), chance.uniform(0, 200)))
            timeline.apply_launch_event(name, {"event": "no-room", "t": 0, "since": chance.uniform(0, 200)})
        for number in range(1, chance.randint(2, 5)):
            at, first = number * 40 + chance.uniform(-20, 20), chance.randint(1, 30)
            events = [
                chance.choice([resume(at + 1, first - 1), regrouped(at + 1, first + 2, max(1, number - 1))]),
                *steps(first, first + 9, at + 5), evaluated(first + 4, at + 9, at + 11),
                *saved(first + 4, at + 12, 0.3), stopped(at + 20, first + 9),
            ]  # fmt: skip
            kept = [event for event in events if chance.random() < 0.8]
            _, claim, _ = attempt(number, at, launch=chance.choice(["a", "b"]))
            made = timeline.attempt(make_timeline(attempt(number, at)).claimed_attempts[0].id)
            made.claim = claim
            for event in kept:
                timeline.apply_attempt_events(made, event)
        report = account_time(timeline, 210.0)
        check(report, report.wall_s)


def test_every_category_has_its_own_description() -> None:
    assert len({category.description for category in TimeCategory}) == len(TimeCategory)
