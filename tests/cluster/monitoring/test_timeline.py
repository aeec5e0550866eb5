"""The timeline of a run, read repeatedly from its storage: each event once, and no old segment twice."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import attempt_dir, launch_dir
from outlast.checkpointing.run_store import journal as journal_module
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import claim
from outlast.checkpointing.run_store.compacted_segment import compact
from outlast.checkpointing.run_store.events import KINDS, Reached, StartEvent, parse_event
from outlast.checkpointing.run_store.journal import Journal, JournalTail, read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance import coordinator as coordinator_module
from outlast.cluster.fault_tolerance import failure_callback as failure_recorder
from outlast.cluster.fault_tolerance.coordinator import CoordinatorHandle
from outlast.cluster.fault_tolerance.failure_callback import FailureRecorder
from outlast.cluster.fault_tolerance.restart_policy import RestartLimits
from outlast.cluster.monitoring.goodput import TimeCategory, account_time
from outlast.cluster.monitoring.status import take_snapshot
from outlast.cluster.monitoring.timeline import State, TimelineReader
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import fault, run_group
from tests.support.timelines import (
    attempt,
    done,
    failure,
    launch,
    make_timeline,
    plan,
    resume,
    saved,
    start,
    steps,
    stopped,
    write,
)


class CountingStorage:
    """A storage that counts the files it opens."""

    def __init__(self, inner: LocalStorage) -> None:
        self._inner = inner
        self.url = inner.url
        self.opened: list[str] = []

    def open(self, path: str) -> BinaryIO:
        self.opened.append(path)
        return self._inner.open(path)

    def list(self, path: str) -> list[Entry]:
        return self._inner.list(path)

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self._inner.put(path, chunks)

    def delete(self, path: str) -> None:
        self._inner.delete(path)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 500)


@pytest.mark.usefixtures("small_segments")
def test_each_event_is_given_once_and_old_segments_are_not_read_again(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    written, tail, numbers = Journal(storage, "run/here", 0), JournalTail(storage), []
    for number in range(60):
        written.write(parse_event({"event": "tick", "number": number}))
        if number % 7 == 6:
            written.flush()
            before = len(storage.opened)
            numbers += [event["number"] for event in tail.new("run/here")]
            assert len(storage.opened) - before <= 2, "more was read than the growing segment and the one after it"
    written.flush()
    numbers += [event["number"] for event in tail.new("run/here")]
    assert numbers == list(range(60))
    opened = len(storage.opened)
    assert list(tail.new("run/here")) == []
    assert len(storage.opened) == opened, "nothing had changed"


def test_damaged_lines_of_a_segment_are_skipped(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("run/here/events-0-000000.jsonl", [b'{"t": 1, "event": "a"}\nnot json\n[1]\n{"no": "event"}\n'])
    tail = JournalTail(storage)
    assert [event["event"] for event in tail.new("run/here")] == ["a"]
    storage.put(
        "run/here/events-0-000000.jsonl", [b'{"t": 1, "event": "a"}\nnot json\n[1]\n{}\n{"t": 2, "event": "b"}\n']
    )
    assert [event["event"] for event in tail.new("run/here")] == ["b"]


@pytest.mark.usefixtures("small_segments")
def test_updates_read_only_what_is_new_and_equal_one_complete_read(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    reader = TimelineReader(RunStore(storage, "run"))
    for number in range(5):
        name = f"20250101-00000{number}-aaaaaa"
        body = {"began": 100.0 * number, "t": 100.0 * number + 90, "ended": True, "exit_code": 75}
        storage.put(f"{launch_dir('run', name)}/alive.json", [json.dumps(body).encode()])
        mine = claim(RunStore(storage, "run"), {"launch": name, "claimed_at": 100.0 * number + 10})
        written = Journal(storage, attempt_dir("run", mine), 0)
        written.write(StartEvent())
        for event in steps(1, 30, 100.0 * number + 20):
            written.write(replace(parse_event(event), t=0.0))
            written.flush()
            if event["step"] % 10 == 0:
                before = len(storage.opened)
                reader.update()
                assert len(storage.opened) - before <= 12, storage.opened[before:]
    before = len(storage.opened)
    timeline = reader.update()
    assert len(storage.opened) - before == 2, "more was read than the liveness files of the newest two launches"
    whole = TimelineReader(RunStore(storage, "run")).update()
    assert (
        [len(item.steps) for item in timeline.claimed_attempts]
        == [30] * 5
        == [len(item.steps) for item in whole.claimed_attempts]
    )
    assert account_time(timeline, 1000.0) == account_time(whole, 1000.0)


def test_events_of_a_superseded_launch_are_not_lost(tmp_path: Path) -> None:
    storage, (a, b, c) = LocalStorage(tmp_path), (f"20250101-00000{number}-aaaaaa" for number in range(3))
    write(storage, "run", launch(a, 0, 40), attempt(1, 10, start(11), steps(1, 10, 15), launch=a))
    reader = TimelineReader(RunStore(storage, "run"))
    assert reader.update().claimed_attempts[0].last_step == 10
    write(
        storage,
        "run",
        launch(a, 0, 130, 75, failure(1, 120)),
        launch(b, 140, 160, 75),
        launch(c, 170, 190),
        attempt(1, 10, start(11), steps(1, 100, 15), launch=a),
        attempt(2, 150, resume(151, 90), launch=b),
        attempt(3, 180, resume(181, 90), launch=c),
    )
    for timeline in (reader.update(), reader.update()):
        assert take_snapshot(timeline, 200.0) == take_snapshot(TimelineReader(RunStore(storage, "run")).update(), 200.0)
        assert (timeline.claimed_attempts[0].last_step, timeline.num_lost_steps) == (100, 10)
        assert timeline.launches[a].has_ended


def test_a_running_launch_stays_open_after_newer_ones_were_refused(tmp_path: Path) -> None:
    storage, name = LocalStorage(tmp_path), "20250101-000000-aaaaaa"
    refused = [launch(f"20250101-00000{number}-bbbbbb", 20 + number, 30 + number, 3) for number in range(1, 5)]
    write(storage, "run", launch(name, 0, 40), attempt(1, 10, start(11), launch=name), *refused)
    reader = TimelineReader(RunStore(storage, "run"))
    reader.update()
    write(storage, "run", launch(name, 0, 200))
    assert reader.update().state(201) is State.RUNNING


def test_the_timeline_of_a_killed_run(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> None:
    """Real processes: rank 1 dies in step 8, another attempt resumes from step 6."""
    deadly = fault(FaultPoint.STEP, 7, 1, FaultAction.SIGKILL, tmp_path)
    run_group(assign("told", faults=(deadly,)), storage, 2)
    assert run_group(assign("told"), storage, 2)[0].outcome is Outcome.DONE
    timeline = TimelineReader(RunStore(storage, "told")).update()
    seen = take_snapshot(timeline, timeline.claimed_attempts[-1].last_seen_at)
    first, second = timeline.claimed_attempts
    assert (first.resume_point, second.start_step) == (None, 6)
    assert list(first.steps.step) == [*range(1, len(first.steps) + 1)]
    assert list(second.steps.step) == [7, 8, 9, 10]
    assert [found.step for found in second.evaluations] == [8, 10]
    assert sorted(second.saves) == [9, 10]
    assert all(save.committed_at and save.blocked_s for save in second.saves.values())
    assert (seen.state, seen.step, seen.num_steps, seen.world_size) == (State.DONE, 10, 10, 2)
    assert seen.newest is not None
    assert (seen.newest.step, seen.newest.verified_at) == (10, None)
    assert seen.num_lost_steps == first.last_step - 6
    assert seen.samples_per_s == pytest.approx(8 / seen.seconds_per_step if seen.seconds_per_step else 0)
    assert set(second.steps.tokens) == {8 * 16}, "packed samples of 16 tokens"
    whole = [event for _, event in run_events(RunStore(storage, "told"))]
    assert {event["batch"] for event in whole if event["event"] == "plan"} == {8}
    lines = compact([[json.dumps(event).encode() for event in whole]]).table["json"].drop_null().to_pylist()
    assert len(lines) == sum(event["event"] != "step" for event in whole), "an event of the train loop has no columns"


@pytest.mark.parametrize("size", [1, 3])
def test_tokens_of_a_step_do_not_depend_on_the_number_of_ranks(
    assign: Callable[..., Assignment], storage: LocalStorage, size: int
) -> None:
    """Rows of different lengths: padding is not counted, and every rank's tokens are."""
    run = f"counted-{size}"
    sections = {"model": {"task": "sequence-classification"}, "data": {"train": _labelled(storage), "eval": None}}
    assert run_group(assign(run, sections=sections, steps=2, eval_every=None), storage, size)[0].outcome is Outcome.DONE
    timeline = TimelineReader(RunStore(storage, run)).update()
    counted = [event["tokens"] for _, event in run_events(RunStore(storage, run)) if event["event"] == "step"]
    assert list(timeline.claimed_attempts[0].steps.tokens) == counted
    _counts.setdefault("of one rank", counted)
    assert counted == _counts["of one rank"]
    assert all(8 < count < 8 * 16 for count in counted)


