"""Tasks: loss sums equal the model's own loss, scores, predictions, and each task killed and resumed."""

from __future__ import annotations

import json
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multilabel_accuracy,
    multilabel_f1_score,
)
from transformers import AutoModelForSequenceClassification

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.train import Precision
from outlast.trainers.data.arrow_samples import Sample, Samples
from outlast.trainers.data.batch_plan import BatchPlan, derive_seed
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.evaluation import evaluate
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.base import Batch, Record, Task, find_task
from outlast.trainers.tasks.classification import SequenceClassification
from tests.support.groups.worker_group import digests, fault, losses, run_group
from tests.support.tasks.cases import CASES, Case


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
    assert run_group(classify("kinds"), storage, 2)[0].outcome is Outcome.DONE
    injected = fault(FaultPoint.WHILE_WRITING, 6, 1, FaultAction.SIGKILL, tmp_path)
    assert run_group(classify("kinds-killed", faults=(injected,)), storage, 2)[1].exit_code == -9
    assert Path(injected.record).exists()
    assert run_group(classify("kinds-killed", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, "kinds-killed") == digests(storage, "kinds")
    assert losses(storage, "kinds-killed") == losses(storage, "kinds")
    model = AutoModelForSequenceClassification.from_pretrained(
        storage.path("kinds-killed/attempts").glob("*/model").__next__()
    )
    assert model.config.id2label == {0: "long", 1: "short"}


# -- every task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCase:
    """A case with prepared data and a new model."""

    case: Case
    prepared: Prepared
    task: Task
    model: Any
    data: Samples

    def batch(self, numbers: Sequence[int]) -> Batch:
        return self.task.collate(self.data.take(numbers), list(numbers))


@pytest.fixture(scope="module")
def prepare_case(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PreparedCase]:
    folder = tmp_path_factory.mktemp("cases")

    @cache
    def make(name: str) -> PreparedCase:
        assignment = assign("tried", sections=CASES[name].sections(folder))
        config, prepared = assignment.config, assignment.prepared
        tokenizer = prepared.tokenizer(storage)
        task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
        model, _ = build_model(config.model, task, tokenizer, 3, fresh=True)
        return PreparedCase(CASES[name], prepared, task, model.eval(), prepared.split(storage, "eval"))

    return make


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_models_own(name: str, prepare_case: Callable[[str], PreparedCase]) -> None:
    it = prepare_case(name)
    batch = it.batch(range(it.case.own_batch))
    torch.testing.assert_close(it.task.loss_sum(it.model, batch) / it.task.count(batch), it.case.own(it.model, batch))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_scores_do_not_depend_on_the_batch(name: str, prepare_case: Callable[[str], PreparedCase]) -> None:
    """Padding changes no loss and no score, and the sums of single samples add up to the sum of a batch."""
    it = prepare_case(name)
    batch, parts = it.batch(range(9)), [it.batch([number]) for number in range(9)]
    assert sum(it.task.count(part) for part in parts) == it.task.count(batch)
    assert len({part["input_ids"].shape[-1] for part in parts}) > 1, "they differ in length"
    sums, apart = it.task.measure(it.model, batch), [it.task.measure(it.model, part) for part in parts]
    for key, value in sums.items():
        torch.testing.assert_close(torch.stack([part[key] for part in apart]).sum(0), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_scores_match_score_names_for_any_micro_batch(name: str, prepare_case: Callable[[str], PreparedCase]) -> None:
    it = prepare_case(name)
    scores = [evaluate(it.model, it.task, it.data, World(), size, Precision.FP32) for size in (1, 7, 1000)]
    expected = {f"eval_{score}" for score in ("loss", *it.task.score_names(it.prepared.facts))}
    assert all(item.keys() == expected for item in scores)
    for item in scores[1:]:
        assert item == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.parametrize(("name", "average"), [("classes", "macro"), ("multi-label", "macro"), ("tags", "macro")])
def test_f1_and_accuracy_are_those_of_torchmetrics(
    name: str, average: Any, prepare_case: Callable[[str], PreparedCase]
) -> None:
    it = prepare_case(name)
    batch = it.batch(range(len(it.data)))
    with torch.no_grad():
        logits = it.task.forward(it.model, batch).logits
    labels, size = batch["labels"], logits.shape[-1]
    if name == "multi-label":
        logits = logits.sigmoid()
        f1 = multilabel_f1_score(logits, labels.long(), size, average=average)
        accuracy = multilabel_accuracy(logits, labels.long(), size, average="micro")
    else:
        given = (logits.argmax(-1).flatten(), labels.flatten())
        f1 = multiclass_f1_score(*given, size, average=average, ignore_index=-100)
        accuracy = multiclass_accuracy(*given, size, average="micro", ignore_index=-100)
    scores = evaluate(it.model, it.task, it.data, World(), 5, Precision.FP32)
    assert scores["eval_f1"] == pytest.approx(f1.item(), rel=1e-5)
    assert scores["eval_accuracy"] == pytest.approx(accuracy.item(), rel=1e-5)


def without_targets(it: PreparedCase, text: str) -> dict[str, Any]:
    roles = {column.role for column in it.task.columns if not column.is_target}
    return {role: value for role, value in it.case.row(text).items() if role in roles}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.task != "causal-lm"])
