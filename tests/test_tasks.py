"""Tasks: loss sums that are the model's own loss, and sequence classification killed and resumed."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.faults import Action, Point
from outlast.checkpointing.lineage import catalogue
from outlast.checkpointing.storage import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.data import prepare
from outlast.trainers.loop import Outcome
from outlast.trainers.models import build_model
from outlast.trainers.tasks import TASKS
from tests.group import digests, fault, losses, run_group


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of Python's help, labelled by whether the page is about a statement or about a type."""
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    with path.open("w") as file:
        for name, page in sorted(pydoc_data.topics.topics.items()):
            for text in page.split("\n\n")[:6]:
                label = "long" if len(text) > 200 else "short"
                file.write(json.dumps({"text": f"{name}: {text}", "kind": label}) + "\n")
    return path


@pytest.fixture
def classify(assign: Callable[..., Assignment], labelled: Path) -> Callable[..., Assignment]:
    def make(name: str, **options: Any) -> Assignment:
        sections = {
            "model": {"task": "sequence-classification"},
            "data": {"train": str(labelled), "eval": "20%", "label": "kind", "max_length": 24},
            "checkpoint": {"keep_best": 1, "metric": "eval_accuracy", "metric_mode": "max", "load_best": True},
        }
        return assign(name, sections=sections, **options)

    return make


def test_killed_and_resumed_equals_uninterrupted(
    classify: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    assert run_group(classify("classes"), storage, 2)[0].outcome is Outcome.DONE
    strike = fault(Point.WHILE_WRITING, 6, 1, Action.SIGKILL, tmp_path)
    assert run_group(classify("classes-killed", faults=(strike,)), storage, 2)[1].exit_code == -9
    assert Path(strike.record).exists()
    assert run_group(classify("classes-killed", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, "classes-killed") == digests(storage, "classes")
    assert losses(storage, "classes-killed") == losses(storage, "classes")
    model = AutoModelForSequenceClassification.from_pretrained(
        storage.path("classes-killed/attempts").glob("*/model").__next__()
    )
    assert model.config.id2label == {0: "long", 1: "short"}


def test_loss_and_accuracy_are_the_models_own(classify: Callable[..., Assignment], storage: LocalStorage) -> None:
    assignment = classify("classes-measured")
    task, tokenizer = TASKS["sequence-classification"], assignment.prepared.tokenizer(storage)
    labels = assignment.prepared.labels
    model, _ = build_model(assignment.config.model, task, tokenizer, 3, fresh=True, labels=labels)
    model.eval()
    batch = task.collate(assignment.prepared.split(storage, "eval").rows(range(12)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    outputs = model(**batch)
    loss_sum, right = task.measure(model, batch)
    torch.testing.assert_close(loss_sum / task.count(batch), outputs.loss)
    assert right == (outputs.logits.argmax(-1) == batch["labels"]).sum()
    alone = task.collate(assignment.prepared.split(storage, "eval").rows([0]))
    torch.testing.assert_close(model(**alone).logits, outputs.logits[:1], atol=1e-5, rtol=1e-5)


def test_the_best_is_damaged_and_the_next_is_published(
    classify: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """A run that is trained must not hang on one bad file for ever."""
    strike = fault(Point.AFTER_RETENTION, 10, 0, Action.EXCEPTION, tmp_path)
    run_group(classify("classes-damaged", faults=(strike,)), storage, 1)
    accepted = catalogue(storage, "classes-damaged").accepted
    rated = [item for item in accepted if "eval_accuracy" in item.metrics]
    best = max(rated, key=lambda item: (item.metrics["eval_accuracy"], -item.ref.step))
    directory = storage.path(f"classes-damaged/attempts/{best.ref.attempt}/checkpoint-{best.ref.step}")
    (directory / "tokenizer.json").write_bytes(b"{}")
    assert run_group(classify("classes-damaged", launch="second"), storage, 1)[0].outcome is Outcome.DONE


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "kind": "x"}, {"text": "b", "kind": "x"}], "holds one class only"),
        ([{"text": "a"}], "has no column 'kind'"),
        ([{"text": "a", "kind": None}], "row 1: column 'kind' holds None"),
    ],
)
def test_labels_that_will_not_do(
    rows: list[dict[str, Any]], said: str, classify: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = classify("classes-bad").config
    data = config.data.model_copy(update={"train": str(tmp_path / "bad.jsonl"), "eval": None})
    with pytest.raises(ConfigError, match=said):
        prepare(config.model_copy(update={"data": data}), storage)


def test_threads_are_those_that_the_run_began_with(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    """Also after a resume on a machine that would have taken others."""
    from tests.group import StopAt

    for launch, threads, stop in (("a", 2, 3), ("b", 1, 6), ("c", 1, 99)):
        assignment = replace(assign("threads", launch=launch), num_threads=threads)
        run_group(assignment, storage, 1, StopAt(stop))
        assert catalogue(storage, "threads").declaration["num_threads"] == 2