_counts: dict[str, list[int]] = {}


def _labelled(storage: LocalStorage) -> str:
    path = storage.path("labelled.jsonl")
    rows = [{"text": "word " * (1 + number % 9), "label": "ab"[number % 2]} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_coordinator_remembers_the_last_step_of_a_killed_rank_0() -> None:
    body = coordinator_module.Coordinator()
    body.exchange(
        [
            {"event": "step", "sender": "0001-aaaa", "step": 4, "ended_at": 40.0},
            {"event": "eval", "sender": "0001-aaaa"},
        ]
    )
    assert body.reached("0001-aaaa") == Reached(4, 40.0)
    assert body.reached("0002-bbbb") is None
    assert all("t" in event for event in body.drain())


def test_no_room_is_recorded_once_for_each_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_recorder, "find_coordinator", lambda launch: CoordinatorHandle(None))
    recorder = FailureRecorder(str(tmp_path), "run", "one", RestartLimits(), "")

    def try_to_start(*, room: bool) -> None:
        with recorder.on_worker_group_start():
            if not room:
                raise WorkerGroupStartupTimeoutError(num_workers=2)

    for room in (False, False, True, False, True):
        if room:
            try_to_start(room=True)
        else:
            with pytest.raises(WorkerGroupStartupTimeoutError):
                try_to_start(room=False)
    journal = list(read_events(LocalStorage(tmp_path), launch_dir("run", "one")))
    assert [event["event"] for event in journal] == ["no-room", "no-room"]
    assert all(0 <= event["t"] - event["since"] + 0.001 < 10 for event in journal)


