"""The step's mathematics: learning rate, plan, loss, evaluation, and that the world size changes none of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import MANIFEST, checkpoint_dir, model_dir
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.reader import read_tensors
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import claim, list_attempts
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Precision, TrainSettings
from outlast.trainers.data.batch_plan import make_plan
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.evaluation import evaluate
from outlast.trainers.loop.lr_schedule import learning_rate
from outlast.trainers.loop.optimizer import make_optimizer
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.tasks.base import Task
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.conftest import Reference
from tests.support.groups.worker_group import Quiet, digests, losses, newest, resumed, run_group, tiny_config


def train_settings(**settings: Any) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 10, "lr": 1.0, **settings})


# -- learning rate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 10),
        ({"schedule": "linear"}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 5}, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "warmup": 0.5}, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "constant", "warmup": 0.01}, [1.0] * 10),
        ({"schedule": "constant", "warmup": 20}, [step / 20 for step in range(1, 11)]),
        ({"schedule": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * step / 10) for step in range(10)]),
        (
            {"schedule": "cosine", "warmup": 2},
            [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8))],
        ),
        ({"schedule": "linear", "lr": 0.0}, [0.0] * 10),
    ],
    ids=str,
)
def test_learning_rates(settings: dict[str, Any], expected: list[float]) -> None:
    train = train_settings(**settings)
    assert [learning_rate(train, step, 10) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_learning_rate_ends_at_the_last_step(schedule: str, end: float) -> None:
    assert learning_rate(train_settings(schedule=schedule, warmup=3), 10, 10) == pytest.approx(end, abs=1e-12)


# -- plan --------------------------------------------------------------------------------------------------------------


def test_more_ranks_than_micro_batches_are_refused() -> None:
    config = tiny_config("run", "/runs", "/data.txt", batch=8, micro_batch=2)
    assert make_plan(config, 100, 4).num_steps == 10
    with pytest.raises(ConfigError, match="5 workers, but a batch of 8 has only 4 micro-batches of 2") as caught:
        make_plan(config, 100, 5)
    assert "fewer workers" in caught.value.hint


@pytest.mark.parametrize(
    ("train", "num_samples", "num_steps", "total"),
    [
        ({"steps": 7}, 100, 7, 56),
        ({"steps": None, "epochs": 1}, 100, 13, 100),
        ({"steps": None, "epochs": 2}, 100, 25, 200),
        ({"steps": None, "epochs": 0.5}, 15, 1, 8),
        ({"steps": None, "epochs": 3}, 8, 3, 24),
        ({"steps": None, "epochs": 0.001}, 10, 1, 1),
    ],
)
def test_epochs_and_steps(train: dict[str, Any], num_samples: int, num_steps: int, total: int) -> None:
    plan = make_plan(tiny_config("run", "/runs", "/data.txt", **train), num_samples, 1)
    assert (plan.num_steps, plan.total_samples) == (num_steps, total)


def test_an_impossible_group_is_refused_before_it_claims(
    assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    ended = run_group(assign("too-many", batch=4, micro_batch=2), storage, 3)
    assert all(isinstance(item.error, ConfigError) for item in ended)
    assert storage.list("too-many") == []


# -- model, loss, optimizer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assignment(assign: Callable[..., Assignment]) -> Assignment:
    return assign("loop")


@pytest.fixture(scope="module")
def task(assignment: Assignment, storage: LocalStorage) -> Task:
    return CausalLM(assignment.config.data, assignment.prepared.tokenizer(storage), {})


@pytest.fixture(scope="module")
def model(assignment: Assignment, task: Task) -> Any:
    return build_model(assignment.config.model, task, task.tokenizer, 0, fresh=True)[0].eval()


def test_the_loss_is_the_models_own(model: Any, task: Task, assignment: Assignment, storage: LocalStorage) -> None:
    batch = task.collate(assignment.prepared.split(storage, "train").take(range(5)), [])
    mine = task.loss_sum(model, batch) / task.count(batch)
    own = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, own)


def test_loss_sums_add_up_over_micro_batches(
    model: Any, task: Task, assignment: Assignment, storage: LocalStorage
) -> None:
    data = assignment.prepared.split(storage, "train")
    whole = task.collate(data.take(range(7)), [])
    parts = [task.collate(data.take(part), []) for part in (range(3), range(3, 4), range(4, 7))]
    assert sum(task.count(part) for part in parts) == task.count(whole) == 7 * 15
    total = sum(task.loss_sum(model, part) for part in parts)
    torch.testing.assert_close(total, task.loss_sum(model, whole))


def test_evaluation_is_the_mean_over_every_token(
    model: Any, task: Task, assignment: Assignment, storage: LocalStorage
) -> None:
    """Also when the last micro-batch is short, and it leaves the model in the mode it was in."""
    data = assignment.prepared.split(storage, "eval")
    rows = task.collate(data.take(range(len(data))), [])["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=rows, labels=rows).loss.item()
    model.train()
    found = [evaluate(model, task, data, World(), micro, Precision.FP32)["eval_loss"] for micro in (1, 3, 64, 1000)]
    assert model.training
    model.eval()
    assert found == pytest.approx([expected] * 4, rel=1e-6)
    twice = [evaluate(model, task, data, World(), 4, Precision.FP32) for _ in range(2)]
    assert twice[0] == twice[1]


def test_only_matrices_decay() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    net[3].weight.requires_grad_(False)
    decayed, exempt = make_optimizer(net, train_settings(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert [tuple(item.shape) for item in decayed["params"]] == [(5, 3), (3, 3)]
    assert [tuple(item.shape) for item in exempt["params"]] == [(3,), (3,), (3,)]


# -- the world size changes nothing ------------------------------------------------------------------------------------


def evaluations(storage: LocalStorage, run: str) -> dict[int, float]:
    return {
        event["step"]: event["eval_loss"] for _, event in run_events(RunStore(storage, run)) if event["event"] == "eval"
    }


@pytest.mark.parametrize("size", [2, 3])
def test_evaluation_is_equal_at_any_world_size(
    size: int, storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """Equal weights, at the start, give equal numbers; later weights differ in the last bits, by order of summation."""
    alone, together = (evaluations(storage, reference(number).run) for number in (1, size))
    assert list(alone) == list(together) == [0, 4, 8, 10]
    assert together[0] == alone[0]
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[10] < alone[0], "it learns"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_are_equal_at_any_world_size_up_to_rounding(
    size: int, storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    alone, together = reference(1), reference(size)
    assert list(together.losses) == list(range(1, 11))
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    assert together.losses[1] == alone.losses[1], "before the first update there is nothing to round"


def weights(storage: LocalStorage, run: str) -> dict[str, torch.Tensor]:
    manifest = newest(storage, run)
    return read_tensors(storage, f"{run}/attempts/{manifest.ref}", manifest, weights_only=True)


def test_a_short_last_step_leaves_ranks_without_work(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    """17 samples in batches of 8: the last step is one micro-batch for three ranks, and counts as what it is."""
    epochs = 16.5 / assign("short-1").prepared.num_samples
    for size in (1, 3):
        run = f"short-{size}"
        assignment = assign(run, steps=None, epochs=epochs, eval_every=None, sections={"checkpoint": {"every": 100}})
        assert run_group(assignment, storage, size)[0].outcome is Outcome.DONE
        events = [event for _, event in run_events(RunStore(storage, run)) if event["event"] == "step"]
        assert [event["count"] for event in events] == [8 * 15, 8 * 15, 15]
    assert losses(storage, "short-3") == pytest.approx(losses(storage, "short-1"), rel=1e-5)
    alone, together = weights(storage, "short-1"), weights(storage, "short-3")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)


def test_micro_batches_do_not_change_the_gradient(
    assign: Callable[..., Assignment], storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """Dropout off, so that only the cut differs: a mean of means would show here."""
    quiet = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
    quiet |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    found = []
    for micro in (1, 4):
        run = f"micro-{micro}"
        run_group(assign(run, micro_batch=micro, sections={"model": {"config": quiet}}), storage, 1)
        found.append(losses(storage, run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(reference(1).losses, rel=1e-5), "dropout was on in the reference"


def test_randomness_differs_by_step_and_by_micro_batch(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """One sample, a learning rate of zero: whatever differs between two losses is dropout."""
    (tmp_path / "one.txt").write_text(" ".join(str(number) for number in range(14)))
    sections = {"data": {"train": str(tmp_path / "one.txt"), "eval": None, "max_length": 12}}
    found = {}
    for batch in (1, 2):
        run = f"one-sample-{batch}"
        assignment = assign(run, steps=3, lr=0.0, batch=batch, eval_every=None, sections=sections)
        assert assignment.prepared.num_samples == 1
        run_group(assignment, storage, 1)
        found[batch] = losses(storage, run)
    assert len(set(found[1].values())) == 3, "each step has a mask of its own"
    assert found[2][1] != found[1][1], "and so has the second micro-batch of a step"


# -- when to save, what to publish, and whom to give way to ------------------------------------------------------------


def test_saves_by_the_clock_are_agreed_and_change_nothing(
    assign: Callable[..., Assignment], storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """Rank 0's clock decides; an interval of a microsecond makes every step due."""
    sections = {"checkpoint": {"every": "0.000001s", "keep_last": 2}}
    ended = run_group(assign("by-the-clock", sections=sections), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    commits = [
        event["step"] for _, event in run_events(RunStore(storage, "by-the-clock")) if event["event"] == "commit"
    ]
    assert commits == list(range(1, 11))
    assert [item.ref.step for item in read_catalog(storage, "by-the-clock").accepted] == [10, 9]
    assert digests(storage, "by-the-clock") == reference(2).digests


def test_the_best_is_kept_and_published(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    """The highest loss is called best here, so that it is not the last."""
    best = {"every": 100, "keep_last": 2, "keep_best": 1, "metric_mode": "max", "load_best": True}
    ended = run_group(assign("best", sections={"checkpoint": best}, eval_every=2), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    found = read_catalog(storage, "best")
    assert [item.ref.step for item in found.accepted] == [10, 8, 2], "each evaluation saves"
    measured = evaluations(storage, "best")
    assert [item.metrics["eval_loss"] for item in found.accepted] == [measured[10], measured[8], measured[2]]

    attempt = list_attempts(RunStore(storage, "best"))[-1]
    published = Manifest.parse(read_bytes(storage, f"{model_dir('best', attempt)}/{MANIFEST}"))
    assert published.ref.step == 2
    assert published.extra == {"final_step": 10}
    chosen = checkpoint_dir("best", found.accepted[-1].ref)
    assert read_bytes(storage, f"{model_dir('best', attempt)}/model.safetensors") == read_bytes(
        storage, f"{chosen}/model.safetensors"
    )


@dataclass
class TakenOver(Quiet):
    """A control that lets another launch claim the run once step 3 is committed."""

    url: str
    run: str
    done: bool = False

    def progress(self, event: dict[str, Any]) -> None:
        if event["event"] == "commit" and not self.done:
            self.done = True
            claim(RunStore(open_storage(self.url), self.run), {"launch": "newer"})


def test_an_older_launch_gives_way_on_all_ranks(
    assign: Callable[..., Assignment], storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """Losing is an outcome, not an error; nothing is deleted, and what was not acknowledged is not used."""
    run = "gives-way"
    ended = run_group(assign(run, launch="older"), storage, 2, TakenOver(storage.url, run))
    assert [(item.outcome, item.exit_code) for item in ended] == [(Outcome.SUPERSEDED, 0)] * 2
    events = [event for _, event in run_events(RunStore(storage, run))]
    assert [event["step"] for event in events if event["event"] == "commit"] == [3]
    assert [event["step"] for event in events if event["event"] == "superseded"] == [6]
    assert not [event for event in events if event["event"] == "delete"]

    ended = run_group(assign(run, launch="older"), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.SUPERSEDED] * 2, "it does not come back either"
    ended = run_group(assign(run, launch="newer"), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert resumed(storage, run)[-1]["step"] in (3, 6)
    assert digests(storage, run) == reference(2).digests
