"""Early stopping: at the same step on all ranks, also after a kill; and a run that it ended is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import MANIFEST
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.query import find_model
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.model_checks import check_metric
from outlast.trainers.config.train import EarlyStoppingSettings
from outlast.trainers.loop.log_history import PatienceState, patience_state
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import digests, fault, losses, run_group, tiny_config

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "values", "expected"),
    [
        ({}, [], PatienceState()),
        ({}, [3.0, 2.0, 1.0], PatienceState(1.0, 2, 0)),
        ({}, [3.0, 2.0, 2.0, 2.5], PatienceState(2.0, 1, 2)),
        ({}, [3.0, 4.0, 2.0, 4.0], PatienceState(2.0, 2, 1)),
        ({"min_delta": 0.5}, [3.0, 2.6, 2.5, 2.4], PatienceState(2.4, 3, 0)),
        ({"min_delta": 0.5}, [3.0, 2.6, 2.5], PatienceState(3.0, 0, 2)),
        ({"mode": "max"}, [0.5, 0.7, 0.6], PatienceState(0.7, 1, 1)),
        ({"mode": "max", "min_delta": 0.1}, [0.5, 0.55, 0.61], PatienceState(0.61, 2, 0)),
        ({}, [NAN, NAN], PatienceState(None, 0, 2)),
        ({}, [NAN, 3.0, NAN], PatienceState(3.0, 1, 1)),
        ({}, [float("inf"), 3.0], PatienceState(3.0, 1, 0)),
    ],
    ids=str,
)
def test_patience(settings: dict[str, Any], values: list[float], expected: PatienceState) -> None:
    history = [{"step": step, "epoch": 0.0, "eval_loss": value} for step, value in enumerate(values)]
    assert patience_state(EarlyStoppingSettings.model_validate(settings), history) == expected


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="early_stopping needs eval_every"):
        tiny_config("run", "/runs", "/data.txt", eval_every=None, early_stopping={})
    config = tiny_config("run", "/runs", "/data.txt", early_stopping={"metric": "eval_accuracy"})
    with pytest.raises(ConfigError, match="'eval_accuracy' is not measured by task causal-lm; it measures"):
        check_metric(config, {})


def test_how_often_to_evaluate_decides_numbers_then() -> None:
    """Without early stopping it does not, and may be changed midway."""
    assert "eval_every" not in tiny_config("run", "/runs", "/data.txt").numerics_settings()["train"]
    early = tiny_config("run", "/runs", "/data.txt", early_stopping={}).numerics_settings()["train"]
    assert early["eval_every"] == 4
    assert early["early_stopping"]["patience"] == 3


# -- whole runs: a learning rate that spoils the model, so that an early evaluation is the best ---------------------

SPOILED = {
    "steps": 30,
    "lr": 2.0,
    "warmup": 0,
    "schedule": "constant",
    "eval_every": 2,
    "early_stopping": {"patience": 3},
    "sections": {"checkpoint": {"keep_best": 1, "load_best": True}},
}


def ending(storage: LocalStorage, run: str) -> dict[str, Any]:
    """Return the journal's last early-stop event; every attempt that got so far must have the same."""
    stops = [event for _, event in run_events(RunStore(storage, run)) if event["event"] == "early-stop"]
    facts = [{key: event[key] for key in ("step", "reason", "best", "best_step")} for event in stops]
    assert facts
    assert all(item == facts[0] for item in facts)
    return facts[0]


def published(storage: LocalStorage, run: str) -> Manifest:
    model = find_model(RunStore(storage, run))
    assert model is not None
    assert not model.faults
    return Manifest.parse(read_bytes(storage, f"{model.path}/{MANIFEST}"))


def test_a_run_ends_early_with_its_best(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    ended = run_group(assign("early", **SPOILED), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    found = ending(storage, "early")
    assert found["reason"] == "3 evaluations without a better eval_loss"
    assert found["step"] == found["best_step"] + 6 < 30
    assert max(losses(storage, "early")) == found["step"]
    accepted = read_catalog(storage, "early").accepted
    assert accepted[0].ref.step == found["step"], "the end is saved, whatever the interval"
    rated = {item.ref.step: item.metrics["eval_loss"] for item in accepted if "eval_loss" in item.metrics}
    model = published(storage, "early")
    assert model.extra["final_step"] == found["step"]
    assert model.ref.step == min(rated, key=lambda step: rated[step])

    again = run_group(assign("early", launch="second", **SPOILED), storage, 2)
    assert [item.outcome for item in again] == [Outcome.DONE] * 2
    assert max(losses(storage, "early")) == found["step"], "nothing was trained any more"


def killed_equals_uninterrupted(
    point: FaultPoint, back: int, size: int, assign: Callable[..., Assignment], storage: LocalStorage, folder: Path
) -> None:
    """Kills `back` steps before the end, so that some of the patience was spent before and some after."""
    whole = f"early-whole-{size}"
    if not read_catalog(storage, whole).accepted:
        run_group(assign(whole, **SPOILED), storage, size)
    end = ending(storage, whole)
    run = f"early-{point.value}-{back}-{size}"
    strike = fault(point, end["step"] - back, size - 1 if point is FaultPoint.STEP else 0, FaultAction.SIGKILL, folder)
    run_group(assign(run, faults=(strike,), **SPOILED), storage, size)
    assert Path(strike.record).exists()
    assert run_group(assign(run, launch="second", **SPOILED), storage, size)[0].outcome is Outcome.DONE
    assert ending(storage, run) == end
    assert digests(storage, run) == digests(storage, whole)
    assert losses(storage, run) == losses(storage, whole)
    assert published(storage, run).ref.step == published(storage, whole).ref.step


def test_patience_survives_a_kill(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> None:
    killed_equals_uninterrupted(FaultPoint.STEP, 2, 2, assign, storage, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("point", "back"),
    [(FaultPoint.STEP, 1), (FaultPoint.STEP, 4), (FaultPoint.BEFORE_SNAPSHOT, 0), (FaultPoint.AFTER_RETENTION, 0)],
)
def test_patience_survives_a_kill_anywhere(
    point: FaultPoint, back: int, size: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """Also at the very end: before its save, and between its commit and the model. About 5 s each."""
    killed_equals_uninterrupted(point, back, size, assign, storage, tmp_path)
