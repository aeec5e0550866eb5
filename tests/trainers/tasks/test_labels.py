"""Labels of classification: their form, their order, and that a pretrained head keeps its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import transformers
from torchmetrics.functional.classification import multilabel_exact_match

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.train import Precision
from outlast.trainers.data.tokenizer import load_tokenizer, train_bpe
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.evaluation import evaluate
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tasks.classification import SequenceClassification
from tests.support.groups.worker_group import run_group, tiny_config
from tests.support.tasks.label_rows import labelled, learned, write

NER, CLASSIFIER = "token-classification", "sequence-classification"
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def saved(folder: Path, head: str = "SequenceClassification", bias: Sequence[float] = (), **config: Any) -> Path:
    """A BERT, whose head with a bias has the same logits for every text."""
    tokens = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = train_bpe(
        iter(["text number good bad film"]), 300, tokens, ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B")
    ).inner
    made = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **WIDTHS, **config)
    torch.manual_seed(1)
    model = getattr(transformers, f"BertFor{head}")(made)
    if bias:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def names(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


# -- multi-hot ---------------------------------------------------------------------------------------------------------

HOT = [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", [int, bool, float])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_multi_hot_lists_are_as_problem_type_takes_them(
    kind: type, suffix: str, prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    rows = labelled([[kind(item) for item in row] for row in HOT])
    path = tmp_path / f"hot{suffix}"
    frame = pd.DataFrame(rows)
    if suffix == ".jsonl":
        write(path, rows)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)  # which writes lists as texts
    else:
        frame.to_parquet(path)
    found = prepared(str(path))
    assert learned(found, storage) == HOT
    assert (found.facts["problem"], found.facts["classes"]) == ("multi-label", ["0", "1", "2"])
    assert any("multi-hot" in note for note in found.notes)


def test_multi_hot_classes_get_names_and_the_loss_is_the_models_own(
    prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    rows = labelled(HOT)
    found = prepared(rows, labels=["a", "b", "c"])
    sections = {
        "model": {"task": CLASSIFIER},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": None, "labels": ["a", "b", "c"]},
    }
    config = tiny_config("hot", storage.url, "", sections=sections, eval_every=None)
    tokenizer = found.tokenizer(storage)
    task = find_task(CLASSIFIER)(config.data, tokenizer, found.facts)
    model: Any = build_model(config.model, task, tokenizer, 1, fresh=True)[0]
    model.eval()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.problem_type == "multi_label_classification"
    data = found.split(storage, "train")
    batch = task.collate(data.take(range(4)), [0] * 4)
    plain = model(**{**batch, "labels": torch.tensor(HOT, dtype=torch.float32)})
    torch.testing.assert_close(task.loss_sum(model, batch) / task.count(batch), plain.loss)
    scores = evaluate(model, task, data, World(), 3, Precision.FP32)
    exact = multilabel_exact_match(plain.logits.sigmoid(), torch.tensor(HOT), 3).item()
    assert scores["eval_subset_accuracy"] == pytest.approx(exact)


@pytest.mark.parametrize(
    ("labels", "data", "message"),
    [
        ([[1, 0, 1], [0, 1]], {"label_form": "multi-hot"}, "are not multi-hot: their lengths are 2, 3"),
        (
            [[1, 0], [0, 1]],
            {"label_form": "multi-hot", "labels": ["a", "b", "c"]},
            r"row 1: .* not a list of 3 numbers",
        ),
        ([[1, 0, 2], [0, 1, 0]], {"label_form": "multi-hot"}, r"row 1: .* holds \[1, 0, 2\], not a list of 3 numbers"),
        ([0, 1], {"label_form": "multi-hot"}, "multi-hot, but column 'label' does not hold lists"),
        (
            [0.5, 1.5],
            {"labels": ["a", "b"], "problem": "regression"},
            "data.labels and data.label_form are for classes",
        ),
        ([[0.5, 0.5], [0.1, 0.9]], {}, r"row 1: .* not a list of classes"),
        ([*HOT, [1, 0]], {}, r"row 5: .* holds \[1, 0\], not a list of 3 numbers, 0 or 1"),
        ([*HOT, []], {}, r"row 5: .* holds \[\], not a list of 3 numbers"),
        ([*HOT, [1, 0, 2]], {}, r"row 5: .* holds \[1, 0, 2\], not a list of 3 numbers"),
        ([*HOT, [1.0, 0.0, 0.5]], {}, r"row 5: .* not a list of 3 numbers"),
        ([*HOT, ["a"]], {}, r"row 5: .* not a list of 3 numbers"),
        ([[1, 0], *HOT], {"labels": ["a", "b", "c"]}, r"row 1: .* holds \[1, 0\], not a list of 3 numbers"),
        ([*HOT, [0, 2]], {"labels": ["a", "b", "c"]}, r"row 5: .* holds \[0, 2\], not a list of 3 numbers"),
        (HOT, {"label_form": "names"}, r"row 1: .* holds \[1, 0, 1\], which has a class more than once"),
        ([["a", "b"], ["b", "b"]], {}, r"row 2: .* which has a class more than once"),
        ([[0, 2], [2, 2]], {"labels": ["a", "b", "c"]}, r"row 2: .* which has a class more than once"),
        ([*map(str, HOT), "[1, 0"], {}, r"row 5: .* holds '\[1, 0', not a list of 3 numbers"),
        ([["a"], ["b"], "a"], {}, r"row 3: .* holds 'a', not a list of classes"),
    ],
)
def test_labels_that_are_not_multi_hot(
    labels: list[Any], data: dict[str, Any], message: str, prepared: Callable[..., Prepared]
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(labelled(labels), **data)


def test_an_odd_row_of_a_multi_hot_column_is_skipped(prepared: Callable[..., Prepared], storage: LocalStorage) -> None:
    for odd in ([1, 0], [1, 0, 2]):
        found = prepared(labelled([*HOT[:2], odd, *HOT[2:]]), max_bad_rows=1)
        assert (learned(found, storage), found.facts["classes"]) == (HOT, ["0", "1", "2"])
    found = prepared(labelled([[True, True], [False, True]]))
    assert learned(found, storage) == [[1, 1], [0, 1]]


def test_lists_of_names_and_of_indexes(prepared: Callable[..., Prepared], storage: LocalStorage) -> None:
    found = prepared(labelled([["b"], ["a", "b"], []]))
    assert (learned(found, storage), found.facts["classes"]) == ([[0, 1], [1, 1], [0, 0]], ["a", "b"])
    found = prepared(labelled([[2], [0, 1]]), labels=["x", "y", "z"])
    assert learned(found, storage) == [[0, 0, 1], [1, 1, 0]]
    found = prepared(labelled([[1, 0], [0, 1]]), label_form="names")
    assert learned(found, storage) == [[1, 1], [1, 1]]


# -- names and their order ---------------------------------------------------------------------------------------------


def test_names_are_in_the_order_of_data_labels(prepared: Callable[..., Prepared], storage: LocalStorage) -> None:
    found = prepared(labelled(["no", "yes", "no"]), labels=["yes", "no", "perhaps"])
    assert (learned(found, storage), found.facts["classes"]) == ([[1], [0], [1]], ["yes", "no", "perhaps"])
    assert "no training row has the class perhaps" in found.notes
    found = prepared(labelled([2, 0, 2]), labels=["a", "b", "c"])
    assert (learned(found, storage), found.facts["classes"]) == ([[2], [0], [2]], ["a", "b", "c"])
    found = prepared(labelled([True, False, True]), labels=["no", "yes"])
    assert learned(found, storage) == [[1], [0], [1]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes", "maybe"], r"row 2: label 'maybe' is not one of the classes yes, no"),
        ([0, 2], r"row 2: label 2 is not an index of the 2 classes yes, no"),
    ],
)
def test_a_label_that_data_labels_lacks(labels: list[Any], message: str, prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(labelled(labels), labels=["yes", "no"])


def test_data_labels_are_validated() -> None:
    with pytest.raises(ValueError, match="x is there more than once"):
        DataSettings(train="-", labels=["x", "y", "x"])
    assert DataSettings(train="-", labels=[3, 1]).labels == ["3", "1"]


def test_the_order_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from outlast.trainers.tasks.labels import sort_classes; from outlast.trainers.config.data import DataSettings;"
        "print(sort_classes(DataSettings(train='-'), 'label', ['1', '01', '001', 'b', '10', '2']))"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert orders == {b"['b', '001', '01', '1', '2', '10']\n"}


# -- ClassLabel of the datasets library --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_names_of_a_class_label_are_kept_in_their_order(
    form: str, prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["zoo", "ape", "cat"]))
    rows = labelled([0, 1, 0, -1])
    made = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / "made.parquet" if form == "parquet" else tmp_path / "made"
    _ = made.to_parquet(path) if form == "parquet" else made.save_to_disk(path)
    with pytest.raises(ConfigError, match="row 4: column 'label' holds no value"):
        prepared(str(path))
    found = prepared(str(path), max_bad_rows=1)
    assert found.facts["classes"] == features["label"].names
    assert learned(found, storage) == [[0], [1], [0]]
    assert any("has the class names of its data set: zoo, ape, cat" in note for note in found.notes)
    other = prepared(str(path), max_bad_rows=1, labels=["cat", "ape", "zoo"])
    assert learned(other, storage) == [[2], [1], [2]], "the same names in another order"
    other = prepared(str(path), max_bad_rows=1, labels=["Park", "Affe", "Katze"])
    with pytest.raises(ConfigError, match=r"zoo, ape, cat of its data set, and data.labels has .* they agree in part"):
        prepared(str(path), max_bad_rows=1, labels=["Zoo", "Affe", "Katze"])
    assert (learned(other, storage), other.facts["classes"][1]) == ([[0], [1], [0]], "Affe")


def test_a_file_has_its_own_order_of_class_labels(
    prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    for name, order in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=order))
        made = datasets.Dataset.from_list(labelled(["no", "yes"]), features=features)
        made.to_parquet(tmp_path / f"{name}.parquet")
    found = prepared(str(tmp_path / "*.parquet"))
    assert learned(found, storage) == [[0], [1], [0], [1]]


def test_names_in_a_later_file_and_in_the_evaluation_file(
    prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["yes", "no"]))
    datasets.Dataset.from_list(labelled(["no", "yes"]), features=features).to_parquet(tmp_path / "b.parquet")
    names = write(tmp_path / "names.jsonl", labelled(["no", "yes"]))
    both = [str(names), str(tmp_path / "b.parquet")]
    found = prepared(None, train=both)
    assert (found.facts["classes"], learned(found, storage)) == (["yes", "no"], [[1], [0], [1], [0]])
    found = prepared(str(names), eval=str(tmp_path / "b.parquet"))
    assert found.num_rows["eval"] == 2


def test_names_of_tags_are_kept(prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path) -> None:
    tag = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    features = datasets.Features(tokens=datasets.List(datasets.Value("string")), tags=datasets.List(tag))
    rows = [{"tokens": ["Ann", "Lee", "ran"], "tags": [1, 2, 0]}, {"tokens": ["it", "ran"], "tags": [0, -100]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = prepared(str(tmp_path / "a.parquet"), task=NER)
    assert found.facts["classes"] == ["O", "B-PER", "I-PER"]
    assert [label for label in learned(found, storage)[0] if label >= 0] == [1, 2, 0]
    assert [label for label in learned(found, storage)[1] if label >= 0] == [0]
    integers = prepared([dict(row) for row in rows], task=NER, labels=["O", "B-PER", "I-PER"])
    assert learned(integers, storage) == learned(found, storage)


# -- the order of a pretrained head ------------------------------------------------------------------------------------


def test_a_pretrained_head_keeps_its_order(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """Trained with a learning rate of 0, its loss is that of the pretrained model in plain transformers."""
    path = saved(tmp_path / "model", bias=(4.0, -4.0), **names("positive", "negative"))
    rows = [
        *({"text": f"good film {n}", "label": "positive"} for n in range(8)),
        {"text": "bad film", "label": "negative"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    sections = {
        "model": {"config": None, "tokenizer": None, "path": str(path), "task": CLASSIFIER},
        "data": {"train": source, "eval": source},
    }
    assignment = assign(
        "positive-first", sections=sections, steps=2, batch=9, micro_batch=3, lr=0, eval_every=2, warmup=0
    )
    assert "the classes have the order of the model's head: positive, negative" in assignment.prepared.notes
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    plain = transformers.BertForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    given = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    expected = plain(**given, labels=torch.tensor([plain.config.label2id[row["label"]] for row in rows])).loss.item()
    assert expected == pytest.approx(0.889, abs=1e-3)
    newest = read_catalog(storage, "positive-first").accepted[-1]
    assert newest.metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    [model] = storage.path("positive-first/attempts").glob("*/model")
    published = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    assert published.config.id2label == {0: "positive", 1: "negative"}
    torch.testing.assert_close(published.classifier.bias, plain.classifier.bias)


@pytest.mark.parametrize(
    ("theirs", "labels", "classes", "targets", "note"),
    [
        (("pos", "neg"), ["neg", "pos"], ["pos", "neg"], [1, 0], "order of the model's head: pos, neg"),
        (("POS", "NEG"), ["neg", "pos"], ["pos", "neg"], [1, 0], "order of the model's head: pos, neg"),
        (
            ("pos", "mid", "neg"),
            ["neg", "pos"],
            ["pos", "mid", "neg"],
            [2, 0],
            "order of the model's head: pos, mid, neg",
        ),
        (("x", "y"), ["neg", "pos"], ["neg", "pos"], [0, 1], "has the classes x, y; it learns neg, pos in their place"),
        (("b", "a", "c"), [0, 2], ["b", "a", "c"], [0, 2], "are indexes of the classes of the model's head: b, a, c"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), [0, 2], ["0", "1", "2"], [0, 2], "are indexes of the classes"),
        (("LABEL_0", "LABEL_1"), ["neg", "pos"], ["neg", "pos"], [0, 1], None),
        (("1 star", "2 stars"), [1, 2], ["1", "2"], [0, 1], "it learns 1, 2 in their place"),
        (tuple(f"LABEL_{n}" for n in range(11)), ["LABEL_10", "LABEL_2"], None, [10, 2], "order of the model's head"),
    ],
)
def test_labels_and_the_names_of_a_head(
    theirs: tuple[str, ...],
    labels: list[Any],
    classes: list[str] | None,
    targets: list[int],
    note: str | None,
    prepared: Callable[..., Prepared],
    storage: LocalStorage,
    tmp_path: Path,
) -> None:
    found = prepared(labelled(labels), model=saved(tmp_path / "model", **names(*theirs)))
    assert found.facts["classes"] == (list(theirs) if classes is None else classes)
    assert learned(found, storage) == [[target] for target in targets]
    assert any(note in item for item in found.notes) if note else not found.notes


@pytest.mark.parametrize(
    ("theirs", "labels", "message"),
    [
        (("pos", "neg"), ["pos", "mid", "neg"], "the model's head has pos, neg: mid is not among them"),
        (("pos", "neg", "mid"), ["pos", "bad"], "bad is not among them"),
        (("1 star", "2 stars", "3 stars"), [1, 2], "the labels may count from 0 or from 1"),
    ],
)
def test_labels_that_agree_with_a_head_in_part(
    theirs: tuple[str, ...], labels: list[Any], message: str, prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", **names(*theirs))
    with pytest.raises(ConfigError, match=message) as caught:
        prepared(labelled(labels), model=model)
    assert "data.labels" in (caught.value.hint or "")
    found = prepared(labelled(labels), model=model, labels=sorted(map(str, labels)))
    assert found.facts["classes"] == sorted(map(str, labels)), "the setting decides"


def test_data_of_another_order_is_prepared_anew(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    rows = labelled(["neg", "pos"])
    first = prepared(rows, model=saved(tmp_path / "a", **names("pos", "neg")))
    second = prepared(rows, model=saved(tmp_path / "b", **names("neg", "pos")))
    assert (first.facts["classes"], second.facts["classes"]) == (["pos", "neg"], ["neg", "pos"])
    assert first.fingerprint != second.fingerprint


def test_the_order_of_tags_is_that_of_the_head(
    prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", "TokenClassification", **names("O", "B-PER", "I-PER"))
    rows = [{"tokens": ["number", "text"], "tags": ["B-PER", "O"]}]
    found = prepared(rows, model=model, task=NER)
    assert found.facts["classes"] == ["O", "B-PER", "I-PER"]
    assert [label for label in learned(found, storage)[0] if label >= 0] == [1, 0]


def test_a_head_of_one_number_is_for_regression(
    prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    found = prepared(labelled([3, 1, 2]), model=saved(tmp_path / "model", num_labels=1))
    assert (found.facts["problem"], learned(found, storage)) == ("regression", [[3], [1], [2]])
    assert any("as by the model's head" in note for note in found.notes)


def test_facts_of_an_earlier_release_are_used_as_they_are(tmp_path: Path) -> None:
    facts = {"problem": "multi-label", "classes": ["0", "1"]}
    task = SequenceClassification(DataSettings(train="-"), load_tokenizer(str(saved(tmp_path / "model"))), facts)
    [sample] = task.encode([{"text": "text", "label": [1]}])
    assert sample["labels"].tolist() == [0, 1]
    assert (
        task.fault({"text": "text", "label": [0, 2]})
        == "label 2 is in the evaluation data but not in the training data"
    )
