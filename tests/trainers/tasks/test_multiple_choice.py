"""Labels of multiple choice: a column holds texts, indexes or letters, and only one of these."""

from __future__ import annotations

from typing import Any

import pytest

from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS, Task, find_task

NAMES = ["multiple-choice", "double-heads"]


def rows(*labelled: tuple[list[str], Any]) -> list[dict[str, Any]]:
    return [{"text": "which one", "choices": choices, "label": label} for choices, label in labelled]


def task_of(name: str, records: list[dict[str, Any]]) -> Task:
    found, settings = find_task(name), DataSettings(train="-", max_length=24)
    tokenizer = train_bpe(iter(["which one is it"]), 300, BERT_TOKENS, BERT_TEMPLATE)
    return found(settings, tokenizer, found.survey(settings, iter(records)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (rows((["3", "7"], 0), (["0", "2"], 1), (["1", "0"], 0)), [0, 1, 0]),
        (rows((["3", "7"], "0"), (["0", "2"], "1"), (["1", "0"], "0")), [0, 1, 0]),
        (rows((["3", "7"], "7"), (["0", "1"], "0"), (["1", "0"], "0")), [1, 0, 1]),
        (rows((["x", "y"], "A"), (["x", "y"], "b")), [0, 1]),
        (rows((["A", "B"], "B"), (["B", "A"], "B")), [1, 0]),
    ],
    ids=["indexes", "indexes as texts", "texts", "letters", "texts that are letters"],
)
def test_a_label_means_the_same_in_every_row(name: str, records: list[dict[str, Any]], expected: list[int]) -> None:
    """A text that is an index and a choice as well is what the other rows' labels are."""
    task = task_of(name, records)
    assert [task.fault(record) for record in records] == [None] * len(records)
    assert [sample["labels"].tolist() for sample in task.encode(records)] == [[label] for label in expected]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("records", "fault"),
    [
        (rows((["x", "y"], 1), (["x", "y"], 2)), "label 2 is not one of the choices, which are counted from 0"),
        (rows((["x", "y"], 1), (["x", "y"], -1)), "label -1 is not one of the choices, which are counted from 0"),
        (rows((["x", "y"], "x"), (["x", "y"], "z")), "label 'z' is not one of the choices"),
        (rows((["x", "y"], "x"), (["x", "x"], "x")), "label 'x' is more than one of the choices"),
        (rows((["x", "y"], "A"), (["x", "y"], "C")), "label 'C' is not one of the choices, which are A, B and so on"),
        (rows((["x", "y"], 0), (["x", "y"], True)), "label True is not one of the choices, which are counted from 0"),
        (rows((["x", "y"], 0), ([], 0)), "it has 0 choices, not 2"),
        (rows((["x", "y"], 0), (["x", "y", "z"], 0), (["x", "y"], 0)), "it has 3 choices, not 2"),
    ],
)
def test_a_label_that_is_no_choice(name: str, records: list[dict[str, Any]], fault: str) -> None:
    assert task_of(name, records).fault(records[1]) == fault


def test_letters_are_said() -> None:
    assert task_of("multiple-choice", rows((["x", "y"], "A"))).facts["notes"] == [
        "column 'label' holds letters: A is the first choice"
    ]


def test_facts_of_an_earlier_release() -> None:
    records = rows((["3", "7"], "7"), (["3", "7"], "0"))
    found = find_task("multiple-choice")
    tokenizer = train_bpe(iter(["which one is it"]), 300, BERT_TOKENS, BERT_TEMPLATE)
    task = found(DataSettings(train="-", max_length=24), tokenizer, {"num_choices": 2})
    assert [sample["labels"].tolist() for sample in task.encode(records)] == [[1], [0]]
