"""Dialects of .csv and .tsv files, and encodings of all text files. pandas reads the expected rows."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.data import CsvSettings, DataSettings
from outlast.trainers.data.columns import choose_columns
from outlast.trainers.data.readers import Row, read_rows
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.tasks.classification import SequenceClassification
from tests.support.groups.worker_group import tiny_config

GLUE = b'label\ttext\n1\t"Good, he said\n0\tugly"\n'
ROWS = "text{0}label\ngood{0}1\n{0}0\n\nbad film{0}NA\n"


def rows(path: Path, **dialect: Any) -> list[Row]:
    return list(read_rows(str(path), ["text", "label"], CsvSettings(**dialect)))


def values(path: Path, **dialect: Any) -> list[tuple[Any, ...]]:
    return [row.values for row in rows(path, **dialect)]


def as_pandas(data: bytes, **options: Any) -> list[tuple[Any, ...]]:
    frame = pd.read_csv(BytesIO(data), dtype=str, keep_default_na=False, **{"na_values": [""], **options})
    return [
        tuple(None if pd.isna(item) else item for item in row)
        for row in frame[["text", "label"]].itertuples(index=False)
    ]


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("a.csv", ROWS.format(",").encode(), {}),
        ("a.tsv", ROWS.format("\t").encode(), {"sep": "\t"}),
        ("semicolons.csv", ROWS.format(";").encode(), {"sep": ";"}),
        ("bars.csv", ROWS.format("|").encode(), {"sep": "|"}),
        ("tabs.csv", ROWS.format("\t").encode(), {"sep": "\t"}),
        ("commas.tsv", ROWS.format(",").encode(), {}),
        ("spaces.csv", ROWS.format(", ").encode(), {"skipinitialspace": True}),
        ("mac.csv", ROWS.format(",").replace("\n", "\r").encode(), {}),
        ("dos.csv", ROWS.format(",").replace("\n", "\r\n").encode(), {}),
        ("utf16.csv", ROWS.format(",").encode("utf-16"), {"encoding": "utf-16"}),
        ("utf16be.csv", b"\xfe\xff" + ROWS.format(",").encode("utf-16-be"), {"encoding": "utf-16"}),
        ("utf32.csv", ROWS.format(";").encode("utf-32"), {"encoding": "utf-32", "sep": ";"}),
        ("mark.csv", ROWS.format(",").encode("utf-8-sig"), {"encoding": "utf-8-sig"}),
        ("quoted.csv", b'text,label\n"one, two",1\n"three\nfour",0\n"say ""hi""",1\n', {}),
        ("header.csv", b'"text";"label, or not"\nyes;1\n', {"sep": ";"}),
        ("first.csv", b"\n\ntext,label\ngood,1\n", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plain_dialect_is_recognized(name: str, data: bytes, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    if name == "header.csv":
        found = [row.values for row in read_rows(str(tmp_path / name), ["text", "label, or not"])]
        assert found == [("yes", "1")]
        return
    assert values(tmp_path / name) == as_pandas(data, **options)


@pytest.mark.parametrize(
    ("data", "dialect", "options"),
    [
        (GLUE, {"quote": "none"}, {"sep": "\t", "quoting": csv.QUOTE_NONE}),
        (GLUE, {"quote": "double"}, {"sep": "\t"}),
        ("text,label\ncafé,1\n".encode("cp1252"), {"encoding": "cp1252"}, {"encoding": "cp1252"}),
        (b"text,label\nNA,1\n,0\nx,none\n", {"missing": ["", "none"]}, {"na_values": ["", "none"]}),
        (b"text,label\n,1\n", {"missing": []}, {"na_values": []}),
        (b"text^label\na,b;c^1\n", {"delimiter": "^"}, {"sep": "^"}),
    ],
)
def test_settings(data: bytes, dialect: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(data)
    assert values(tmp_path / "a.tsv", **dialect) == as_pandas(data, **options)


def test_a_file_with_tabs_that_looks_unquoted(tmp_path: Path) -> None:
    """GLUE's files have quotation marks that stand for themselves; rows would be joined in silence."""
    path = tmp_path / "glue.tsv"
    path.write_text('label\ttext\n1\tfine\n1\t"Good, he said\n0\tbad\n0\tugly"\n1\tok\n')
    with pytest.raises(ConfigError, match=r"glue.tsv, line 3: quotation marks join lines 3 to 5") as caught:
        values(path)
    assert "data.csv.quote=none" in str(caught.value.hint)
    assert len(values(path, quote="none")) == 5
    assert len(values(path, quote="double")) == 3
    path.write_text('label\ttext\n1\t"one\ntwo"\n')
    assert values(path) == [("one\ntwo", "1")]


def test_a_quotation_mark_that_is_not_closed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\ngood,1\n"bad,0\nfine,1\n')
    [_, row] = rows(tmp_path / "a.csv")
    assert row.fault is not None
    assert row.fault.startswith("a quotation mark in line 3 opens a text that does not end")
    assert len(values(tmp_path / "a.csv", quote="none")) == 3


def test_a_header_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("größe,text,label\n1,a,b\n".encode("cp1252"))
    with pytest.raises(ConfigError, match="its header, line 1, is not UTF-8 text") as caught:
        values(tmp_path / "a.csv")
    assert "data.csv.encoding" in str(caught.value.hint)


def advice(path: Path, **data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_columns(SequenceClassification.columns, DataSettings(train=str(path), **data))
    return caught.value.hint


def test_rows_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes("Text;Note\nschön;1\ngut;2\n".encode("cp1252"))
    assert "the file is not UTF-8: -s data.csv.encoding=cp1252" in advice(path)
    [first, second] = read_rows(str(path), ["Text"])
    assert "-s data.csv.encoding=cp1252" in (first.fault or "")
    assert second.values == ("gut",)
    assert "UTF-8" not in advice(path, csv={"encoding": "cp1252"})


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_the_delimiter_that_excel_declares(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text(f"sep={mark}\n" + f"text,{mark}label\na,b{mark}0\nc{mark}1\n")
    assert [row.values for row in read_rows(str(path), ["text,", "label"])] == [("a,b", "0"), ("c", "1")]
    assert rows_end(path, ["label"]) == "excel.csv, row 2 (line 4)"


def rows_end(path: Path, columns: list[str]) -> str:
    return Path([row.where for row in read_rows(str(path), columns)][-1]).name


def test_columns_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",text,label,,\n0,good,1,,\n1,bad,0,,\n")
    assert values(path) == [("good", "1"), ("bad", "0")]
    chosen = choose_columns(SequenceClassification.columns, DataSettings(train=str(path)))
    assert (chosen.available, chosen.unused) == (("text", "label"), [])


@pytest.mark.parametrize("header", ["Hotel Paris,0", "It is a good film,good", "3.5,x"])
def test_a_file_without_names_of_columns(header: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\nHotel Bern,1\n")
    assert "the first line is taken for the names of the columns" in advice(path)
    path.write_text("Text of review,Stars\na,1\n")
    assert "the first line" not in advice(path)
    assert "-s 'data.text=Text of review'" in advice(path), "quoted for a shell"


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,text\na,b,c\n")
    with pytest.raises(ConfigError, match="has 2 columns 'text'"):
        values(tmp_path / "a.csv")


def test_an_unknown_encoding() -> None:
    with pytest.raises(ValueError, match="'utf-9' is not an encoding"):
        CsvSettings(encoding="utf-9")


def test_another_delimiter_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\ngood;1\n")
    chosen = choose_columns(SequenceClassification.columns, DataSettings(train=str(tmp_path / "a.csv")))
    assert chosen.notes == (f"{tmp_path / 'a.csv'}: fields are separated by ';' (data.csv.delimiter)",)


def test_numbers_with_a_decimal_comma(tmp_path: Path) -> None:
    numbers = ["0,5", "-1,25", "1.234,5", "1.234.567", "12", "3,5e2", "+7,0", "0"]
    others = ["1,2,3", "a 1,5", "1,", ",5", "1.2.3", "12.34,5", "v1.234"]
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{line}\n" for line in ["text;label", *(f"x;{item}" for item in [*numbers, *others])]))
    found = [label for _, label in values(path, decimal=",")]
    frame = pd.read_csv(path, sep=";", decimal=",", thousands=".", nrows=len(numbers))
    assert [float(label) for label in found[: len(numbers)]] == frame["label"].tolist()
    assert found[len(numbers) :] == others
    assert [label for _, label in values(path)] == [*numbers, *others], "by default all fields are texts"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json"])
def test_other_text_files(kind: str, encoding: str, line_break: str, tmp_path: Path) -> None:
    texts = ["erste Größe", "zweite", "третья"]
    body = texts if kind == "txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / f"a.{kind}"
    path.write_bytes((line_break.join(body) + line_break).encode(encoding))
    assert [row.values for row in read_rows(str(path), ["text"])] == [(text,) for text in texts]


def write_table(path: Path, labels: list[Any]) -> None:
    texts = [f"row {number}" for number in range(len(labels))]
    if path.suffix == ".csv":
        pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        body = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in body))
    elif path.stem == "pandas":
        pd.DataFrame({"text": texts, "label": labels}).to_parquet(path)  # writes NaN for a missing number
    else:
        pq.write_table(pa.table({"text": texts, "label": labels}), path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "pandas.parquet"])
@pytest.mark.parametrize(
    "labels", [[0.25, 0.75, 1.25, 3.5, None], [0.0, 1.0, 2.0, None, 1.0], ["a", "b", None, "a", "b"]]
)
def test_a_missing_label_is_a_bad_row_of_every_file_type(
    name: str, labels: list[Any], tmp_path: Path, storage: LocalStorage
) -> None:
    write_table(tmp_path / name, labels)
    row = labels.index(None) + 1

    def prepared(**data: Any) -> Any:
        sections = {
            "model": {"task": "sequence-classification"},
            "data": {"train": str(tmp_path / name), "eval": None, **data},
        }
        return prepare(tiny_config("missing", storage.url, "", sections=sections, eval_every=None), storage)

    with pytest.raises(ConfigError, match=rf"{name}, row {row}( .line {row + 1}.)?: column 'label' holds no value"):
        prepared()
    found = prepared(max_bad_rows=1)
    is_number = isinstance(labels[0], float)
    assert found.facts["problem"] == ("regression" if is_number else "single-label")
    assert found.facts["classes"] == ([] if is_number else ["a", "b"])
    assert (found.num_samples, found.num_bad_rows) == (4, 1)


def test_the_own_form_of_squad(tmp_path: Path) -> None:
    questions = [{"id": "1", "question": "what colour?", "answers": [{"text": "blue", "answer_start": 11}]}]
    article = {"title": "t", "paragraphs": [{"context": "the sky is blue", "qas": questions}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    [row] = read_rows(str(path), ["question", "context", "answers"])
    assert row.values == ("what colour?", "the sky is blue", {"text": ["blue"], "answer_start": [11]})
    path.write_text(json.dumps({"data": [{"text": "a"}, {"text": "b"}]}))
    assert [row.values for row in read_rows(str(path), ["text"])] == [("a",), ("b",)]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"qas": [{}]}]}]}))
    with pytest.raises(ConfigError, match="an article is not in the form of SQuAD"):
        list(read_rows(str(path), ["question"]))
