"""The first step of each kind of rows and model equals that of plain transformers on the same rows."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.system.differential.models import MODELS
from tests.system.differential.rows import files_for
from tests.system.differential.work import compare

CASES = [(name, kind) for name, model in MODELS.items() for kind in model.kinds]
#: Every seventh case runs in each test; all of them with the faults.
EVERY = 7


def cases() -> Iterator[Any]:
    for number, (name, kind) in enumerate(CASES):
        files = files_for(kind)
        kind_of_file = files[number % len(files)]
        marks = () if number % EVERY == 0 else pytest.mark.faults
        yield pytest.param(name, kind, kind_of_file, id=f"{name}-{kind}-{kind_of_file}", marks=marks)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process whose settings of torch are not those of other tests."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("name", "kind", "kind_of_file"), list(cases()))
def test_the_first_step_is_that_of_transformers(
    name: str, kind: str, kind_of_file: str, process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    found = process.submit(compare, name, kind, kind_of_file, str(tmp_path)).result()
    theirs = found["theirs"]
    if kind != "masked-lm":  # its labels are made with each batch
        assert found["labels"] == [pytest.approx(labels, rel=1e-6) for labels in theirs.labels]
    for way in ("whole", "single"):
        assert found[way] == pytest.approx((theirs.loss, theirs.norm), rel=1e-5), way
