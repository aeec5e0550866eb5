"""One rule for giving up: tables, properties, and the reading of what a store says of a run's tries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef, launch_dir
from outlast.checkpointing.regrouping_checkpointer import RegroupingCheckpointer
from outlast.checkpointing.run_store.attempt_history import (
    AttemptEnd,
    AttemptOutcome,
    AttemptRecord,
    checkpoints_to_skip,
    read_attempt_history,
    settings_digest,
)
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import REGROUPED_FROM
from outlast.checkpointing.run_store.events import GroupFailureEvent, RegroupedEvent, parse_event
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.restart_policy import GiveUp, RestartLimits, count_failures, decide_give_up
from tests.support.small_model import digests_of, small_model, train_step

NOW = "now"
FAILED, SILENT, PREEMPTED, SETTLED, OPEN = (
    AttemptOutcome.FAILED,
    AttemptOutcome.SILENT,
    AttemptOutcome.PREEMPTED,
    AttemptOutcome.SETTLED,
    AttemptOutcome.OPEN,
)


def one(
    ending: AttemptOutcome, *commits: int, step: int | None = None, settings: str = NOW, final: bool = False
) -> AttemptRecord:
    end = AttemptEnd(ending, "worker died", "killed")
    return AttemptRecord(end, settings, commits, failed_step=step, is_final=final)


@pytest.mark.parametrize(
    ("tries", "limits", "reason"),
    [
        ([], RestartLimits(), None),
        ([one(FAILED)] * 3, RestartLimits(), None),
        ([one(FAILED)] * 4, RestartLimits(), "4 failures without a new checkpoint (failure.max_failures: 3)"),
        ([one(FAILED)] * 2 + [one(SILENT)] * 2, RestartLimits(), "4 failures"),
        ([one(FAILED)], RestartLimits(max_failures=0), "1 failures"),
        ([one(FAILED)] * 99, RestartLimits(max_failures=-1), None),
        # progress: a commit beyond all others
        ([one(FAILED)] * 3 + [one(FAILED, 10)] * 1 + [one(FAILED)] * 2, RestartLimits(), None),
        ([one(FAILED, 10)] + [one(FAILED)] * 3, RestartLimits(), "4 failures"),
        ([one(FAILED, 10, 20)] + [one(FAILED, 15)] * 3, RestartLimits(), "4 failures"),
        ([one(FAILED, step) for step in range(99)], RestartLimits(), None),
        # what does not count
        ([one(PREEMPTED)] * 99, RestartLimits(), None),
        ([one(PREEMPTED)] * 3, RestartLimits(max_preemptions=2), "3 preemptions"),
        ([one(PREEMPTED), one(FAILED)] * 3, RestartLimits(), None),
        ([one(SETTLED)] * 99 + [one(OPEN)] * 9, RestartLimits(), None),
        # one and the same step
        ([one(FAILED, step=7)] * 3, RestartLimits(), "step 7 failed 3 times (failure.max_same_step: 3)"),
        ([one(FAILED, step=7), one(FAILED, step=8)] * 1 + [one(FAILED, step=9)], RestartLimits(), None),
        ([one(FAILED, step=7)] * 3, RestartLimits(max_same_step=-1), None),
        ([one(FAILED, step=7), one(FAILED, 6, step=7), one(FAILED, step=7)], RestartLimits(), None),
        # somebody has acted
        ([one(FAILED, settings="before")] * 9 + [one(FAILED)] * 3, RestartLimits(), None),
        ([one(FAILED)] * 9 + [one(FAILED, settings="between")] + [one(FAILED)] * 3, RestartLimits(), None),
        ([one(FAILED, settings="before")] * 9, RestartLimits(), None),
        # what the same settings cannot mend
        ([one(FAILED, step=7, final=True)], RestartLimits(), "worker died at step 7, and the same settings"),
        ([one(FAILED, step=7, final=True, settings="before")], RestartLimits(), None),
    ],
)
def test_when_enough_is_enough(tries: list[AttemptRecord], limits: RestartLimits, reason: str | None) -> None:
    found = decide_give_up(tries, limits, NOW)
    assert (found.reason[: len(reason)] if found and reason else found) == reason


def test_the_same_error_after_the_same_step_ends_it_at_once() -> None:
    bug, other = (replace(one(AttemptOutcome.FAILED), raised=f"KeyError (after step {step})") for step in (7, 8))
    found = decide_give_up([bug, bug], RestartLimits(), NOW)
    assert found is not None
    assert found.reason == "the same error twice without a step in between"
    for tries in (
        [bug],
        [bug, other],
        [bug, one(AttemptOutcome.FAILED), bug],
        [bug, one(AttemptOutcome.FAILED, 9), bug],
    ):
        assert decide_give_up(tries, RestartLimits(), NOW) is None


def test_the_diagnosis_tells_what_happened_how_often() -> None:
    found = decide_give_up([one(FAILED, step=7), one(SILENT), one(FAILED, step=7), one(SILENT)], RestartLimits(), NOW)
    assert isinstance(found, GiveUp)
    assert found.diagnosis.splitlines()[1:] == ["  2 × worker died at step 7: killed", "  2 × worker died: killed"]


tries_of_a_run = st.lists(
    st.builds(
        one,
        st.sampled_from(list(AttemptOutcome)),
        step=st.none() | st.integers(1, 3),
        settings=st.sampled_from([NOW, "before"]),
    ),
    max_size=12,
)


@given(tries_of_a_run, tries_of_a_run)
def test_progress_forgets_what_was_before(before: list[AttemptRecord], after: list[AttemptRecord]) -> None:
    progress = one(SETTLED, 10)
    assert decide_give_up([*before, progress, *after], RestartLimits(), NOW) == decide_give_up(
        [progress, *after], RestartLimits(), NOW
    )


@given(tries_of_a_run)
def test_preemptions_never_count_as_failures(tries: list[AttemptRecord]) -> None:
    without = [item for item in tries if item.end.outcome is not PREEMPTED or item.settings != NOW]
    assert decide_give_up(tries, RestartLimits(), NOW) == decide_give_up(without, RestartLimits(), NOW)


@given(tries_of_a_run)
def test_only_failures_bring_the_end_nearer(tries: list[AttemptRecord]) -> None:
    if decide_give_up(tries, RestartLimits(max_failures=2), NOW) is None:
        assert decide_give_up([*tries, one(PREEMPTED)], RestartLimits(max_failures=2), NOW) is None
        assert len([item for item in count_failures(tries, NOW) if item.end.outcome.is_failure]) <= 2


FIRST, SECOND = CheckpointRef(10, AttemptId(1, "aaaa")), CheckpointRef(20, AttemptId(1, "aaaa"))


def start(ending: AttemptOutcome, *, begun: bool = False, over: CheckpointRef | None = None) -> AttemptRecord:
    passed = (over,) if over else ()
    return AttemptRecord(AttemptEnd(ending), NOW, base=FIRST if over else SECOND, passed_over=passed, has_begun=begun)


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([start(FAILED)], set()),
        ([start(FAILED)] * 2, {SECOND}),
        ([start(FAILED), start(OPEN)], {SECOND}),
        ([start(FAILED), start(FAILED, begun=True)], set()),
        ([start(FAILED), start(PREEMPTED), start(SILENT)], set()),
        ([start(FAILED)] * 2 + [start(FAILED, over=SECOND)], set()),
        ([start(FAILED)] * 2 + [start(PREEMPTED, over=SECOND)], {SECOND}),
        ([start(FAILED)] * 2 + [start(FAILED, over=SECOND), start(FAILED)], set()),
    ],
)
def test_a_checkpoint_that_fails_to_start_twice_is_passed_over_once(
    tries: list[AttemptRecord], expected: set[CheckpointRef]
) -> None:
    assert checkpoints_to_skip(tries) == expected


# -- from the store ----------------------------------------------------------------------------------------------------

SETTINGS = {"name": "run"}
MARK = settings_digest(SETTINGS)


class Life:
    """Leaves in a store what launches and their attempts leave."""

    def __init__(self, storage: LocalStorage, launch: str) -> None:
        self.storage, self.launch = storage, launch
        self.sign(ended=False)
        self.failures = Journal(storage, launch_dir("run", launch), 0, flush_s=0)

    def sign(self, *, ended: bool, exit_code: int | None = None, error: str = "") -> None:
        body = {"ended": ended, "exit_code": exit_code, "settings": MARK, "error": error, "t": 0}
        self.storage.put(f"{launch_dir('run', self.launch)}/alive.json", [json.dumps(body).encode()])

    def attempt(self, *saved: int, steps: bool = True, then: str = "", error: str = "a bug") -> Checkpointer:
        model, optimizer = small_model()
        made = Checkpointer(self.storage, "run", launch=self.launch, notes={"settings": SETTINGS})
        made.resume(model, optimizer)
        assert made.journal
        for step in saved:
            train_step(model, optimizer, step)
            made.journal.write(parse_event({"event": "step", "step": step}))
            assert made.save(step, model, optimizer, {"step": step})
        if steps:
            made.journal.write(parse_event({"event": "step", "step": 99}))
        if then:
            made.journal.write(parse_event({"event": then, "step": 3, "error": error}))
        made.flush()
        return made

    def regrouped(self, before: Checkpointer, *saved: int, durable: bool = True) -> Checkpointer:
        """An attempt that continues `before` in memory; without `durable` its journal is lost with its rank 0."""
        model, optimizer = small_model()
        notes = {"settings": SETTINGS, REGROUPED_FROM: str(before.attempt)}
        made = RegroupingCheckpointer(self.storage, "run", launch=self.launch, notes=notes)
        made.continue_in_memory(9)
        assert made.journal
        if durable:
            made.journal.write(RegroupedEvent(step=9, attempt=str(before.attempt), lost=("w",), marks={}))
            made.flush()
        for step in saved:
            train_step(model, optimizer, step)
            assert made.save(step, model, optimizer, {"step": step})
        return made

    def failure(self, attempt: Checkpointer | None, cause: str = "worker died") -> None:
        name = str(attempt.attempt) if attempt else "unclaimed"
        self.failures.write(GroupFailureEvent(attempt=name, cause=cause, rank=1, message="gone"))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def endings(storage: LocalStorage, live: str = "") -> list[AttemptOutcome]:
    return [item.end.outcome for item in read_attempt_history(RunStore(storage, "run"), live=live)]


def test_nothing_has_happened_yet(storage: LocalStorage) -> None:
    assert read_attempt_history(RunStore(storage, "run")) == []


def test_how_tries_ended(storage: LocalStorage) -> None:
    first = Life(storage, "20260101-000000-a")
    first.failure(None)
    first.failure(first.attempt())
    first.failure(first.attempt(), "preempted")
    first.attempt(then="failed")
    first.attempt(then="stop")
    assert endings(storage) == [FAILED, FAILED, PREEMPTED, FAILED, SETTLED]
    second = Life(storage, "20260102-000000-b")
    assert endings(storage)[5:] == [SILENT]
    assert endings(storage, live=second.launch)[5:] == []
    second.sign(ended=True, exit_code=1, error="no workers")
    assert read_attempt_history(RunStore(storage, "run"))[-1].end.message == "no workers"
    second.sign(ended=True, exit_code=3)
    assert endings(storage)[5:] == []
    second.attempt()
    assert endings(storage)[5:] == [SETTLED]
    second.sign(ended=False)
    assert endings(storage)[5:] == [SILENT]
    assert endings(storage, live=second.launch)[5:] == [OPEN]
    assert {item.settings for item in read_attempt_history(RunStore(storage, "run"))} == {MARK}
    assert read_attempt_history(RunStore(storage, "run"))[3].failed_step == 3


@pytest.mark.parametrize(
    ("error", "ended", "expected"),
    [
        ("RuntimeError: gloo: Connection reset by peer", False, "driver lost"),
        ("RuntimeError: gloo: Connection reset by peer", True, "error"),
        ("a bug", False, "error"),
    ],
)
def test_a_rank_outlives_a_killed_driver_by_a_moment(
    storage: LocalStorage, error: str, ended: bool, expected: str
) -> None:
    life = Life(storage, "20260101-000000-a")
    life.attempt(then="failed", error=error)
    life.sign(ended=ended, exit_code=1)
    assert [item.end.cause for item in read_attempt_history(RunStore(storage, "run"))] == [expected]


def test_an_attempt_that_its_launch_ended_on_purpose_is_no_failure(storage: LocalStorage) -> None:
    """A planned resize ends the workers without a word; then the driver is killed."""
    life = Life(storage, "20260101-000000-a")
    life.attempt(1)
    life.attempt()
    assert endings(storage) == [SETTLED, SILENT]
    assert endings(storage, live=life.launch) == [OPEN, OPEN]


@pytest.mark.parametrize("durable", [True, False], ids=["journal", "claim-alone"])
def test_losses_that_the_group_survived_in_memory_do_not_count(storage: LocalStorage, durable: bool) -> None:
    life = Life(storage, "20260101-000000-a")
    made = life.attempt(then="failed", error="the lost rank's own error")
    for _ in range(50):
        life.failure(made)
        made = life.regrouped(made, durable=durable)
    records = read_attempt_history(RunStore(storage, "run"), live=life.launch)
    assert [item.end.outcome for item in records] == [SETTLED] * 50 + [OPEN]
    assert {(item.end.cause, item.end.message, item.end.rank) for item in records[:-1]} == {
        ("regrouped", "worker died: gone", 1)
    }
    limits = RestartLimits(max_failures=0, max_same_step=1, max_preemptions=0)
    assert decide_give_up(records, limits, MARK) is None
    life.failure(made)
    records = read_attempt_history(RunStore(storage, "run"), live=life.launch)
    assert len(count_failures(records, MARK)) == 1
    assert decide_give_up(records, RestartLimits(max_failures=1), MARK) is None
    assert decide_give_up(records, limits, MARK) is not None


def test_commits_of_a_regrouped_attempt_are_progress(storage: LocalStorage) -> None:
    life = Life(storage, "20260101-000000-a")
    for _ in range(3):
        life.failure(made := life.attempt())
    made = life.regrouped(life.regrouped(life.attempt()), 5)
    made = life.regrouped(made)
    life.failure(made)
    records = read_attempt_history(RunStore(storage, "run"))
    assert [item.commits for item in records] == [(5,), ()]
    assert len(count_failures(records, MARK)) == 1


def test_a_regrouped_attempt_did_not_start_from_a_checkpoint(storage: LocalStorage) -> None:
    """What the group holds in memory is no sign that the newest checkpoint cannot be started from."""
    life = Life(storage, "20260101-000000-a")
    life.failure(life.attempt(1))
    life.failure(life.attempt(steps=False))
    made = life.attempt(steps=False)
    for _ in range(3):
        life.failure(made)
        made = life.regrouped(made)
    life.failure(made)
    assert checkpoints_to_skip(read_attempt_history(RunStore(storage, "run"))) == set()


def test_they_are_read_from_the_last_progress_on(storage: LocalStorage) -> None:
    life = Life(storage, "20260101-000000-a")
    life.failure(None)
    life.failure(life.attempt())
    life.failure(life.attempt(1, 2))
    life.failure(life.attempt())
    tries = read_attempt_history(RunStore(storage, "run"))
    assert [item.commits for item in tries] == [(1, 2), ()]
    assert tries[1].base == CheckpointRef(2, tries[0].attempt or AttemptId(0, ""))


def test_the_one_before_is_taken_and_then_the_newest_again(storage: LocalStorage) -> None:
    """With the weights that it holds, and nothing that the run has is lost for it."""
    life = Life(storage, "20260101-000000-a")
    saver = life.attempt(1, 2)
    life.failure(saver)
    started = []
    for _ in range(4):
        attempt = life.attempt(steps=False)
        life.failure(attempt)
        started.append(read_attempt_history(RunStore(storage, "run"))[-1])
    one, two = (CheckpointRef(step, saver.attempt) for step in (1, 2))
    assert [item.base for item in started] == [two, two, one, two]
    assert [item.passed_over for item in started] == [(), (), (two,), ()]
    assert [manifest.ref for manifest in read_catalog(storage, "run").accepted] == [two, one]

    model, optimizer = small_model(seed=5)
    expected, its_optimizer = small_model()
    for step in (1, 2):
        train_step(expected, its_optimizer, step)
    Checkpointer(storage, "run", launch="20260101-000000-a").resume(model, optimizer)
    assert digests_of(model, optimizer) == digests_of(expected, its_optimizer)


def test_a_checkpoint_is_not_passed_over_for_nothing(storage: LocalStorage) -> None:
    life = Life(storage, "20260101-000000-a")
    life.failure(life.attempt(1))
    for _ in range(3):
        life.failure(life.attempt(steps=False))
    assert [item.base.step for item in read_attempt_history(RunStore(storage, "run"))[1:] if item.base] == [1, 1, 1]


def test_the_clocks_of_drivers_decide_nothing(storage: LocalStorage) -> None:
    """A launch on a machine whose clock is years behind comes after the one whose place it took."""
    first = Life(storage, "20260101-000000-a")
    first.failure(first.attempt(1))
    for number in range(3):
        late = Life(storage, f"19700101-00000{number}-b")
        late.failure(late.attempt())
    assert [item.commits for item in read_attempt_history(RunStore(storage, "run"))] == [(1,), (), (), ()]
    given_up = decide_give_up(read_attempt_history(RunStore(storage, "run")), RestartLimits(max_failures=3), MARK)
    assert given_up is not None
    assert given_up.reason.startswith("4 failures")
