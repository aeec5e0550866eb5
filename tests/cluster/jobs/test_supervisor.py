"""Supervision: decisions as tables; and a real job server whose drivers and whose head are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing.run_store.attempt_history import settings_digest
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.fault_tolerance.restart_policy import GiveUp
from outlast.cluster.jobs.ray_jobs import SubmittedJob
from outlast.cluster.jobs.supervisor import (
    MAX_PAUSE_S,
    SILENCE_TIMEOUT_S,
    NextAction,
    StallDetector,
    Supervisor,
    decide,
    pause_s,
)
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.cluster.jobs.test_ray_jobs import BIN, Cluster
from tests.support.groups.worker_group import digests, run_group, tiny_config
from tests.support.timelines import attempt, launch, resume, start, write

GIVEN_UP = GiveUp("enough", ())
NUM_STEPS = 500
STALL_S = 30
#: Slow, and hangs once, as set by environment variables: time to kill something, on a busy machine too. It hangs in the
#: 30th batch: the driver's dry step has fewer.
SLOW = """
import itertools, os, time
from types import SimpleNamespace
from torch import nn

BATCHES = itertools.count(1)

class Slow(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, input_ids, **_):
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        if next(BATCHES) == 30 and os.environ.get("HANG_ONCE") and not os.path.exists(os.environ["HANG_ONCE"]):
            open(os.environ["HANG_ONCE"], "w").close()
            time.sleep(10_000)
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))
"""
TRAIN: dict[str, Any] = {"steps": NUM_STEPS, "batch": 4, "micro_batch": 4, "eval_every": 1000}
MODEL = {"class": "slow:Slow", "config": {"width": 8}}


def ended(status: str, code: int | None = None) -> SubmittedJob:
    return SubmittedJob("run-1", "run", 1, status, driver_exit_code=code)


@pytest.mark.parametrize(
    ("job", "given_up", "by_us", "has_worked", "expected"),
    [
        (ended("SUCCEEDED", 0), None, False, True, NextAction.END),
        (ended("STOPPED"), None, False, True, NextAction.END),
        (ended("STOPPED"), None, True, True, NextAction.SUBMIT),
        (ended("STOPPED"), GIVEN_UP, True, True, NextAction.END),
        (ended("FAILED", 1), None, False, True, NextAction.SUBMIT),
        (ended("FAILED", 1), GIVEN_UP, False, True, NextAction.END),
        (ended("FAILED", -9), None, False, True, NextAction.SUBMIT),
        (ended("FAILED"), None, False, False, NextAction.SUBMIT),
        (ended("FAILED", 2), None, False, True, NextAction.END),
        (ended("FAILED", 5), None, False, True, NextAction.END),
        (ended("FAILED", 3), None, False, True, NextAction.SUBMIT),
        (ended("FAILED", 3), None, False, False, NextAction.END),
        (ended("FAILED", 75), None, False, True, NextAction.SUBMIT),
    ],
)
def test_action_after_the_end_of_a_job(
    job: SubmittedJob, given_up: GiveUp | None, by_us: bool, has_worked: bool, expected: NextAction
) -> None:
    assert decide(job, given_up, by_us=by_us, has_worked=has_worked, has_active_launch=False) is expected


def test_a_run_of_another_active_launch_is_not_submitted() -> None:
    """Two supervisors on two clusters would otherwise take it from each other in turn."""
    assert decide(ended("FAILED", 75), None, by_us=False, has_worked=True, has_active_launch=True) is NextAction.END
    assert decide(ended("STOPPED"), None, by_us=True, has_worked=True, has_active_launch=True) is NextAction.SUBMIT


def test_pauses_grow_and_differ() -> None:
    assert [pause_s(number, 1.0) for number in (1, 2, 3, 4)] == [2, 4, 8, 16]
    assert pause_s(3, 0.0) == 4
    assert pause_s(10_000, 1.0) == MAX_PAUSE_S


def findings(stall_s: float, inputs: dict[float, tuple[Any, Any]]) -> dict[float, str]:
    """Return a detector's findings by second, given heartbeat and event by second."""
    clock, found = [0.0], {}
    detector = StallDetector(stall_s, lambda: clock[0])
    for second, (beat, event) in inputs.items():
        clock[0] = second
        if finding := detector.finding(beat, event):
            found[second] = finding
    return found


def test_a_job_without_a_step_is_stalled() -> None:
    assert list(findings(300, {t: (t, "step 7") for t in range(0, 500, 50)})) == [300, 350, 400, 450]
    assert not findings(300, {t: (t, f"step {t}") for t in range(0, 1000, 50)})
    assert not findings(300, {t: (t, None) for t in range(0, 1000, 50)}), "data may take any time"
    assert not findings(300, {0: (0, "step 7"), 250: (1, "step 7"), 299: (2, "step 8"), 590: (3, "step 8")})


def test_a_silent_job_is_found_earlier() -> None:
    found = findings(1800, dict.fromkeys(range(0, 300, 60), (5, "step 7")))
    assert min(found) == SILENCE_TIMEOUT_S
    assert "its driver and its workers have been silent" in found[SILENCE_TIMEOUT_S]
    assert not findings(1800, {t: (5, f"step {t}") for t in range(0, 300, 60)}), "workers continue without their driver"


#: Named by a laptop's clock, an hour ahead, and stopped. The cluster's own launch follows.
LAPTOP = launch("20260101-130000-laptop", 3600, 3700, 75)


