"""Rows of each kind, and the same rows as each type of file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from tests.support.tasks.cases import paragraphs

Row = dict[str, Any]
MAX_LENGTH = 24
NUM_ROWS = 10


def _classes(text: str) -> Row:
    return {"text": text, "label": "long" if len(text) > 70 else "short"}


def _pairs(text: str) -> Row:
    return {"text": text[:25], "text_pair": text[25:], "label": int(len(text) % 2)}


def _topics(text: str) -> Row:
    topics = ("class", "object", "name", "value")
    return {"text": text, "label": [topic for bit, topic in enumerate(topics) if len(text) >> bit & 1]}


def _number(text: str) -> Row:
    return {"text": text, "label": len(text) / 64}


def _tags(text: str) -> Row:
    words = text.split()[:12]
    return {"tokens": words, "tags": ["name" if word[0].isupper() else "word" for word in words]}


def _answers(text: str) -> Row:
    answer = next((word for word in text.split() if len(word) > 7), text.split()[0])
    found = (
        {"text": [answer], "answer_start": [text.index(answer)]} if len(text) % 5 else {"text": [], "answer_start": []}
    )
    return {"question": "Which word?", "context": text, "answers": found}


def _choices(text: str) -> Row:
    right = len(text) % 2
    choices = [text[60:19:-1], text[20:]] if right else [text[20:], text[60:19:-1]]
    return {"text": text[:20], "choices": choices, "label": right}


def _turns(text: str) -> Row:
    turns = [("user", text[:8]), ("assistant", text[8:16]), ("user", "on?"), ("assistant", text[16:30])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _translations(text: str) -> Row:
    return {"source": text, "target": " ".join(text.split()[:4])}


ROWS: dict[str, Callable[[str], Row]] = {
    "classes": _classes,
    "pairs": _pairs,
    "multi-label": _topics,
    "regression": _number,
    "tags": _tags,
    "answers": _answers,
    "choices": _choices,
    "masked-lm": lambda text: {"text": text},
    "causal-lm": lambda text: {"text": text},
    "chat": _turns,
    "marked chat": _turns,
    "seq2seq": _translations,
}
TASKS = {
    **dict.fromkeys(("classes", "pairs", "multi-label", "regression"), "sequence-classification"),
    "tags": "token-classification",
    "answers": "question-answering",
    "choices": "multiple-choice",
    "masked-lm": "masked-lm",
    "causal-lm": "causal-lm",
    **dict.fromkeys(("chat", "marked chat"), "chat"),
    "seq2seq": "seq2seq-lm",
}


def rows_of(kind: str, number: int = NUM_ROWS, first: int = 0) -> list[Row]:
    return [ROWS[kind](text) for text in islice(paragraphs(), first, first + number)]


# -- files -------------------------------------------------------------------------------------------------------------


def _jsonl(rows: Sequence[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _json(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps(list(rows)))


def _csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _parquet(rows: Sequence[Row], path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _arrow(rows: Sequence[Row], path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink:
        table = pyarrow.Table.from_pylist(list(rows))
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def _saved(rows: Sequence[Row], path: Path) -> None:
    datasets.Dataset.from_list(list(rows)).save_to_disk(path)


FILES: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "folder": _saved,  # of `Dataset.save_to_disk`
}
_NESTED = ("multi-label", "tags", "answers", "choices", "chat", "marked chat")


def files_for(kind: str) -> list[str]:
    """The types of files that can hold these rows."""
    return [name for name in FILES if kind not in _NESTED or name not in ("csv", "tsv")]


def write(rows: Sequence[Row], kind_of_file: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows.{kind_of_file}".removesuffix(".folder")
    FILES[kind_of_file](rows, path)
    return path
