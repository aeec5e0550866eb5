"""A save that failed while training goes on is on the console, in the panel, in `status` and in the report."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from outlast.cluster.formatting import finite
from outlast.cluster.monitoring.console_progress import ProgressReporter
from outlast.cluster.monitoring.live_panel import panel, plain_line
from outlast.cluster.monitoring.report.page_data import page_data
from outlast.cluster.monitoring.status import take_snapshot
from outlast.cluster.monitoring.timeline import Timeline
from tests.support.timelines import attempt, launch, make_timeline, plan, saved, start, steps

NOW = 300.0
ERROR = "cannot write /runs/x: No space left\x1b[31m on device\nat all"


def unsaved(step: int, t: float, newest: int | None = 40, limit_s: float | None = 3600.0) -> dict[str, Any]:
    body = {"event": "unsaved", "t": t, "step": step, "error": ERROR, "unsaved_s": 130.0, "limit_s": limit_s}
    return body if newest is None else {**body, "newest": newest}


def run_with(*events: dict[str, Any]) -> Timeline:
    begun: list[Any] = [start(21), plan(22), steps(1, 60, 30), saved(40, 80), *events]
    return make_timeline(launch("a", 0, NOW - 1), attempt(1, 20, *begun))


def test_the_panel_and_the_plain_line_show_the_age_and_the_limit() -> None:
    summary = take_snapshot(run_with(unsaved(60, 240)), NOW)
    lines = [line.plain for line in panel(summary, 100)]
    assert r"unsaved  3 min 10 s of 1 h: cannot write /runs/x: No space left\x1b[31m on device at all" in lines
    assert any(line.startswith("saved    step 40, 3 min 40 s ago") for line in lines)
    assert r"unsaved: 3 min 10 s of 1 h: cannot write /runs/x: No space left\x1b[31m on device at" in plain_line(
        summary
    )
    assert finite(summary.unsaved.to_json() if summary.unsaved else {})["step"] == 60
    no_limit = take_snapshot(run_with(unsaved(60, 240, limit_s=None)), NOW)
    assert "unsaved: 3 min 10 s: cannot" in plain_line(no_limit)


@pytest.mark.parametrize("events", [[], [unsaved(50, 240), *saved(60, 250)]], ids=["never failed", "healed"])
def test_nothing_is_shown_without_a_failure_or_after_the_next_commit(events: list[dict[str, Any]]) -> None:
    summary = take_snapshot(run_with(*events), NOW)
    assert summary.unsaved is None
    assert "unsaved" not in plain_line(summary) + "".join(line.plain for line in panel(summary, 100))


def test_the_report_lists_it() -> None:
    timeline = run_with({"event": "save-failed", "t": 239.0, "step": 55, "error": ERROR}, unsaved(60, 240))
    data = page_data(timeline, take_snapshot(timeline, NOW), None, set(), None, {})
    assert [(note["event"], note["text"]) for note in data["notes"]] == [
        ("save-failed", ERROR),
        ("unsaved", "training went on after 2 min 10 s without a save, with step 40 as the newest checkpoint"),
    ]


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        (40, "run: a save failed; training goes on, 2 min 10 s after the last checkpoint (the newest is of step 40): "),
        (None, "run: a save failed; training goes on, 2 min 10 s after its beginning (there is no checkpoint yet): "),
    ],
)
def test_the_console_says_it(newest: int | None, expected: str) -> None:
    file = io.StringIO()
    with ProgressReporter("run", Console(file=file, width=300)) as reporter:
        for event in (start(2), plan(3, 9), *steps(1, 5, 4), unsaved(5, 9.0, newest)):
            reporter({"sender": "0001-0001", **event})
    assert expected + "cannot write /runs/x: No space left" in file.getvalue()
