"""The same rows give the same samples from every type of file: those of plain transformers.

The rows are random: their texts, the order of their columns, columns that no task reads, and rows without a value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.preparation.prepare import prepare
from tests.support.tasks.cases import paragraphs
from tests.system.differential.models import save_model
from tests.system.differential.reference import MAKERS, PROBLEMS
from tests.system.differential.rows import ROWS, TASKS, Row, files_for, write
from tests.system.differential.work import settings_of

datasets.disable_progress_bars()
#: A model for each kind of rows.
CHOSEN = {
    "classes": "bert",
    "pairs": "roberta",
    "multi-label": "bert",
    "regression": "electra",
    "tags": "bert",
    "answers": "bert",
    "choices": "bert",
    "causal-lm": "llama",
    "chat": "qwen2",
    "seq2seq": "t5",
}
NUM_ROWS = 6
PARAGRAPHS = list(paragraphs())[:40]
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)
JOINS = st.sampled_from(['"', ",", "\n", "\t", "'"])
TEXTS = st.sampled_from(PARAGRAPHS) | st.builds(
    lambda word, join, text: f"{word}{join}{text}", WORDS, JOINS, st.sampled_from(PARAGRAPHS)
)
#: Columns that no task reads.
EXTRAS: list[dict[str, st.SearchStrategy[Any]]] = [
    {},
    {"id": st.integers(0, 9)},
    {"note": st.just("a, b"), "weight_1": st.floats(0, 1)},
]


@st.composite
def tables(draw: st.DrawFn, kind: str) -> tuple[list[Row], list[int]]:
    """Rows, some without a value that the task needs, and the indices of these."""
    texts = TEXTS if kind in ("classes", "regression", "causal-lm") else st.sampled_from(PARAGRAPHS)
    rows = [ROWS[kind](draw(texts)) for _ in range(NUM_ROWS)]
    order = draw(st.permutations(list(rows[0])))
    extra = {
        name: draw(st.lists(st.none() | values, min_size=NUM_ROWS, max_size=NUM_ROWS))
        for name, values in draw(st.sampled_from(EXTRAS)).items()
    }
    bad = sorted(draw(st.sets(st.integers(1, NUM_ROWS - 1), max_size=2)))
    target = draw(st.sampled_from(order))
    found = []
    for number, row in enumerate(rows):
        values = {name: row[name] for name in order}
        if number in bad:
            values[target] = None
        found.append({**values, **{name: column[number] for name, column in extra.items()}})
    return found, bad


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(CHOSEN[kind], kind, tmp_path_factory.mktemp("model"))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", CHOSEN)
def test_every_type_of_file_gives_the_samples_of_transformers(kind: str, model: Callable[[str], Path]) -> None:
    folder = model(kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.problem_type = PROBLEMS.get(kind, "single_label_classification")

    @settings(max_examples=6)
    @given(tables(kind))
    def check(table: tuple[list[Row], list[int]]) -> None:
        rows, bad = table
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        whole = [row for number, row in enumerate(rows) if number not in bad]
        if kind in ("classes", "pairs", "multi-label"):
            labels = [row["label"] if kind == "multi-label" else [row["label"]] for row in whole]
            assume(len({label for each in labels for label in each}) > 1)  # else there is nothing to classify
        expected = [(example.inputs["input_ids"], example.labels) for example in MAKERS[kind](tokenizer, config, whole)]
        for kind_of_file in files_for(kind):
            with tempfile.TemporaryDirectory() as place:
                found = samples(kind, folder, Path(place), rows, kind_of_file)
            assert found == (expected, len(bad)), kind_of_file
        mixed = [{name: value for name, value in row.items() if value is not None} for row in rows]
        with tempfile.TemporaryDirectory() as place:
            assert samples(kind, folder, Path(place), mixed, "jsonl") == (expected, len(bad)), "rows of several schemas"

    check()


def samples(kind: str, model: Path, place: Path, rows: list[Row], kind_of_file: str) -> Any:
    """Token ids and labels of each sample, and the number of unusable rows."""
    storage = LocalStorage(place / "runs")
    path = write(rows, kind_of_file, place)
    body = {
        "name": "run",
        "model": {"path": str(model), "task": TASKS[kind]},
        "data": settings_of(kind, path, max_bad_rows=2),
        "checkpoint": {"storage": storage.url},
        "train": {"steps": 1, "batch": 1, "micro_batch": 1},
    }
    prepared = prepare(TrainingConfig.model_validate(body), storage)
    found = []
    for sample in prepared.split(storage, "train").take(range(prepared.num_samples)):
        if kind == "answers":
            labels = [int(sample["start"][0]), int(sample["end"][0])]
        else:
            labels = sample["input_ids" if kind == "causal-lm" else "labels"].tolist()
        ids = sample["input_ids"].tolist()
        if kind == "choices":  # one after the other, without padding
            lengths = sample["lengths"].tolist()
            pad = transformers.AutoTokenizer.from_pretrained(model).pad_token_id
            pieces = [ids[: lengths[0]], ids[lengths[0] :]]
            ids = [[*piece, *[pad] * (max(lengths) - len(piece))] for piece in pieces]
            labels = labels[0:1]
        found.append((ids, pytest.approx(labels)))
    return found, prepared.num_bad_rows