JSON: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3) | st.just([{}])
)


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_no_event_makes_a_timeline_raise(kind: str, data: st.DataObject) -> None:
    """A journal is input."""
    names = [each.name for each in fields(KINDS[kind])]
    body = {**data.draw(st.dictionaries(st.sampled_from(names), JSON)), "event": kind}
    timeline = make_timeline(launch("a", 0, 90), attempt(1, 10, start(11), steps(1, 3, 12)))
    timeline.claimed_attempts[0].apply(body)
    timeline.apply_launch_event("a", body)
    assert len({len(column) for column in timeline.claimed_attempts[0].steps.columns.values()}) == 1
    assert timeline.ends


def failed(error: str) -> dict[str, Any]:
    return {"event": "failed", "t": 25, "error": error, "final": False}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((launch("a", 0, 90, 0), attempt(1, 10, start(11), done(80))), [("done", True, True)]),
        ((launch("a", 0, 90, 75), attempt(1, 10, start(11), stopped(80, 5))), [("stopped", True, True)]),
        ((launch("a", 0, 90), attempt(1, 10, start(11))), [("", False, True)]),
        ((launch("a", 0, 90, 1), attempt(1, 10, start(11))), [("failed", True, False)]),
        (
            (launch("a", 0, 20), launch("b", 30, 90), attempt(1, 10), attempt(2, 40, launch="b")),
            [("driver lost", True, False), ("", False, True)],
        ),
        (
            (
                launch("a", 0, 20),
                launch("b", 30, 90),
                attempt(1, 10, failed("Connection reset by peer")),
                attempt(2, 40, failed("a bug"), launch="b"),
                attempt(3, 50, launch="c"),
            ),
            [("driver lost", True, False), ("error", True, False), ("", False, True)],
        ),
        (
            (launch("a", 0, 90, None, failure(1, 30, "node lost")), attempt(1, 10), attempt(2, 40)),
            [("node lost", True, False), ("", False, True)],
        ),
        ((launch("a", 0, 90), attempt(1, 10), attempt(2, 40)), [("restarted", True, True), ("", False, True)]),
    ],
)
def test_how_attempts_ended(parts: tuple[object, ...], expected: list[tuple[str, bool, bool]]) -> None:
    timeline = make_timeline(*parts)  # type: ignore[arg-type]
    assert [(end.cause, end.is_over, end.is_planned) for end in timeline.ends.values()] == expected


