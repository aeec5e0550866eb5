"""trainer_state.json: loadable by transformers, with the Trainer's keys, and the same history after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerState, TrainingArguments

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.query import find_model
from outlast.trainers.attempt import Assignment
from outlast.trainers.data.batch_plan import BatchPlan
from outlast.trainers.loop.log_history import LogHistory, best_evaluation
from outlast.trainers.loop.step_exchange import DeferredMetrics
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import fault, newest, run_group

NAN = float("nan")


def trainer_state(storage: LocalStorage, run: str) -> TrainerState:
    folder = Path(RunStore(storage, run).checkpoint_url(newest(storage, run).ref))
    return TrainerState.load_from_json(str(folder / "trainer_state.json"))


def plan_of(num_steps: int) -> BatchPlan:
    return BatchPlan(seed=0, num_samples=8 * 10, batch=8, micro_batch=4, total_samples=8 * num_steps)


def history_of(every: int | None, losses: list[float], norms: list[float | None] | None = None) -> LogHistory:
    history = LogHistory(plan_of(len(losses)), every)
    for step, loss in enumerate(losses):
        norm = (norms or [1.0] * len(losses))[step]
        history.add_step(
            DeferredMetrics(step, 8, 0, {}, None if norm is None else torch.tensor(norm), step / 10, 0.0, 0.0), loss
        )
    return history


def test_an_entry_has_the_mean_loss_since_the_last_one() -> None:
    assert history_of(2, [1.0, 3.0, 5.0, 8.0, 9.0], [1.0, 2.0, 3.0, None, 5.0]).entries == [
        {"step": 2, "epoch": 0.2, "loss": 2.0, "grad_norm": 2.0, "learning_rate": 0.1},
        {"step": 4, "epoch": 0.4, "loss": 6.5, "learning_rate": 0.3},
    ]


def test_losses_that_are_not_finite_do_not_count() -> None:
    entries = history_of(2, [1.0, NAN, NAN, math.inf], [1.0, None, None, None]).entries
    assert entries == [
        {"step": 2, "epoch": 0.2, "loss": 1.0, "learning_rate": 0.1},
        {"step": 4, "epoch": 0.4, "learning_rate": 0.3},
    ]


@pytest.mark.parametrize(
    ("every", "num_steps", "expected"),
    [(None, 1, 1), (None, 500, 1), (None, 501, 2), (None, 10**6, 2000), (1, 2000, 1), (1, 2001, 2), (50, 10**4, 50)],
)
def test_the_history_stays_short(every: int | None, num_steps: int, expected: int) -> None:
    history = LogHistory(plan_of(num_steps), every)
    assert history.every == expected
    assert num_steps // history.every <= (2000 if every else 500)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min", [0.1, 3.0, 2.0, 2.0], (2, 2.0)),  # not the first, which is of step 0
        ("max", [9.0, 3.0, 2.0, 3.5], (3, 3.5)),
        ("min", [1.0, NAN, 2.0], (2, 2.0)),
        ("min", [1.0, NAN], None),
        ("min", [], None),
    ],
)
def test_best_evaluation(mode: str, values: list[float], expected: tuple[int, float] | None) -> None:
    evaluations = [{"step": step, "eval_f1": value} for step, value in enumerate(values)]
    assert best_evaluation(evaluations, "eval_f1", mode) == expected
    assert best_evaluation(evaluations, "eval_other", mode) is None


# -- whole runs --------------------------------------------------------------------------------------------------------

LOGGED = {"log_every": 3, "eval_every": 4, "sections": {"checkpoint": {"keep_best": 1}}}


@pytest.fixture(scope="module")
def undisturbed(assign: Callable[..., Assignment], storage: LocalStorage) -> TrainerState:
    assert run_group(assign("logged", **LOGGED), storage, 2)[0].outcome is Outcome.DONE
    return trainer_state(storage, "logged")


def test_what_transformers_reads(undisturbed: TrainerState, storage: LocalStorage) -> None:
    steps = {event["step"]: event for _, event in run_events(RunStore(storage, "logged")) if event["event"] == "step"}
    logged = [entry for entry in undisturbed.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9]
    for entry in logged:
        step = entry["step"]
        assert entry["loss"] == pytest.approx(sum(steps[number]["loss"] for number in range(step - 2, step + 1)) / 3)
        assert (entry["grad_norm"], entry["learning_rate"]) == (steps[step]["grad_norm"], steps[step]["lr"])
    measured = {entry["step"]: entry["eval_loss"] for entry in undisturbed.log_history if "eval_loss" in entry}
    assert list(measured) == [0, 4, 8, 10]
    assert undisturbed.best_metric == min(measured[4], measured[8], measured[10])
    assert undisturbed.best_global_step is not None
    assert measured[undisturbed.best_global_step] == undisturbed.best_metric
    assert undisturbed.best_model_checkpoint == f"checkpoint-{undisturbed.best_global_step}"
    assert (undisturbed.global_step, undisturbed.max_steps, undisturbed.logging_steps) == (10, 10, 3)
    assert find_model(RunStore(storage, "logged")) is not None


@pytest.mark.parametrize("step", [5, 8, 10])
def test_a_killed_run_has_the_same_history(
    step: int, undisturbed: TrainerState, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """Saves are after steps 3, 4, 6, …: the losses since the last entry are in the checkpoint."""
    run, strike = f"logged-{step}", fault(FaultPoint.STEP, step - 1, 1, FaultAction.SIGKILL, tmp_path)
    run_group(assign(run, faults=(strike,), **LOGGED), storage, 2)
    assert Path(strike.record).exists()
    assert run_group(assign(run, launch="second", **LOGGED), storage, 2)[0].outcome is Outcome.DONE
    found = trainer_state(storage, run)
    assert found.log_history == undisturbed.log_history
    assert (found.best_metric, found.best_global_step) == (undisturbed.best_metric, undisturbed.best_global_step)


def test_the_keys_are_the_trainers(undisturbed: TrainerState, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="eval_loss",
        report_to=[],
        use_cpu=True,
    )
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows, eval_dataset=rows).train()
    theirs = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())

    def keys(history: list[dict[str, Any]], name: str) -> set[str]:
        """Keys of an entry, without the speed of this machine."""
        entry = next(entry for entry in history if name in entry)
        return {key for key in entry if not key.endswith(("_runtime", "_per_second"))}

    for name in ("loss", "eval_loss"):
        assert keys(undisturbed.log_history, name) == keys(theirs["log_history"], name)
    for name in ("best_metric", "best_global_step", "best_model_checkpoint"):
        assert type(getattr(undisturbed, name)) is type(theirs[name])
