"""The state of a run, read from its storage alone."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan
from pathlib import Path

import pytest
import typer
from rich.console import Console

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import launch_dir
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.status import status
from outlast.cluster.monitoring.console_progress import LOST_TIMEOUT_S, WATCH_PERIOD_S, watch
from outlast.cluster.monitoring.status import list_runs, read_status
from outlast.cluster.monitoring.timeline import State
from outlast.cluster.monitoring.timeline_records import LOST_AFTER_S
from tests.support.small_model import small_model
from tests.support.timelines import (
    attempt,
    done,
    evaluated,
    failure,
    launch,
    plan,
    resized,
    resume,
    saved,
    start,
    steps,
    write,
)

OUTLAST = str(Path(sys.executable).with_name("outlast"))


def outlast(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([OUTLAST, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stderr
    return ended


def test_there_is_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 'run'"):
        read_status(RunStore(LocalStorage(tmp_path), "run"))
    assert list_runs(LocalStorage(tmp_path)) == ([], {})


def test_a_custom_loop_is_unattended(tmp_path: Path) -> None:
    storage, (model, optimizer) = LocalStorage(tmp_path), small_model()
    checkpointer = Checkpointer(storage, "run")
    checkpointer.resume(model, optimizer)
    assert checkpointer.save(3, model, optimizer, {})
    found = read_status(RunStore(storage, "run"))
    assert (found["state"], found["step"], found["attempts"]) == ("unattended", 3, 1)
    assert found["newest_checkpoint"]["step"] == 3
    assert found["newest_checkpoint"]["verified_at"] is None
    again = Checkpointer(storage, "run")
    assert again.resume(model, optimizer) is not None
    again.flush()
    newest = read_status(RunStore(storage, "run"))["newest_checkpoint"]
    assert newest["verified_at"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("silent_s", "code", "state"),
    [(0, None, "starting"), (LOST_AFTER_S + 1, None, "lost"), (0, 75, "stopped"), (0, 3, "failed")],
)
def test_a_launch_that_no_worker_has_joined(tmp_path: Path, silent_s: float, code: int | None, state: str) -> None:
    storage = LocalStorage(tmp_path)
    body = {"t": time.time() - silent_s, "ended": code is not None, "exit_code": code}
    storage.put(f"{launch_dir('run', 'one')}/alive.json", [json.dumps(body).encode()])
    [found], _ = list_runs(storage)
    assert (found["run"], found["state"], found["step"]) == ("run", state, 0)
    assert found["newest_checkpoint"] is None


def test_a_driver_killed_on_this_machine_is_lost_at_once_and_the_next_command_is_printed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.run_store.liveness import LivenessFile

LivenessFile(open_storage(sys.argv[1]), "run/launches/20260101-000000-aa/alive.json")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_status(RunStore(LocalStorage(tmp_path), "run"))["state"] == "lost"
    text = outlast("status", str(tmp_path / "run")).stdout
    assert "→ outlast train RUN.yaml (or submit) resumes from the beginning" in text
    assert "there is no checkpoint yet" in outlast("checkpoints", "ls", str(tmp_path / "run"), code=5).stderr


def restarted_run(now: float, code: int | None = None) -> list[tuple[object, dict[str, object], object]]:
    """Make a run whose worker died and that resumed from step 60 with three workers; it began five minutes ago."""
    b, end = now - 300, [done(now - 5, 170)] if code == 0 else []
    return [
        launch("a", b, now, code, failure(1, b + 105), resized(1, b + 110, 2, 3, planned=False)),
        attempt(1, b + 20, start(b + 21), plan(b + 22, 170), steps(1, 90, b + 26, 0.8), saved(60, b + 76)),
        attempt(
            2, b + 115, resume(b + 117, 60), plan(b + 118, 170, 3), steps(61, 170, b + 120, 1.5), end, world_size=3
        ),
    ]


def test_text_and_json_agree(tmp_path: Path) -> None:
    storage, now = LocalStorage(tmp_path), time.time()
    write(storage, "run", *restarted_run(now, 0))
    found = json.loads(outlast("status", str(tmp_path / "run"), "--json").stdout)
    assert (found["state"], found["step"], found["num_steps"], found["world_size"]) == ("done", 170, 170, 3)
    assert (found["lost_steps"], found["attempts"]) == (30, 2)
    assert (
        [item["cause"] for item in found["interruptions"]] == ["worker died"] == [e["cause"] for e in found["failures"]]
    )
    assert found["sizes"][0] | {"t": 0} == {
        "t": 0,
        "attempt": "0001-0001",
        "before": 2,
        "now": 3,
        "cause": "worker died",
    }
    assert found["wall_s"] == pytest.approx(sum(found["ledger"].values()), abs=0.01) == pytest.approx(300, abs=0.01)
    assert found["goodput"] == pytest.approx(found["ledger"]["train"] / found["wall_s"], abs=1e-5)
    assert found["ledger"]["redo"] == pytest.approx(45, abs=0.01)
    text = outlast("status", str(tmp_path / "run")).stdout
    for words in (
        "run  done, attempt 2, 3 workers, 5 min total",
        "170/170 100 %",
        "redo 45 s",
        "30 steps, in 1 interruption",
        "worker died (rank 1): it was killed",
        "    rank 1",
        "2 workers → 3: worker died",
        "attempts: 2",
    ):
        assert words in text, text
    assert "\x1b" not in text


def test_json_has_only_finite_numbers(tmp_path: Path) -> None:
    strange = {**evaluated(9, 21, 22), "eval_loss": nan, "eval_perplexity": inf}
    write(LocalStorage(tmp_path), "run", launch("a", 0, 90, 75), attempt(1, 10, start(11), steps(1, 9, 12), strange))
    [body], _ = list_runs(LocalStorage(tmp_path))
    assert body["scores"] == {"eval_loss": None, "eval_perplexity": None}
    assert json.loads(json.dumps(body, allow_nan=False)) == body, "it changes in a round trip"


@pytest.mark.parametrize(
    ("silent_s", "code", "expected"), [(1, 0, 0), (1, 75, 75), (1, 130, 75), (1, 3, 1), (LOST_TIMEOUT_S + 1, None, 1)]
)
def test_a_watch_ends_as_the_run_did(tmp_path: Path, silent_s: float, code: int | None, expected: int) -> None:
    last = time.time() - silent_s
    write(LocalStorage(tmp_path), "run", launch("a", last - 90, last, code), attempt(1, last - 80, start(last - 79)))
    with pytest.raises(typer.Exit) as end:
        status(str(tmp_path / "run"), watch=True)
    assert end.value.exit_code == expected


def test_a_watch_waits_for_a_driver_that_a_supervisor_may_start_again(tmp_path: Path) -> None:
    storage, last = LocalStorage(tmp_path), time.time() - LOST_AFTER_S - 60
    write(storage, "run", launch("a", last - 90, last), attempt(1, last - 80, start(last - 79)))
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, RunStore(storage, "run"), Console(file=io.StringIO()))
        with pytest.raises(TimeoutError):
            watching.result(WATCH_PERIOD_S)
        write(storage, "run", launch("b", last + 95, last + 99, 0))
        assert watching.result(60).state is State.DONE


def test_watching_until_the_end_where_there_is_no_terminal(tmp_path: Path) -> None:
    """Another process shows the run; it learns of the end from the storage alone."""
    storage, now = LocalStorage(tmp_path), time.time()
    write(storage, "run", *restarted_run(now))
    watching = subprocess.Popen(
        [OUTLAST, "status", str(tmp_path / "run"), "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killer = threading.Timer(90, watching.kill)
    killer.start()
    assert watching.stderr is not None
    first = watching.stderr.readline()
    assert first.startswith("run: running, step 170/170  loss 0.059  lr 0.001"), first
    assert watching.poll() is None
    write(storage, "run", *restarted_run(now, 0))
    out, err = watching.communicate()
    killer.cancel()
    assert (watching.returncode, out, err) == (0, "", "")
    assert "there is no run" in outlast("status", str(tmp_path / "nobody"), "--watch", code=2).stderr
    assert "--watch" in outlast("status", "nobody", "--watch", "--json", code=2).stderr


def test_what_only_the_driver_recorded_of_an_attempt(tmp_path: Path) -> None:
    """Rank 0 was killed before it wrote its journal: the steps are those of the driver's heartbeat."""
    storage = LocalStorage(tmp_path)
    name, alive, events = launch("a", 100.0, 130.0, 130)
    progress = {"attempt": "0001-0001", "step": 7, "ended_at": 129.5, "num_steps": 400}
    write(storage, "run", (name, {**alive, "progress": progress}, events), attempt(1, 110.0))
    found = read_status(RunStore(storage, "run"))
    assert (found["state"], found["step"], found["num_steps"]) == ("stopped", 7, 400)
    shown = outlast("status", str(tmp_path / "run")).stdout
    assert "7/400" in shown
    assert "1 interruption, the last one not resumed yet" in shown
    assert "0 steps" not in shown
    for wrong in (None, 3, {"attempt": "0009-0001", "step": 7}, {"attempt": "0001-0001", "step": "7", "num_steps": []}):
        write(storage, "run", (name, {**alive, "progress": wrong}, events), attempt(1, 110.0))
        assert read_status(RunStore(storage, "run"))["step"] == 0
    assert "0, as far as is recorded" in outlast("status", str(tmp_path / "run")).stdout


def test_the_runs_of_a_storage(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for run in ("one", "two"):
        write(storage, run, launch("a", 100.0, 130.0, 75), attempt(1, 110.0, start(110.0), plan(110.0)))
    lines = outlast("status", str(tmp_path)).stdout.splitlines()
    assert [line.split() for line in lines] == [[run, "stopped", "step", "0/100"] for run in ("one", "two")]
    assert [run["run"] for run in json.loads(outlast("status", str(tmp_path), "--json").stdout)] == ["one", "two"]