def calls_for(number: int) -> int:
    """Count the function calls of a summary of a run that was preempted `number` times and then lacked resources."""
    events, attempts = [], []
    for n in range(1, number + 1):
        at = 100.0 * n
        events += [failure(n, at + 60, "preempted"), {"event": "no-room", "t": at + 65, "since": at + 61}]
        attempts.append(attempt(n, at, resume(at + 1, n - 1, n - 1), steps(n, n + 1, at + 5), saved(n, at + 9)))
    timeline, calls = make_timeline(launch("a", 0, 100.0 * number + 99, None, *events), *attempts), Counter[str]()
    sys.setprofile(lambda frame, event, argument: calls.update((event,)))
    try:
        seen = take_snapshot(timeline, 100.0 * number + 99)
    finally:
        sys.setprofile(None)
    assert len(seen.interruptions) == number
    assert seen.goodput.seconds[TimeCategory.WAIT] == pytest.approx(39 * number - 1)
    return calls["call"] + calls["c_call"]


def test_the_cost_of_a_summary_is_linear_in_the_number_of_attempts() -> None:
    """The panel computes it twice a second, and the launch waits for it."""
    assert calls_for(400) < 5 * calls_for(100)


LAPTOP = launch("20260101-130000-laptop", 3600, 3700, 75)  # its clock is an hour ahead
DEAD = launch("20251231-120000-killed", 0, 9)


@pytest.mark.parametrize(
    ("parts", "newest", "state"),
    [
        (
            (launch("20260101-120500-cluster", 300, 500), attempt(2, 330, launch="20260101-120500-cluster")),
            2,
            "running",
        ),
        ((launch("20260101-120500-cluster", 300, 500),), 2, "running"),
        ((launch("20260101-120500-cluster", 300, 400), attempt(2, 330, launch="20260101-120500-cluster")), 2, "lost"),
        ((), 1, "stopped"),
    ],
)
def test_the_newest_launch_owns_the_run_or_is_about_to_claim_it(
    parts: tuple[Any, ...], newest: int, state: str
) -> None:
    timeline = make_timeline(DEAD, LAPTOP, attempt(1, 3610, launch=LAPTOP[0]), *parts)
    found = timeline.newest_launch(510)
    assert found is not None
    assert (found.id, timeline.state(510).value) == ([DEAD, LAPTOP, *parts][newest][0], state)


def test_speed_and_the_time_left_are_those_of_the_last_steps() -> None:
    slow, quick = steps(1, 100, 20, 3.0), steps(101, 200, 320, 0.5)
    timeline = make_timeline(launch("a", 0, 371), attempt(1, 10, start(11), plan(12, 1000), slow, quick))
    seen = take_snapshot(timeline, 372)
    assert seen.seconds_per_step == pytest.approx(0.5)
    assert seen.left_s == pytest.approx(400)
    assert seen.tokens_per_s == pytest.approx(160)
    assert seen.losses[-1] == seen.loss == 10 / 200


def test_the_newest_checkpoint_is_the_current_resume_point() -> None:
    parts = (
        launch("a", 0, 90, None, failure(1, 30)),
        attempt(1, 10, start(11), steps(1, 9, 12), saved(3, 15), saved(6, 18)),
        attempt(2, 40, resume(41, 3)),
    )
    seen = take_snapshot(make_timeline(*parts), 60)
    assert seen.newest is not None
    assert (seen.newest.step, seen.newest.committed_at, seen.newest.verified_at) == (3, 15, 41)
