"""Values of labels: the same in every file type, what is no value, and what is noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.preparation.prepare import Prepared
from tests.support.tasks.label_rows import labelled, learned, write

NER = "token-classification"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize(
    ("labels", "problem"),
    [(["a", "b"], "single-label"), ([0.5, 1.5], "regression"), ([["a"], ["a", "b"]], "multi-label")],
)
@pytest.mark.parametrize("empty", ["", "  ", "\t"])
def test_an_empty_text_is_no_label(
    empty: str, labels: list[Any], problem: str, suffix: str, prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    is_list, path = isinstance(labels[0], list), tmp_path / f"a{suffix}"
    odd = ["a", empty] if is_list else empty
    if suffix == ".jsonl":
        write(path, labelled([*labels, odd]))
    else:
        kept = labels if is_list else list(map(str, labels))
        frame = pd.DataFrame(labelled([*kept, odd]))
        _ = frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    with pytest.raises(ConfigError, match=rf"a{suffix}, row 3.*column 'label' holds .*no value"):
        prepared(str(path))
    found = prepared(str(path), max_bad_rows=1)
    assert (found.facts["problem"], found.num_samples) == (problem, 2)
    assert found.facts["classes"] == ([] if problem == "regression" else ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "data", "problem", "classes"),
    [
        ([0.0, 1.0, 2.0, 1.0], {}, "regression", []),
        ([0.0, 1.0, 2.0, 1.0], {"problem": "single-label"}, "single-label", ["0", "1", "2"]),
        ([0.0, 1.0, 2.0, 1.0], {"labels": ["a", "b", "c"]}, "single-label", ["a", "b", "c"]),
        ([0.25, 1.0, -1e-7, 1.0], {}, "regression", []),
        ([3, 1, 20, 1], {}, "single-label", ["1", "3", "20"]),
        ([3, 1, 20, 1], {"problem": "regression"}, "regression", []),
        ([True, False, True, True], {}, "single-label", ["False", "True"]),
        (["b", "a", "b", "None"], {}, "single-label", ["None", "a", "b"]),
        ([["b", "a"], ["c"], ["b"], ["c"]], {}, "multi-label", ["a", "b", "c"]),
    ],
)
def test_a_file_type_does_not_change_the_task(
    labels: list[Any],
    data: dict[str, Any],
    problem: str,
    classes: list[str],
    prepared: Callable[..., Prepared],
    storage: LocalStorage,
    tmp_path: Path,
) -> None:
    rows, samples = labelled(labels), []
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", rows)
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        found = prepared(str(tmp_path / name), **data)
        assert (found.facts["problem"], found.facts["classes"]) == (problem, classes), name
        samples.append(learned(found, storage))
    assert samples[0] == samples[1] == samples[2]
    if problem == "regression":
        assert samples[0] == [[np.float32(label)] for label in labels]


def test_whole_numbers_that_are_fractions_are_said(prepared: Callable[..., Prepared]) -> None:
    [note] = prepared(labelled([0.0, 1.0, 2.0])).notes
    assert "used for regression" in note
    assert "all its labels are whole (0, 1, 2): for classes set data.problem: single-label" in note


@pytest.mark.parametrize(
    ("numbers", "problem"), [(["0.5", "1.5", "2.5"], "regression"), (["0", "1", "2"], "single-label")]
)
@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "null", "None"])
def test_a_missing_value_among_numbers_is_no_class(
    numbers: list[str], problem: str, missing: str, prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    pd.DataFrame(labelled([*numbers, missing])).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ConfigError, match=rf"a.csv, row 4 .line 5.: .*{missing}"):
        prepared(str(tmp_path / "a.csv"))
    found = prepared(str(tmp_path / "a.csv"), max_bad_rows=1)
    assert (found.facts["problem"], found.num_samples) == (problem, 3)
    assert found.facts["classes"] == ([] if problem == "regression" else numbers)


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([1, 5, 2], "the labels 1, 2, 5 get the indexes 0, 1, 2"),
        (["1", "2"], "the labels 1, 2 get the indexes 0, 1"),
        ([-1, 0, 1], "the labels -1, 0, 1 get the indexes 0, 1, 2"),
        ([[1], [1, 3]], "the labels 1, 3 get the indexes 0, 1"),
        (["Pos", "pos", "neg"], "the classes 'Pos', 'pos' differ only in case or surrounding space"),
        (["pos ", "pos"], "the classes 'pos', 'pos ' differ only in case or surrounding space"),
        (["a", "n/a", "NaN"], "'NaN', 'n/a' is used as a class"),
        (["a", "#N/A"], "'#N/A' is used as a class"),
    ],
)
def test_classes_that_may_be_an_oversight_are_noted(
    labels: list[Any], note: str, prepared: Callable[..., Prepared]
) -> None:
    assert any(note in item for item in prepared(labelled(labels)).notes)
    if not isinstance(labels[0], list):
        rows = [{"tokens": ["text"], "tags": [label]} for label in labels]
        assert any(note in item for item in prepared(rows, task=NER).notes)
        classes = list(map(str, labels))
        assert not any(note in item for item in prepared(labelled(labels), labels=classes).notes), "the user's own"


@pytest.mark.parametrize("labels", [[0, 1, 2], ["a", "b"], [True, False]])
def test_other_classes_are_not_noted(labels: list[Any], prepared: Callable[..., Prepared]) -> None:
    assert prepared(labelled(labels)).notes == ()


def test_decimal_commas(prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text;score\na;1.234,5\nb;0,5\nc;2,0\n")
    found = prepared(str(path))
    assert any("look like numbers, and are used as classes; data.csv.decimal" in note for note in found.notes)
    with pytest.raises(
        ConfigError, match=r"no such labels; the first is '1.234,5' \(.*a.csv, row 1 \(line 2\)\)"
    ) as caught:
        prepared(str(path), problem="regression", label="score")
    assert "set data.csv.decimal: ','" in caught.value.hint
    with pytest.raises(ConfigError, match=r"the first is '1.234,5'"):
        prepared(str(path), problem="regression")  # with a column that is guessed
    found = prepared(str(path), csv={"decimal": ","})
    assert (found.facts["problem"], learned(found, storage)) == ("regression", [[1234.5], [0.5], [2.0]])
    path.write_text("text;label\na;0.25\nb;0,5\n")
    with pytest.raises(ConfigError, match=r"row 2 .* holds '0,5', not a number \(data.csv.decimal"):
        prepared(str(path), problem="regression")


# -- numbers and other texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["#N/A", "inf", "-nan", "<NA>", "?", "-", "missing"])
def test_one_odd_cell_among_fractions_is_unusable(odd: str, prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"text,label\na,0.5\nb,0.7\nc,{odd}\n")
    found = prepared(str(tmp_path / "rows.csv"), max_bad_rows=1)
    assert (found.facts["problem"], found.num_rows["train"]) == ("regression", 2)
    with pytest.raises(ConfigError, match="row 3"):
        prepared(str(tmp_path / "rows.csv"))


def test_odd_texts_among_numbers_of_json(prepared: Callable[..., Prepared]) -> None:
    found = prepared(labelled([0.5, 0.7, "n/a", 0.3]), max_bad_rows=1)
    assert (found.facts["problem"], found.num_rows["train"]) == ("regression", 3)
    found = prepared(labelled(["0.5", "0.7", "abc"]))
    assert any("holds fractions and other texts" in note for note in found.notes)


def test_texts_that_only_python_takes_for_numbers(prepared: Callable[..., Prepared]) -> None:
    assert prepared(labelled(["1_1", "1_2", "2_1"])).facts["classes"] == ["1_1", "1_2", "2_1"]


def test_numbers_beyond_those_of_the_model(prepared: Callable[..., Prepared]) -> None:
    found = prepared(labelled([0.5, 1e300, 10**400, 0.25]), max_bad_rows=2)
    assert (found.facts["problem"], found.num_rows["train"]) == ("regression", 2)
    classes = prepared(labelled(["1" * 5000, "0", "1"])).facts["classes"]
    assert classes == ["0", "1", "1" * 5000]


def test_class_names_that_are_numbers(prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path) -> None:
    names = ["1.0", "2.0", "3.0"]
    found = prepared(labelled(["1.0", "2.0", "1.0"]), labels=names)
    assert learned(found, storage) == [[0], [1], [0]]
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    datasets.Dataset.from_list(labelled([0, 2, 0]), features=features).to_parquet(tmp_path / "a.parquet")
    assert learned(prepared(str(tmp_path / "a.parquet")), storage) == [[0], [2], [0]]
    with pytest.raises(ConfigError, match="writes them with a fraction"):
        prepared(labelled([1.0, 2.0, 1.0]), labels=names)


@pytest.mark.parametrize(("problem", "expected"), [(None, [[0.0], [1.0]] * 2), ("single-label", [[0], [1]] * 2)])
def test_the_same_numbers_in_a_csv_and_a_parquet_file(
    problem: str | None, expected: list[Any], prepared: Callable[..., Prepared], storage: LocalStorage, tmp_path: Path
) -> None:
    table = pd.DataFrame(labelled([0.0, 1.0]))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "b.parquet")
    found = prepared(None, train=[str(tmp_path / name) for name in ("a.csv", "b.parquet")], problem=problem)
    assert learned(found, storage) == expected


def test_lists_in_another_notation_are_noted(prepared: Callable[..., Prepared]) -> None:
    found = prepared(labelled(["[1 0 1]", "[0 1 1]"]))
    assert any("'[0 1 1]', which is no list" in note for note in found.notes)