def test_every_task_predicts_rows_without_targets(name: str, prepare_case: Callable[[str], PreparedCase]) -> None:
    it = prepare_case(name)
    rows = [without_targets(it, text) for text in ("A short <|mask|> text of few words.", "Another one. " * 30)]
    with torch.no_grad():
        both = list(it.task.predict(it.model, rows[:1] if name == "masked-lm" else rows))
        [alone] = it.task.predict(it.model, rows[:1])
    assert json.dumps(both)
    assert alone.keys() == both[0].keys() > set()
    assert alone.keys() & {"label", "value", "guesses", "tags", "target", "answer"}


@pytest.mark.parametrize(
    "name",
    [
        "masked-lm",
        "seq2seq-lm",
        *(pytest.param(name, marks=pytest.mark.faults) for name in CASES if name not in ("masked-lm", "seq2seq-lm")),
    ],
)
def test_each_task_learns_and_a_killed_run_ends_equal(
    name: str, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    sections, run = CASES[name].sections(tmp_path), name.replace(" ", "-")
    assert run_group(assign(run, sections=sections), storage, 2)[0].outcome is Outcome.DONE
    injected = fault(FaultPoint.WHILE_WRITING, 6, 1, FaultAction.SIGKILL, tmp_path)
    assert run_group(assign(f"{run}-killed", sections=sections, faults=(injected,)), storage, 2)[1].exit_code == -9
    assert Path(injected.record).exists()
    again = assign(f"{run}-killed", sections=sections, launch="second")
    assert run_group(again, storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, f"{run}-killed") == digests(storage, run)
    assert losses(storage, f"{run}-killed") == losses(storage, run)
    evals = [event["eval_loss"] for _, event in run_events(RunStore(storage, run)) if event["event"] == "eval"]
    assert evals[-1] < 0.99 * evals[0]


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks_follow_from_the_key_alone(prepare_case: Callable[[str], PreparedCase]) -> None:
    it = prepare_case("masked-lm")
    samples = it.data.take(range(6))
    first, again = it.task.collate(samples, [1, 2, 3, 4, 5, 6]), it.task.collate(samples[::-1], [6, 5, 4, 3, 2, 1])
    assert torch.equal(first["input_ids"], again["input_ids"].flip(0))
    assert torch.equal(first["labels"], again["labels"].flip(0))
    other = it.task.collate(samples, [7, 2, 3, 4, 5, 6])
    assert (other["labels"] != first["labels"]).any(1).tolist() == [True, *[False] * 5]


def test_about_a_seventh_is_masked_and_never_a_special_token(prepare_case: Callable[[str], PreparedCase]) -> None:
    it = prepare_case("masked-lm")
    inner, seen = it.task.tokenizer.inner, Counter[str]()
    for key in range(40):
        batch = it.task.collate(
            it.data.take(range(len(it.data))), [derive_seed(key, number) for number in range(len(it.data))]
        )
        plain = it.task.collate(it.data.take(range(len(it.data))), [0] * len(it.data))
        true = torch.where(plain["labels"] != -100, plain["labels"], plain["input_ids"])
        chosen = batch["labels"] != -100
        assert chosen.any(1).all()
        assert not torch.isin(batch["labels"][chosen], torch.tensor(inner.all_special_ids)).any()
        assert torch.equal(batch["labels"][chosen], true[chosen])
        assert torch.equal(batch["input_ids"][~chosen], true[~chosen])
        seen["tokens"] += int(batch["attention_mask"].sum()) - 2 * len(it.data)
        seen["chosen"] += int(chosen.sum())
        seen["masked"] += int((batch["input_ids"][chosen] == inner.mask_token_id).sum())
        seen["kept"] += int((batch["input_ids"] == batch["labels"])[chosen].sum())
    assert seen["chosen"] / seen["tokens"] == pytest.approx(0.15, abs=0.01)
    assert seen["masked"] / seen["chosen"] == pytest.approx(0.8, abs=0.02)
    assert seen["kept"] / seen["chosen"] == pytest.approx(0.1, abs=0.02)


def test_keys_change_with_the_epoch_and_with_nothing_else() -> None:
    plan = BatchPlan(seed=5, num_samples=6, batch=4, micro_batch=2, total_samples=12)
    finer = BatchPlan(seed=5, num_samples=6, batch=4, micro_batch=1, total_samples=12)
    keys = [key for step in range(3) for key in plan.keys(plan.positions(step))]
    assert keys == [key for step in range(3) for part in finer.cut(finer.positions(step)) for key in finer.keys(part)]
    numbers = [int(number) for step in range(3) for number in plan.samples(plan.positions(step))]
    assert keys == [derive_seed(5, place // 6, number) for place, number in enumerate(numbers)]
    assert len(set(keys)) == 12


# -- words, and answers ------------------------------------------------------------------------------------------------


def test_tags_are_on_the_first_token_of_each_word(prepare_case: Callable[[str], PreparedCase]) -> None:
    it = prepare_case("tags")
    words = ["Internationalization", "is", "Long"]
    [sample] = it.task.encode([{"tokens": words, "tags": ["name", "word", "name"]}])
    labels = [number for number in sample["labels"].tolist() if number != -100]
    assert [it.prepared.facts["classes"][number] for number in labels] == ["name", "word", "name"]
    begins = [it.task.tokenizer.inner.decode([token]) for token in sample["input_ids"][sample["labels"] != -100]]
    assert all(word.startswith(begin.strip()) for word, begin in zip(words, begins, strict=True)), begins
    assert len(sample["labels"]) == len(sample["input_ids"]) > 5


def test_answers_are_found_in_their_windows(prepare_case: Callable[[str], PreparedCase]) -> None:
    """The tokens from start to end decode to the answer in each window that contains it; other windows have no span."""
    it = prepare_case("answers")
    context = " ".join(f"filler{number}" for number in range(40)) + " the treasure lies here " + "and more " * 20
    row = {"question": "Where?", "context": context, "answers": ["treasure lies"]}
    samples = list(it.task.encode([row]))
    spelled = [
        it.task.tokenizer.inner.decode(sample["input_ids"][int(sample["start"][0]) : int(sample["end"][0]) + 1])
        for sample in samples
        if sample["start"][0] > 0
    ]
    assert len(samples) > len(spelled) >= 1
    assert {text.strip() for text in spelled} == {"treasure lies"}
    assert all(len(sample["input_ids"]) <= 40 for sample in samples)


# -- unusable rows and settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("classes", {"text": "a", "label": ["long"]}, r"row 1: column 'label' holds \['long'\], not a class"),
        ("multi-label", {"text": "a", "label": "class"}, "row 1: column 'label' holds 'class', not a list of classes"),
        ("regression", {"text": "a", "label": "x"}, "row 1: column 'label' holds 'x', not a number"),
        ("tags", {"tokens": ["a", "b"], "tags": ["name"]}, "row 1: it has 2 words but 1 tags"),
        ("seq2seq-lm", {"source": "a", "target": ""}, "row 1: its source or target is empty"),
        ("answers", {"question": "q", "context": "c", "answers": "d"}, "row 1: its answer 'd' is not in the context"),
        ("choices", {"text": "a", "choices": ["b"], "label": 0}, "row 1: it has 1 choices, not 2"),
        ("choices", {"text": "a", "choices": ["b", "c"], "label": 2}, "row 1: label 2 is not one of the choices"),
    ],
)
def test_unusable_rows_are_named(
    name: str,
    row: dict[str, Any],
    message: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    tmp_path: Path,
) -> None:
    sections = CASES[name].sections(tmp_path)
    path = Path(sections["data"]["train"])
    path.write_text(json.dumps(row) + "\n" + path.read_text())
    sections["data"] |= {"eval": None, "problem": name if name in ("multi-label", "regression") else None}
    sections |= {"train": {"eval_every": None}}
    with pytest.raises(ConfigError, match=message):
        assign("bad", sections=sections)
    sections["data"] |= {"max_bad_rows": 1}
    prepared = assign("bad", sections=sections).prepared
    assert prepared.num_bad_rows == 1
    [note] = [note for note in prepared.notes if "unusable rows" in note]
    assert re.search(message, note)


@pytest.mark.parametrize(
    ("name", "problem", "right"),
    [
        ("classes", "regression", "single-label"),
        ("classes", "multi-label", "single-label"),
        ("multi-label", "single-label", "multi-label"),
        ("multi-label", "regression", "multi-label"),
        ("regression", "single-label", "regression"),
        ("regression", "multi-label", "regression"),
    ],
)
def test_a_problem_that_fits_no_row_is_an_error_of_the_setting(
    name: str, problem: str, right: str, assign: Callable[..., Assignment], tmp_path: Path
) -> None:
    sections = CASES[name].sections(tmp_path)
    sections["data"] |= {"problem": problem}
    with pytest.raises(
        ConfigError, match=f"data.problem is {problem}, but column 'label' has no such labels"
    ) as caught:
        assign("bad", sections=sections)
    assert caught.value.hint.startswith(f"set data.problem: {right}")


def test_padding_without_a_token_for_it() -> None:
    bare = train_bpe(iter(["some text"]), 300)
    bare.inner.pad_token = bare.inner.eos_token = None
    task = SequenceClassification(DataSettings(train="-"), bare, {"problem": "regression", "classes": []})
    with pytest.raises(ConfigError, match="neither a padding token nor an end token"):
        task.collate(list(task.encode([{"text": "some"}, {"text": "some text"}])), [0, 0])


# -- a task of one's own -----------------------------------------------------------------------------------------------


class Shouting(SequenceClassification):
    """A user's task with its own columns; it upper-cases the text."""

    columns = (Column("said", ColumnType.TEXT), Column("mood", ColumnType.LABEL, is_target=True))

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        return super().survey(settings, (cls._as_text(record) for record in records))

    def fault(self, record: Record) -> str | None:
        return super().fault(self._as_text(record))

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        return super().encode([self._as_text(record) for record in records])

    @staticmethod
    def _as_text(record: Record) -> Record:
        return {"text": record["said"].upper(), **({"label": record["mood"]} if "mood" in record else {})}


class Unfinished(Task):
    """A task that defines only `encode`."""

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        yield from ()


def test_a_task_of_ones_own_is_trained_killed_and_resumed(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    sections = CASES["classes"].sections(tmp_path)
    sections["model"] |= {"task": "tests.trainers.tasks.test_tasks:Shouting"}
    sections["data"] |= {"columns": {"said": "text", "mood": "label"}}
    assert run_group(assign("shouting", sections=sections), storage, 2)[0].outcome is Outcome.DONE
    injected = fault(FaultPoint.WHILE_WRITING, 6, 0, FaultAction.SIGKILL, tmp_path)
    run_group(assign("shouting-killed", sections=sections, faults=(injected,)), storage, 2)
    assert Path(injected.record).exists()
    run_group(assign("shouting-killed", sections=sections, launch="second"), storage, 2)
    assert digests(storage, "shouting-killed") == digests(storage, "shouting")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nowhere.at_all:Task", "No module named 'nowhere'"),
        ("tests.trainers.tasks.test_tasks:Shooting", "has no 'Shooting'; did you mean 'Shouting'"),
        ("json:JSONDecoder", "is not a subclass of Task"),
        ("tests.trainers.tasks.test_tasks:Unfinished", "does not define auto_class, columns, loss"),
    ],
)
def test_a_task_that_cannot_be_found(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_task(task)


# -- sequence classification, more of it -------------------------------------------------------------------------------


def test_the_best_is_damaged_and_the_next_is_published(
    classify: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """A finished run must not fail to publish because of one damaged file."""
    injected = fault(FaultPoint.AFTER_RETENTION, 10, 0, FaultAction.EXCEPTION, tmp_path)
    run_group(classify("classes-damaged", faults=(injected,)), storage, 1)
    accepted = read_catalog(storage, "classes-damaged").accepted
    rated = [item for item in accepted if "eval_accuracy" in item.metrics]
    best = max(rated, key=lambda item: (item.metrics["eval_accuracy"], -item.ref.step))
    directory = storage.path(f"classes-damaged/attempts/{best.ref.attempt}/checkpoint-{best.ref.step}")
    (directory / "tokenizer.json").write_bytes(b"{}")
    assert run_group(classify("classes-damaged", launch="second"), storage, 1)[0].outcome is Outcome.DONE


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "kind": "x"}, {"text": "b", "kind": "x"}], "has only one class"),
        ([{"text": "a"}], "has no column 'kind'"),
        ([{"text": "a", "kind": None}], "row 1: column 'kind' holds no value"),
    ],
)
def test_unusable_labels(
    rows: list[dict[str, Any]], message: str, classify: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = classify("classes-bad").config
    data = config.data.model_copy(update={"train": str(tmp_path / "bad.jsonl"), "eval": None})
    with pytest.raises(ConfigError, match=message):
        prepare(config.model_copy(update={"data": data}), storage)


@pytest.mark.faults
def test_a_resumed_run_keeps_its_number_of_threads(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    """Also after a resume on a machine with another default."""
    from tests.support.groups.worker_group import StopAt

    for launch, threads, stop in (("a", 2, 3), ("b", 1, 6), ("c", 1, 99)):
        assignment = replace(assign("threads", launch=launch), num_threads=threads)
        run_group(assignment, storage, 1, StopAt(stop))
        assert read_catalog(storage, "threads").declaration["num_threads"] == 2
