"""Trackers are copies of the journal: each step once, also after a kill; an unreachable one does not stop training."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import claim
from outlast.checkpointing.run_store.events import StepEvent, parse_event
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.tracking import TrackSettings
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.tracking.backends import Watermark
from outlast.trainers.tracking.follow import Follower, TrackedEvent, check_trackers, metric_values, past_events
from tests.conftest import Reference
from tests.support.groups.in_place_group import Place, Strike, Striking, in_place_group
from tests.support.groups.worker_group import Quiet, digests, losses, resumed, run_group
from tests.support.s3_server import s3_server

LIMIT_S = 60.0
STEPS, EVALS = list(range(1, 11)), [0, 4, 8, 10]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


@dataclass
class KillAt(Quiet):
    """Kills rank 0's process in a step; with `folder`, only after TensorBoard has written that step there."""

    step: int
    folder: Path | None = None

    def progress(self, event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == self.step:
            deadline = time.monotonic() + LIMIT_S
            while self.folder is not None and time.monotonic() < deadline:
                if self.folder.is_dir() and self.step in dict(scalars(self.folder).get("train/loss", [])):
                    break
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points that TensorBoard draws from a folder: (step, value) by name, in the order of the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(item.step, item.value) for item in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def journal_values(storage: LocalStorage, run: str) -> dict[str, dict[int, float]]:
    """The values of each step in the journal, by name."""
    values: dict[str, dict[int, float]] = {}
    for _, event in run_events(RunStore(storage, run)):
        parsed = parse_event(event)
        if isinstance(parsed, TrackedEvent):
            for name, value in metric_values(parsed).items():
                values.setdefault(name, {})[parsed.step] = value
    return values


def tracked(assignment: Assignment, *names: str) -> Assignment:
    return replace(assignment, track=TrackSettings.model_validate({"to": list(names)}))


def run(assignment: Assignment, storage: LocalStorage, control: Quiet | None = None) -> Outcome | None:
    return run_group(assignment, storage, 2, control)[0].outcome


def check_copy(copy: dict[str, list[tuple[int, float]]], storage: LocalStorage, run: str, single: bool = True) -> None:
    """Check that a copy has each step once, in order, with the journal's values."""
    journal = journal_values(storage, run)
    for name, steps in (("train/loss", STEPS), ("train/lr", STEPS), ("eval/loss", EVALS)):
        assert [step for step, _ in copy[name]] == steps
        expected = [journal[name][step] for step in steps]
        assert [value for _, value in copy[name]] == (
            [float(np.float32(value)) for value in expected] if single else expected
        )
    for points in copy.values():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))