def beating(beat: int) -> tuple[str, dict[str, Any], Any]:
    name, alive, events = launch("20260101-120500-cluster", 300, 310 + 5 * beat)
    return name, {**alive, "beat": beat}, events


@pytest.mark.parametrize("has_claimed", [False, True], ids=["preparing", "claimed"])
def test_a_wrong_clock_of_an_earlier_launch_does_not_matter(tmp_path: Path, has_claimed: bool) -> None:
    storage, config = LocalStorage(tmp_path), tiny_config("run", str(tmp_path), "text")
    supervisor = Supervisor(RunConfig.model_validate(config.model_dump()), {}, None)
    dead = launch("20251231-120000-killed", 0, 9)  # killed while it prepared data: recorded as running for ever
    write(storage, "run", dead, LAPTOP, attempt(1, 3610, start(3611), launch=LAPTOP[0]))
    claimed = [attempt(2, 330, resume(331, 9), launch=beating(0)[0])] if has_claimed else []
    found = []
    for beat in range(3):
        write(storage, "run", beating(beat), *claimed)
        found.append(supervisor._progress())
    assert [beat for beat, _ in found[1:]] == [(beating(0)[0], 1), (beating(0)[0], 2)]
    assert {event for _, event in found[1:]} == {("0002-0002", 331.0) if has_claimed else None}


def test_jobs_without_a_launch_count_as_failures(tmp_path: Path) -> None:
    config = tiny_config("run", str(tmp_path), "text")
    supervisor = Supervisor(RunConfig.model_validate(config.model_dump()), {}, None)
    assert [supervisor._num_failed([], ended("FAILED", 1)) for _ in range(3)] == [1, 2, 3]
    name, alive, events = launch("20260101-120000-a", 0, 9)
    write(LocalStorage(tmp_path), "run", (name, {**alive, "settings": settings_digest({})}, events))
    assert supervisor._num_failed([], ended("FAILED", 1)) == 1
    assert supervisor._num_failed([name], ended("FAILED", 1)) == 2
    assert supervisor._num_failed([], ended("FAILED", 3)) == 3, "a cluster that was too small"


# -- a real job server -------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    with monkeypatch.context() as patch:
        patch.setenv("SLOW_S", "0.1")
        patch.setenv("HANG_ONCE", str(tmp_path / "hung"))
        made = Cluster()
    yield made
    made.shut_down()


@pytest.fixture
def run_file(tmp_path: Path, text_file: str) -> Path:
    sections = {"model": MODEL, "checkpoint": {"every": 20}}
    config = tiny_config("far", str(tmp_path), text_file, sections=sections, **TRAIN)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "slow.py").write_text(SLOW)
    path, body = tmp_path / "far.yaml", config.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump({**body, "failure": {"stall_s": STALL_S}}))
    return path


class SuperviseProcess:
    """A process of `outlast submit --supervise` or `outlast supervise`."""

    def __init__(self, *arguments: str) -> None:
        command = [str(BIN / "outlast"), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> str:
        """Read until a line matches, and return its first group."""
        assert self.process.stderr
        for line in self.process.stderr:
            sys.stdout.write(line)
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError(f"it ended with {self.process.wait()} without a line like {pattern!r}")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def wait_for_commit(storage: LocalStorage, after: int) -> int:
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline:
        accepted = read_catalog(storage, "far").accepted
        if accepted and accepted[0].ref.step > after:
            return accepted[0].ref.step
        time.sleep(0.1)
    raise AssertionError(f"no commit after step {after}")


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.faults  # four minutes
def test_a_run_outlives_a_hang_its_driver_its_supervisor_and_its_cluster(
    cluster: Cluster, run_file: Path, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    code = str(tmp_path / "code")
    undisturbed = replace(assign("supervised", sections={"model": MODEL}, **TRAIN), code=code)
    assert run_group(undisturbed, storage, 1, limit_s=200)[0].outcome is Outcome.DONE
    place, at = LocalStorage(tmp_path), ("--address", cluster.address, "--code", code)
    supervise = SuperviseProcess("submit", str(run_file), *at, "--supervise")
    try:
        assert supervise.wait_for("submitted (far-.*)") == "far-1"
        assert float(supervise.wait_for(r"far-1 is running, but no step for (\d+) s")) >= STALL_S
        assert supervise.wait_for("submitted (far-.*)") == "far-2"
        step = wait_for_commit(place, 0)
        os.kill(read_status(RunStore(place, "far"))["launch"]["pid"], signal.SIGKILL)
        assert supervise.wait_for("(far-2) ended: failed")
        assert supervise.wait_for("submitted (far-.*)") == "far-3"
        step = wait_for_commit(place, step)

        supervise.kill()
        supervise = SuperviseProcess("supervise", str(tmp_path / "far"), *at, "--trust-remote-code")
        assert supervise.wait_for("attached to (far-.*)") == "far-3"

        cluster.kill()
        assert supervise.wait_for("(.*); trying again in")
        cluster.start()
        assert supervise.wait_for("submitted (far-.*)") == "far-1"
        assert supervise.process.wait(200) == 0, supervise.process.stderr and supervise.process.stderr.read()
    finally:
        supervise.kill()
    final = read_catalog(place, "far").accepted[0]
    assert final.ref.step == NUM_STEPS
    assert digests(place, "far") == digests(storage, "supervised")
    done = subprocess.run([str(BIN / "outlast"), "supervise", str(run_file), *at], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [failure["cause"] for failure in read_status(RunStore(place, "far"))["failures"]] == ["stalled"]
