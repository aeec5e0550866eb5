"""Who hangs, who is slow: tables, and real groups with a rank that spins, is stopped, or dawdles. About 25 s."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.hang_detection import GroupProgress, Heartbeat, find_hang, find_slow
from outlast.cluster.fault_tolerance.watchdog import EXIT_CODE, Watchdog
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.rank_activity import RankActivity, StepPhase
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.ranks import on_ranks
from tests.support.groups.watched_group import SocketTransport, Watched, serve
from tests.support.groups.worker_group import digests, fault, losses, run_group
from tests.support.tasks.slow_rank import FOLDER, TROUBLE

LIMIT_S = 60.0


def beat(rank: int, phase: StepPhase, step: int, seconds: float, limit_s: float = LIMIT_S) -> Heartbeat:
    return Heartbeat(rank, 2, f"host-{rank}", phase, step, seconds, limit_s)


@pytest.mark.parametrize(
    ("first", "second", "age", "expected"),
    [
        pytest.param((StepPhase.EXCHANGE, 7, 59), (StepPhase.COMPUTE, 7, 59), 0, None, id="not-yet"),
        pytest.param((StepPhase.EXCHANGE, 7, 61), (StepPhase.COMPUTE, 7, 61), 0, (1,), id="spins"),
        pytest.param((StepPhase.EXCHANGE, 7, 61), (StepPhase.EXCHANGE, 7, 1), 61, (1,), id="stopped-while-it-waited"),
        pytest.param((StepPhase.EXCHANGE, 7, 61), (StepPhase.EXCHANGE, 7, 61), 0, (0, 1), id="both-wait"),
        pytest.param((StepPhase.AGREE, 7, 61), (StepPhase.DATA, 7, 61, 900), 0, None, id="waits-for-data"),
        pytest.param((StepPhase.AGREE, 7, 61), (StepPhase.DATA, 7, 1, 900), 61, (1,), id="stopped-while-it-read"),
        pytest.param((StepPhase.DATA, 7, 901, 900), (StepPhase.DATA, 7, 901, 900), 0, (0, 1), id="no-data-at-all"),
        pytest.param((StepPhase.DATA, 8, 901, 900), (StepPhase.SAVE, 8, 100, 900), 0, None, id="the-other-saves"),
        pytest.param(
            (StepPhase.FINISH, 8, 300, 900), (StepPhase.UPDATE, 7, 0, inf), 300, None, id="the-other-has-ended"
        ),
        pytest.param((StepPhase.AGREE, 7, 70), (StepPhase.AGREE, 7, 1), 0, None, id="the-other-has-just-come"),
    ],
)
def test_who_hangs(first: Any, second: Any, age: float, expected: tuple[int, ...] | None) -> None:
    found = find_hang({0: (beat(0, *first), 0.5), 1: (beat(1, *second), age)})
    assert (found and found.ranks) == expected


def test_a_hang_says_where_each_missing_rank_is() -> None:
    group = GroupProgress()
    assert group.apply(beat(0, StepPhase.EXCHANGE, 40, 10), now=100) is None
    group.apply(beat(1, StepPhase.COMPUTE, 40, 10), now=100)
    hang = group.apply(beat(0, StepPhase.EXCHANGE, 40, 70), now=160)
    assert hang is not None
    assert hang.message == "no progress for 70 s: rank 1 on host-1 is in step 41, forward and backward, silent for 60 s"
    assert group.check(now=1000) is hang


@pytest.mark.parametrize(
    ("work", "slow"),
    [
        ({0: 1.0}, {}),
        ({0: 1.0, 1: 1.45}, {}),
        ({0: 1.0, 1: 1.6}, {1: 1.6}),
        ({0: 1.0, 1: 1.1, 2: 0.9, 3: 2.0}, {3: 2.0}),
        ({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, {}),  # no rank stands out
        ({**dict.fromkeys(range(100), 1.0), 7: 1.6, 50: 3.0}, {7: 1.6, 50: 3.0}),
    ],
)
def test_who_is_slow(work: dict[int, float], slow: dict[int, float]) -> None:
    assert find_slow(work) == slow


def test_each_phase_has_its_time(tmp_path: Path) -> None:
    step_progress = RankActivity()
    watchdog = Watchdog(None, "group", 0, 1, step_progress, 60, LocalStorage(tmp_path), str, print)  # type: ignore[arg-type]
    assert [watchdog.limit_s(phase) for phase in (StepPhase.START, StepPhase.COMPUTE)] == [
        900,
        900,
    ]  # steps are not known yet
    step_progress._steps.extend([10.0, 10.0, 500.0])
    assert [watchdog.limit_s(phase) for phase in (StepPhase.START, StepPhase.EVALUATE, StepPhase.COMPUTE)] == [
        900,
        900,
        200,
    ]


def wait_in_vain(address: str, storage: str) -> str:
    """Let rank 1 not arrive; return what rank 0's time-out becomes."""
    ranks = RankGroup(timedelta(seconds=2))
    step_progress = RankActivity()
    watchdog = Watchdog(
        SocketTransport(address),
        "group",
        ranks.rank,
        2,
        step_progress,
        60,
        open_storage(storage),
        str,
        print,
        period_s=0.1,
    )
    with watchdog:
        step_progress.at(StepPhase.DATA if ranks.rank else StepPhase.AGREE, 40)
        if ranks.rank:
            time.sleep(4)  # a rank that is late, by more than the time-out
            return ""
        try:
            ranks.gather("here")
        except RuntimeError as error:
            explained = watchdog.explain(error)
            return explained.message if explained else "nothing explained"
    return "rank 1 came"