def test_tensorboard_after_a_kill(
    assign: Callable[..., Assignment], storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """Killed at step 8 and resumed from 6: the tracker already has steps 7 and 8, which are computed again."""
    folder = storage.path("tracked/trackers/tensorboard")
    first = tracked(assign("tracked"), "tensorboard")
    assert run(first, storage, KillAt(8, folder)) is None
    assert [step for step, _ in scalars(folder)["train/loss"]] == STEPS[:8]
    assert run(replace(first, launch="second"), storage) is Outcome.DONE
    assert resumed(storage, "tracked")[0]["step"] == 6
    assert losses(storage, "tracked") == reference(2).losses
    copy = scalars(folder)
    check_copy(copy, storage, "tracked")
    assert set(copy) >= {"train/grad_norm", "train/tokens_per_s", "save/waited_s", "save/commit_s", "eval/loss"}
    with_settings = [path for path in folder.iterdir() if b"train.warmup" in path.read_bytes()]
    assert len(with_settings) == 1, "the settings are written once"


def test_missing_steps_are_taken_from_the_journal(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    """Two attempts have no tracker; the third sends the steps that it builds on, each of the last attempt."""
    assert run(assign("missed"), storage, KillAt(5)) is None
    assert run(assign("missed", launch="second"), storage, KillAt(8)) is None
    assert run(tracked(assign("missed", launch="third"), "tensorboard"), storage) is Outcome.DONE
    assert [event["step"] for event in resumed(storage, "missed")] == [3, 6]
    check_copy(scalars(storage.path("missed/trackers/tensorboard")), storage, "missed")


@pytest.mark.parametrize("rank", [0, 1])
def test_losses_that_the_group_survives_in_memory(
    rank: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """The trackers of rank 0 go on with its process, or another process continues the same tracked run."""
    name = f"tracked-in-memory-{rank}"
    strikes = [Strike(Place.FORWARD, step, rank, str(tmp_path / f"struck-{step}")) for step in (4, 8)]
    control = Striking(strikes=strikes)
    with in_place_group(tracked(assign(name), "tensorboard"), storage, 2, num_spares=2, control=control) as group:
        ended = group.ended()
    assert [item and item.outcome for item in ended].count(Outcome.DONE) == 2
    assert all(Path(strike.record).exists() for strike in strikes)
    check_copy(scalars(storage.path(f"{name}/trackers/tensorboard")), storage, name)


def test_steps_that_a_lost_rank_0_left_out_are_taken_from_the_next_journal(storage: LocalStorage) -> None:
    """Steps 5 and 6 were made in the first attempt and recorded in the second; the third resumes from step 6."""
    events: dict[int, list[dict[str, Any]]] = {
        1: [{"event": "start"}, *({"event": "step", "step": step} for step in range(1, 5))],
        2: [
            {"event": "regrouped", "step": 7, "attempt": "0001-0001", "marks": {}},
            *({"event": "step", "step": step} for step in range(5, 8)),
            {"event": "plan", "step": 7},
            {"event": "step", "step": 8},
        ],
    }
    store = RunStore(storage, "left-out")
    for number, bodies in events.items():
        attempt = claim(store, {"launch": "first", "claimed_at": float(number)})
        journal = Journal(storage, store.attempt_dir(attempt), 0)
        for body in bodies:
            full = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0} if body["event"] == "step" else {}
            journal.write(parse_event({**full, **body}))
        journal.flush()
    third = AttemptId(3, "0003")
    assert [event.step for event in past_events(store.fresh(), third, base=6, newest=-1)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in past_events(store.fresh(), third, base=8, newest=6)] == [6, 7, 8]


_NINETY_STEPS = """
import sys
url, kind, dies_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "x":
    sys.modules["tensorboard"] = None
import os, signal
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.run_store.store import RunStore
from outlast.trainers.tracking import backends
from outlast.trainers.tracking.backends import TrackerContext
backends.SEGMENT_BYTES, backends.PUT_S = 1000, 0
tracker = backends.TensorBoard(TrackerContext(RunStore(open_storage(url), "run"), "run-1", {"a": 1}, "outlast", {}))
watermark = tracker.open()
newest = watermark.by_name.get("train/loss", watermark.floor)
print(newest)
for step in range(max(1, newest + 1), 92):
    tracker.log({"train/loss": float(step)}, step, 1.7e9 + step)
    if step == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
tracker.close()
"""


@pytest.mark.parametrize("kind", ["torch", *(pytest.param(kind, marks=pytest.mark.faults) for kind in ("x", "s3"))])
def test_event_files_in_segments(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Written in segments, killed, continued; also with tensorboardX only, and on an object store."""
    url = request.getfixturevalue("bucket") if kind == "s3" else str(tmp_path / "runs")
    for dies_at, code, least in ((41, -9, -1), (0, 0, 1)):  # tensorboardX writes in a thread of its own
        command = [sys.executable, "-c", _NINETY_STEPS, url, kind, str(dies_at)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stdout == "" or int(done.stdout) >= least
    source, folder = open_storage(url), tmp_path / "copy"
    files = [entry.name for entry in source.list("run/trackers/tensorboard")]
    assert len(files) > 2
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(read_bytes(source, f"run/trackers/tensorboard/{name}"))
    assert scalars(folder)["train/loss"] == [(step, float(step)) for step in range(1, 92)]


def test_mlflow_after_a_kill(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="pip install 'outlast[mlflow]'")
    from mlflow import MlflowClient

    uri = f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = storage.path("in-mlflow/trackers/tensorboard")  # with TensorBoard beside it, to know when to kill
    first = tracked(assign("in-mlflow"), "mlflow", "tensorboard")
    assert run(first, storage, KillAt(8, folder)) is None
    assert run(replace(first, launch="second"), storage) is Outcome.DONE
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("outlast")
    assert experiment is not None
    [tracked_run] = client.search_runs([experiment.experiment_id])
    assert tracked_run.info.run_name == "in-mlflow"
    assert tracked_run.data.params["train.lr"] == "0.001"
    history = {name: client.get_metric_history(tracked_run.info.run_id, name) for name in tracked_run.data.metrics}
    check_copy({k: [(x.step, x.value) for x in items] for k, items in history.items()}, storage, "in-mlflow", False)
    check_copy(scalars(folder), storage, "in-mlflow")


def test_wandb_offline_after_a_kill(
    assign: Callable[..., Assignment], storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="pip install 'outlast[wandb]'")
    from tests.support.wandb_files import history

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = storage.path("in-wandb/trackers/tensorboard")
    first = tracked(assign("in-wandb"), "wandb", "tensorboard")
    assert run(first, storage, KillAt(8, folder)) is None
    assert run(replace(first, launch="second"), storage) is Outcome.DONE
    parts = sorted(storage.path("in-wandb/trackers/wandb").glob("offline-run-*"))
    assert len({part.name.split("-", 3)[3] for part in parts}) == 1, "one id, so one run"
    points: dict[str, list[tuple[int, float]]] = {}
    for step, values in history(storage.path("in-wandb/trackers/wandb")):
        for name, value in values.items():
            points.setdefault(name, []).append((step, value))
    check_copy(points, storage, "in-wandb", single=False)


@pytest.fixture
def deaf() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("answers", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["down", "deaf"])
def test_an_unreachable_tracker_does_not_stop_training(
    answers: bool,
    deaf: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    reference: Callable[[int], Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlflow", reason="pip install 'outlast[mlflow]'")
    name = "deaf" if answers else "down"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", deaf if answers else "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert run(tracked(assign(name), "mlflow"), storage) is Outcome.DONE
    assert digests(storage, name) == digests(storage, reference(2).run)
    events = [event for _, event in run_events(RunStore(storage, name)) if event["event"] == "tracker"]
    assert {event["name"] for event in events} == {"mlflow"}
    assert len(events) <= 2, "one report of the error, and one that it did not take all events"


def test_a_slow_tracker_loses_its_own_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded, `apply` returns at once, and the loss is reported once."""
    monkeypatch.setattr("outlast.trainers.tracking.follow.QUEUE_EVENTS", 5)
    go, taken, reported = threading.Event(), list[int](), list[str]()

    class Slow:
        name = "slow"

        def open(self) -> Watermark:
            return Watermark()

        def log(self, values: Any, step: int, at: float) -> None:
            go.wait(LIMIT_S)
            taken.append(step)

        def close(self) -> None:
            pass

    follower = Follower(Slow, lambda newest: [], reported.append)
    for step in range(1, 30):
        follower.apply(StepEvent(step=step, loss=1.0, lr=1.0, grad_norm=None, count=1, seconds=1.0))
    assert len(reported) == 1
    assert "steps from 6 on are dropped" in reported[0]
    go.set()
    follower.close(time.monotonic() + LIMIT_S)
    assert taken == [1, 2, 3, 4, 5]
    assert len(reported) == 1


def test_a_named_tracker_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.trainers.tracking.follow.find_spec", lambda name: None)
    check_trackers(TrackSettings.model_validate({}))  # the default asks for nothing
    with pytest.raises(ConfigError, match=r"track\.to names mlflow, which is not installed") as caught:
        check_trackers(TrackSettings.model_validate({"to": ["mlflow"]}))
    assert "pip install 'outlast[mlflow]'" in caught.value.hint


def test_credentials_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wandb\.api_key looks like a credential"):
        TrackSettings.model_validate({"options": {"wandb": {"api_key": "x"}}})
