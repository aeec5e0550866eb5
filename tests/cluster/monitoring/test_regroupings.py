"""Losses that a group survives in memory: shown as what they are, from forged journals and from real killed ranks."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from outlast.checkpointing.format.layout import launch_dir
from outlast.checkpointing.run_store.attempt_history import AttemptOutcome, read_attempt_history
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.compacted_segment import StepColumns, compact
from outlast.checkpointing.run_store.events import parse_event
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli import status as status_command
from outlast.cluster.monitoring.console_progress import ProgressReporter
from outlast.cluster.monitoring.goodput import TimeCategory, account_time
from outlast.cluster.monitoring.live_panel import panel
from outlast.cluster.monitoring.regroupings import Regrouping, regroupings
from outlast.cluster.monitoring.report.page_data import page_data
from outlast.cluster.monitoring.status import read_status, take_snapshot
from outlast.cluster.monitoring.timeline import TimelineReader
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.save_timer import history_of
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.in_place_group import Place, Strike, Striking, in_place_group
from tests.support.groups.worker_group import losses
from tests.support.timelines import (
    attempt,
    done,
    failure,
    launch,
    make_timeline,
    plan,
    regrouped,
    resume,
    start,
    steps,
    under_way,
)

SURVIVED = (
    launch("a", 0, 40, 0, failure(1, 25.6)),
    attempt(1, 10, start(11), plan(12), steps(1, 10, 15)),
    attempt(2, 26.4, regrouped(26.5, 10), plan(26.6), under_way(28, 11), steps(11, 20, 27), done(39, 20)),
)


def test_a_loss_is_told_with_its_cause_and_its_phases() -> None:
    [found] = regroupings(make_timeline(*SURVIVED))
    assert found == Regrouping(
        at=26.0,
        before="0001-0001",
        attempt="0002-0002",
        ranks=(1,),
        lost=("process-1",),
        cause="worker died",
        message="it was killed",
        source=0,
        step=10,
        world_size=2,
        num_redone=0,
        seconds=3.0,
        phases=found.phases,
    )
    expected = {"notice": 1.0, "seat": 0.05, "group": 0.05, "state": 0.2, "step": 1.7}
    assert dict(found.phases) == pytest.approx(expected)
    assert sum(found.phases.values()) == pytest.approx(found.seconds)
    assert f"{found.description}; {found.outcome}" == (
        "rank 1 lost (it was killed); training went on in memory after 3 s, no step lost"
    )


def test_it_is_no_interruption() -> None:
    summary = take_snapshot(make_timeline(*SURVIVED), 100.0)
    assert summary.interruptions == ()
    assert summary.num_lost_steps == 0
    shown = [line.plain for line in panel(summary, 100)]
    [line] = [text for text in shown if text.startswith("regroup")]
    assert line == "regroup  1 time, 3 s in all, no step lost"
    assert shown[shown.index(line) + 1].endswith(
        "rank 1 lost (it was killed) → training went on in memory after 3 s, no step lost"
    )
    assert not any(text.startswith("lost") for text in shown)
    restarted = take_snapshot(make_timeline(*SURVIVED, attempt(3, 50, resume(52, 8), steps(9, 12, 55))), 100.0)
    assert [item.attempt for item in restarted.interruptions] == ["0003-0003"]
    assert restarted.num_lost_steps == 12


def test_a_group_that_goes_on_with_more_workers_has_lost_none() -> None:
    timeline = make_timeline(
        attempt(1, 10, start(11), steps(1, 10, 15)),
        attempt(2, 26, regrouped(26.5, 10, ranks=()), plan(27, 100, 3), steps(11, 12, 28)),
    )
    [found] = regroupings(timeline)
    assert found.description == "continuing with 3 workers"


def test_without_its_journal_the_claims_tell_who_was_lost() -> None:
    """Rank 0 of the attempt that continued was killed before its journal was flushed."""
    workers = [{"rank": rank, "host": "h", "pid": 100 + rank} for rank in range(3)]
    timeline = make_timeline(
        attempt(1, 10, start(11), steps(1, 10, 15), workers=workers),
        attempt(2, 26, workers=[*workers[:2], {"rank": 2, "host": "h", "pid": 7}], regrouped_from="0001-0001"),
        attempt(3, 27, regrouped(27.2, 10, 2, ranks=(0,)), plan(28), steps(11, 12, 28)),
    )
    first, second = regroupings(timeline)
    assert (first.ranks, first.seconds, first.num_redone) == ((2,), None, 0)
    assert (second.ranks, second.step) == ((0,), 10)
    assert timeline.num_lost_steps == 0
    assert account_time(timeline, 100.0).seconds[TimeCategory.REGROUP] == pytest.approx(3.0)


def test_steps_that_are_done_again_all_the_same_are_told() -> None:
    """The lost rank alone had applied step 11."""
    reached = {"step": 11, "ended_at": 26.0}
    timeline = make_timeline(
        launch("a", 0, 40, None, failure(1, 26.2, reached=reached)),
        attempt(1, 10, start(11), steps(1, 10, 15)),
        attempt(2, 26.4, regrouped(26.5, 10), plan(26.6), steps(11, 12, 27)),
    )
    [found] = regroupings(timeline)
    assert found.num_redone == timeline.num_lost_steps == 1
    assert found.outcome == "training went on in memory after 2 s, 1 step done again"


def test_steps_of_a_lost_rank_0_belong_to_the_attempt_that_made_them() -> None:
    """Whether they are read one by one or by column."""
    inherited, own = steps(5, 10, 19), steps(11, 14, 27)
    parts = (attempt(1, 10, start(11), steps(1, 4, 15)), attempt(2, 26, regrouped(26.5, 10)))
    one_by_one, by_column = make_timeline(*parts), make_timeline(*parts)
    for event in (*inherited, plan(26.6), *own):
        one_by_one.apply_attempt_events(one_by_one.claimed_attempts[1], event)
    segment = compact([[json.dumps(event).encode() for event in (*inherited, *own)]])
    [columns] = segment.by_column()
    assert isinstance(columns, StepColumns)
    by_column.apply_attempt_events(by_column.claimed_attempts[1], columns)
    for timeline in (one_by_one, by_column):
        assert [list(item.steps.step) for item in timeline.claimed_attempts] == [list(range(1, 11)), [11, 12, 13, 14]]
        assert account_time(timeline, 100.0).seconds[TimeCategory.REGROUP] == pytest.approx(2.0)


def test_names_of_attempts_in_a_storage_may_be_anything() -> None:
    """A claim that names itself, a later attempt, or none is an attempt that was started."""
    for name in ("0002-0002", "0003-0003", "../..", ""):
        timeline = make_timeline(
            attempt(1, 10, start(11), steps(1, 4, 15)),
            attempt(2, 26, {**regrouped(26.5, 4), "attempt": name}, steps(3, 4, 5), steps(5, 6, 27)),
            attempt(3, 40, start(41)),
        )
        take_snapshot(timeline, 100.0)
        assert account_time(timeline, 100.0).wall_s == pytest.approx(31.0)


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_shows_it_apart_from_failures() -> None:
    timeline = make_timeline(*SURVIVED)
    data = page_data(timeline, take_snapshot(timeline, 100.0), None, set(), None, {})
    assert [(item["kind"], item["t"], item["step"]) for item in data["markers"]] == [("regroup", 26.0, 10)]
    [row] = data["regroupings"]
    assert row["description"] == "rank 1 lost (it was killed)"
    assert row["phases"]["notice"] == 1.0
    first, second = data["attempts"]
    assert (first["cause"], first["is_regrouped"], first["message"]) == (
        "regrouped",
        True,
        "worker died: it was killed",
    )
    assert (second["in_memory"], second["start_step"], second["steps"]) == (True, 10, (11, 20))
    assert data["redone"] == {"steps": [], "time": []}
    assert {item["name"]: item["seconds"] for item in data["categories"]}["regroup"] == pytest.approx(2.0)
    # One worker of two goes on alone until the next claim.
    assert list(zip(data["workers"]["x"], data["workers"]["y"], strict=True))[1:4] == [(10.0, 2), (25.6, 1), (26.4, 2)]


# -- the console -------------------------------------------------------------------------------------------------------


def told(*bodies: dict[str, object]) -> list[str]:
    file = io.StringIO()
    with ProgressReporter("run", Console(file=file, width=200)) as reporter:
        for body in ({"event": "phase", "name": "ray", "launch": "a", "t": 0.0}, *bodies):
            reporter(dict(body))
        activity = reporter._activity
    lines = [line for line in file.getvalue().splitlines() if not line.startswith(("run: step ", "run: workers are"))]
    return [*lines, activity]


FIRST = [{"sender": "0001-0001", **event} for event in (start(11), plan(12), *steps(1, 10, 15))]
SECOND = [
    {"sender": "0002-0002", **event}
    for event in (regrouped(26.5, 10), plan(26.6), under_way(28, 11), *steps(11, 12, 27))
]
LOSS = {**failure(1, 25.6), "in_place": True, "number": -1, "limit": -1, "ends": False}
TOLD = "run: rank 1 lost (it was killed); training went on in memory after 3 s, no step lost"


def test_one_line_tells_of_it() -> None:
    begin = "run: starting workers"
    assert told(*FIRST, LOSS, *SECOND) == [begin, TOLD, ""]
    without = "run: rank 1 lost; training went on in memory after 3 s, no step lost"
    assert told(*FIRST, *SECOND) == [begin, without, ""]
    late = "run: worker died, rank 1: it was killed"
    assert told(*FIRST, *SECOND, LOSS) == [begin, without, late, ""]
    counted = {**failure(1, 25.6), "number": 1, "limit": 3, "ends": False}
    assert told(*FIRST, *SECOND, counted) == [begin, without, late, ""]


def test_the_activity_is_regrouping_until_it_goes_on() -> None:
    assert told(*FIRST, *SECOND[:1])[-1] == "regrouping"
    timeline = make_timeline(
        launch("a", 0, 26.2, None, {**failure(1, 25.6), "in_place": True}),
        attempt(1, 10, start(11), plan(12), steps(1, 10, 15)),
    )
    summary = take_snapshot(timeline, 26.3)
    assert (summary.activity, summary.interruptions) == ("running", ()), "the others are going on"
    given_up = make_timeline(
        launch("a", 0, 60, None, {**failure(1, 25.6), "in_place": True}),
        attempt(1, 10, start(11), plan(12), steps(1, 10, 15)),
        attempt(2, 50, resume(52, 8), steps(9, 12, 55)),
    )
    [interruption] = take_snapshot(given_up, 60.0).interruptions
    assert (interruption.cause, interruption.resumed_from) == ("worker died", 8)


# -- real losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(
    rank: int,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    reference: Callable[[int], Reference],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All readers of what a real group leaves whose rank is killed twice, at other steps."""
    run = f"told-{rank}"
    strikes = [Strike(Place.FORWARD, step, rank, str(tmp_path / f"struck-{step}")) for step in (4, 8)]
    with in_place_group(assign(run), storage, 2, num_spares=2, control=Striking(strikes=strikes)) as group:
        ended = group.ended()
    assert [item and item.outcome for item in ended].count(Outcome.DONE) == 2
    store = RunStore(storage, run)
    first, second, third = list_attempts(store)
    assert [read_claim(store, item).get("regrouped_from") for item in (first, second, third)] == [
        None,
        str(first),
        str(second),
    ]
    noted = replace(parse_event(failure(str(first), time.time())), t=0.0)
    Journal(storage, launch_dir(run, "first"), 0, flush_s=0).write(noted)

    timeline = TimelineReader(store).update()
    found = list(regroupings(timeline))
    assert [(item.before, item.attempt, item.ranks, item.source, item.num_redone) for item in found] == [
        (str(first), str(second), (rank,), 1 - rank, 0),
        (str(second), str(third), (rank,), 1 - rank, 0),
    ]
    assert [item.step for item in found] == [4, 8]
    assert found[0].cause == "worker died"
    for item in found:
        assert set(item.phases) == {"notice", "seat", "group", "state", "step"}
        assert item.seconds == pytest.approx(sum(item.phases.values()), abs=0.01)
    assert [list(item.steps.step) for item in timeline.claimed_attempts] == [
        list(range(1, 5)),
        list(range(5, 9)),
        [9, 10],
    ]
    report = account_time(timeline, time.time())
    assert report.seconds[TimeCategory.REGROUP] > 0
    assert report.seconds[TimeCategory.REDO] == report.seconds[TimeCategory.RESTART] == 0
    # Without the first step after each, which counts as one.
    pauses = sum(item.seconds or 0.0 for item in found)
    assert report.seconds[TimeCategory.REGROUP] < pauses
    body = read_status(store)
    assert (body["num_regroupings"], body["lost_steps"], body["interruptions"]) == (2, 0, [])
    assert body["regroup_s"] == pytest.approx(pauses, abs=0.01)
    assert losses(storage, run) == reference(2).losses

    records = read_attempt_history(store, live="first")
    assert not any(item.end.outcome.is_failure for item in records)
    assert [item.end.outcome for item in records if item.attempt != third] == [AttemptOutcome.SETTLED] * (
        len(records) - 1
    )
    assert history_of(store)[1] == 1, "regroupings do not count as failures between saves"
    status_command.status(run, storage=str(storage.url))
    printed = capsys.readouterr().out
    assert f"state of rank {1 - rank}, after step 4; notice " in printed
    assert "worker died" not in printed.replace("rank", ""), "no failure"