def test_a_collective_that_times_out_names_the_missing_rank(tmp_path: Path, storage: LocalStorage) -> None:
    with serve(tmp_path / "coordinator"):
        message, _ = on_ranks(2, wait_in_vain, str(tmp_path / "coordinator"), storage.url)
    host = socket.gethostname()
    assert f"in step 41, agreement, and rank 1 did not arrive: rank 1 on {host} is in step 41, data" in message


def test_other_errors_stay_as_they_are(tmp_path: Path, storage: LocalStorage) -> None:
    with serve(tmp_path / "coordinator"):
        watchdog = Watchdog(
            SocketTransport(str(tmp_path / "coordinator")), "group", 0, 1, RankActivity(), None, storage, str, print
        )
        assert watchdog.explain(RuntimeError("Connection reset by peer")) is None


def test_a_rank_that_has_ended_is_never_late(tmp_path: Path, storage: LocalStorage) -> None:
    with serve(tmp_path / "coordinator") as coordinator:
        with Watchdog(
            SocketTransport(str(tmp_path / "coordinator")), "group", 0, 1, RankActivity(), 60, storage, str, print
        ):
            pass
        assert coordinator.beats("group")[0][0].limit_s == inf


@pytest.fixture
def watch(storage: LocalStorage, tmp_path: Path) -> Any:
    with serve(tmp_path / "coordinator") as coordinator:
        yield lambda run, hang_after_s: (
            coordinator,
            Watched(str(tmp_path / "coordinator"), storage.url, run, hang_after_s),
        )


def events_of(storage: LocalStorage, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in run_events(RunStore(storage, run)) if event["event"] == kind]


def assert_goes_on(assignment: Assignment, storage: LocalStorage, reference: Reference) -> None:
    assert [item.outcome for item in run_group(assignment, storage, 2)] == [Outcome.DONE] * 2
    assert digests(storage, assignment.config.name) == reference.digests
    assert losses(storage, assignment.config.name) == reference.losses


def test_a_rank_spins(
    storage: LocalStorage,
    assign: Callable[..., Assignment],
    reference: Callable[[int], Reference],
    watch: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The stacks of both ranks name the line, both end, and the next attempt goes on."""
    monkeypatch.setenv(TROUBLE, "spin:1")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    coordinator, control = watch("spins", 2.0)
    assignment = assign("spins", sections={"model": {"task": "tests.support.tasks.slow_rank:Troubled"}})
    first, second = run_group(assignment, storage, 2, control)
    assert second.exit_code == EXIT_CODE
    assert first.exit_code in (EXIT_CODE, 1), "it may hear first that the other has gone"
    hangs = {event["rank"]: event for event in events_of(storage, "spins", "hang")}
    assert hangs.keys() == {0, 1}
    assert all(event["missing"] == [1] for event in hangs.values())
    assert any("spin_for_ever" in line for stack in hangs[1]["threads"].values() for line in stack)
    assert coordinator.take_hang().ranks == (1,)
    assert coordinator.take_hang() is None
    assert_goes_on(assignment, storage, reference(2))


def test_a_rank_is_stopped_and_comes_back(
    storage: LocalStorage,
    assign: Callable[..., Assignment],
    reference: Callable[[int], Reference],
    watch: Any,
    tmp_path: Path,
) -> None:
    """The others find out; when the stopped one goes on it finds that its group has ended, and ends too."""
    stop = fault(FaultPoint.ACCUMULATING, 5, 1, FaultAction.STOP, tmp_path)
    _, control = watch("stopped", 2.0)
    assignment = assign("stopped", faults=(stop,))
    ended: list[Any] = []
    group = threading.Thread(target=lambda: ended.extend(run_group(assignment, storage, 2, control)))
    group.start()
    deadline = time.monotonic() + 40
    while not events_of(storage, "stopped", "hang") and time.monotonic() < deadline:
        time.sleep(0.1)
    store = RunStore(storage, "stopped")
    [first, second] = read_claim(store, list_attempts(store)[0])["workers"]
    while Path(f"/proc/{first['pid']}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    hangs = events_of(storage, "stopped", "hang")
    os.kill(second["pid"], signal.SIGCONT)
    group.join()
    assert Path(stop.record).exists()
    assert [(event["rank"], event["missing"]) for event in hangs] == [(0, [1])]
    assert ended[0].exit_code == EXIT_CODE
    assert ended[1].outcome is None
    assert_goes_on(assignment, storage, reference(2))


@pytest.mark.faults
def test_a_rank_dawdles(
    storage: LocalStorage, assign: Callable[..., Assignment], watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TROUBLE, "slow:1")
    _, control = watch("dawdles", 60.0)
    assignment = assign("dawdles", sections={"model": {"task": "tests.support.tasks.slow_rank:Troubled"}}, steps=100)
    assert run_group(assignment, storage, 2, control)[0].outcome is Outcome.DONE
    [slow] = events_of(storage, "dawdles", "slow")
    assert [item["rank"] for item in slow["ranks"]] == [1]
    assert slow["ranks"][0]["times"] > 1.5
    assert not events_of(storage, "dawdles", "hang")
