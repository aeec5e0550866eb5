"""What a process of the suite does: learn from rows with outlast and with plain transformers, and compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.distributed.world import World
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.base import find_task
from tests.support.groups.worker_group import Quiet
from tests.system.differential.models import save_model
from tests.system.differential.reference import IGNORED, MAKERS, Example, Learned, learn, load, of_examples
from tests.system.differential.rows import MAX_LENGTH, TASKS, rows_of, write

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def settings_of(kind: str, path: Path, **more: Any) -> dict[str, Any]:
    """Settings under `data:` for these rows."""
    lengths = {"max_length": 4 * MAX_LENGTH if "chat" in kind else MAX_LENGTH}
    problem = {"multi-label": "multi-label", "regression": "regression"}.get(kind)
    return {
        "train": str(path),
        **lengths,
        **({"max_target_length": MAX_LENGTH} if kind == "seq2seq" else {}),
        **({"stride": 8} if kind == "answers" else {}),
        **({"problem": problem} if problem else {}),
        **more,
    }


def train_once(
    folder: Path, model: Path, kind: str, data: dict[str, Any], micro_batch: int
) -> tuple[Prepared, dict[str, Any]]:
    """One step with a learning rate of 0; in one micro-batch if that is 0. Returns prepared data, and the event."""
    storage = LocalStorage(folder / "runs")
    name = f"micro-{micro_batch}"
    body: dict[str, Any] = {
        "name": name,
        "model": {"path": str(model), "task": TASKS[kind]},
        "data": data,
        "checkpoint": {"storage": storage.url},
        "train": {"steps": 1, "batch": 1, "micro_batch": 1, "lr": 0.0, "warmup": 0, "clip": 1.0},
    }
    prepared = prepare(TrainingConfig.model_validate(body), storage)
    micro_batch = micro_batch or prepared.num_samples
    body["train"] |= {"batch": prepared.num_samples // micro_batch * micro_batch, "micro_batch": micro_batch}
    config = TrainingConfig.model_validate(body)
    run_attempt(Assignment(config, body, "first", prepared), storage, World(), Quiet())
    [event] = [event for _, event in run_events(RunStore(storage, name)) if event["event"] == "step"]
    return prepared, event


def labels_of(kind: str, folder: Path, prepared: Prepared) -> list[list[float]]:
    """The labels of each prepared sample, in the order of the rows."""
    samples = prepared.split(LocalStorage(folder / "runs"), "train").take(range(prepared.num_samples))
    if kind == "answers":
        return [[int(sample["start"][0]), int(sample["end"][0])] for sample in samples]
    return [sample["input_ids" if kind == "causal-lm" else "labels"].tolist() for sample in samples]


def compare(name: str, kind: str, kind_of_file: str, folder: str) -> dict[str, Any]:
    """Both ways of learning the same rows. Returns the numbers of each."""
    torch.set_num_threads(1)
    here = Path(folder)
    model = save_model(name, kind, here / "model")
    rows = rows_of(kind)
    data = settings_of(kind, write(rows, kind_of_file, here / "data"))
    prepared, whole = train_once(here, model, kind, data, 0)
    _, single = train_once(here, model, kind, data, 1)
    if kind == "masked-lm":
        theirs = learn_masked(here, model, data, prepared)
    else:
        theirs = learn(model, kind, rows)
    ours = [] if kind == "masked-lm" else labels_of(kind, here, prepared)
    return {
        "theirs": theirs,
        "labels": ours,
        "whole": (whole["loss"], whole["grad_norm"]),
        "single": (single["loss"], single["grad_norm"]),
    }


def learn_masked(folder: Path, model_folder: Path, data: dict[str, Any], prepared: Prepared) -> Learned:
    """The model's own loss of the masked samples of the first step, each without padding."""
    from outlast.trainers.data.batch_plan import make_plan

    storage = LocalStorage(folder / "runs")
    body = {
        "name": "masked",
        "model": {"path": str(model_folder), "task": "masked-lm"},
        "data": data,
        "checkpoint": {"storage": storage.url},
        "train": {"steps": 1, "batch": prepared.num_samples, "micro_batch": 1},
    }
    config = TrainingConfig.model_validate(body)
    task = find_task("masked-lm")(config.data, prepared.tokenizer(storage), prepared.facts)
    plan = make_plan(config, prepared.num_samples, 1)
    positions, samples = plan.positions(0), prepared.split(storage, "train")
    taken = samples.take(plan.samples(positions))
    examples = []
    for sample, key in zip(taken, plan.keys(positions), strict=True):
        batch = task.collate([sample], [key])
        labels = batch["labels"][0].tolist()
        inputs = {"input_ids": batch["input_ids"][0].tolist(), "labels": labels}
        examples.append(Example(inputs, labels, sum(label != IGNORED for label in labels)))
    model, _ = load(model_folder, "masked-lm")
    return of_examples(model, examples)


def evaluate_once(name: str, kind: str, folder: str, micro_batch: int) -> dict[str, Any]:
    """The evaluation of a run that changes no weight, and plain predictions: labels and logits of each sample alone."""
    torch.set_num_threads(1)
    here = Path(folder)
    model_folder = save_model(name, kind, here / "model")
    rows = rows_of(kind, 24)
    path = write(rows, "jsonl", here / "data")
    train_once(here, model_folder, kind, settings_of(kind, path, eval=str(path)), micro_batch)
    store = RunStore(LocalStorage(here / "runs"), f"micro-{micro_batch}")
    scores = [event for _, event in run_events(store) if event["event"] == "eval"][-1]
    model, tokenizer = load(model_folder, kind)
    model.eval()
    predictions = []
    with torch.no_grad():
        for example in MAKERS[kind](tokenizer, model.config, rows):
            outputs = model(**{key: torch.tensor([value]) for key, value in example.inputs.items()})
            parts = (outputs.start_logits, outputs.end_logits) if kind == "answers" else (outputs.logits,)
            logits = torch.stack([part[0] for part in parts]).tolist()
            predictions.append(
                (example.labels, logits if kind == "answers" else logits[0], outputs.loss.item(), example.terms)
            )
    return {"scores": scores, "predictions": predictions, "labels": model.config.id2label}


def run_once(body: dict[str, Any]) -> dict[str, Any]:
    """Run a run of one step. Returns what its events and its published model say."""
    torch.set_num_threads(1)
    config = TrainingConfig.model_validate(body)
    storage = LocalStorage(Path(config.checkpoint.storage))
    run_attempt(Assignment(config, body, "first", prepare(config, storage)), storage, World(), Quiet())
    found: dict[str, Any] = {}
    for _, event in run_events(RunStore(storage, config.name)):
        if event["event"] in ("step", "eval"):
            found |= event
    [model] = (Path(config.checkpoint.storage) / config.name / "attempts").glob("*/model")
    return {**found, "id2label": transformers.AutoConfig.from_pretrained(model).id2label}
