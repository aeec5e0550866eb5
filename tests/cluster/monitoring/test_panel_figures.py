"""Figures of the panel that are chosen from several: scores, the stall of a save, what an interruption cost."""

from __future__ import annotations

from outlast.cluster.monitoring.live_panel import panel, plain_line
from outlast.cluster.monitoring.status import RunSnapshot, take_snapshot
from tests.support.timelines import attempt, evaluated, launch, make_timeline, saved, start, steps, stopped

NOW = 300.0


def lines(seen: RunSnapshot) -> list[str]:
    return [line.plain for line in panel(seen, 80)]


def test_scores_beside_the_loss() -> None:
    scored = {**evaluated(5, 31, 32), "eval_accuracy": 0.875, "eval_subset_accuracy": 2 / 3}
    timeline = make_timeline(launch("a", 0, NOW - 1), attempt(1, 20, start(21), *steps(1, 9, 30), scored))
    seen = take_snapshot(timeline, NOW)
    assert "scores   accuracy 0.875, subset accuracy 0.6667" in lines(seen)
    assert "eval loss 2.000  lr 0.001  accuracy 0.875  subset accuracy 0.6667" in plain_line(seen)
    only_loss = make_timeline(launch("a", 0, NOW - 1), attempt(1, 20, start(21), steps(1, 9, 30), evaluated(5, 31, 32)))
    assert not any(line.startswith("scores") for line in lines(take_snapshot(only_loss, NOW)))


def test_a_stop_that_saved_loses_nothing() -> None:
    """Nor does the stall of its last save, which waits, stand for those in the background."""
    last = [{**event, "blocked_s": 1.4, "commit_s": 1.4} for event in saved(9, 42)]
    journal = (start(21), *steps(1, 9, 30), *saved(5, 36), *last, stopped(43, 9))
    seen = take_snapshot(make_timeline(launch("a", 0, 44, 75), attempt(1, 20, *journal)), NOW)
    assert "lost     0 steps, in 1 interruption" in lines(seen)
    assert "stall 0.1 s" in "\n".join(lines(seen))
    only = take_snapshot(make_timeline(launch("a", 0, 44), attempt(1, 20, start(21), *steps(1, 9, 30), *last)), NOW)
    assert "stall 1.4 s" in "\n".join(lines(only))
