"""docs/reference/architectures.md agrees with the record of the sweep, and the record with transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.support.architectures.cases import Ranks, model_types, tasks_of
from tests.support.architectures.record import RECORD
from tests.support.architectures.sweep import NOT_BUILT, REFUSED, WORKS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    code = f"import json, sys; sys.path.insert(0, {str(DOCS)!r}); import architectures; "
    code += "print(architectures.page(json.loads(architectures.RECORD.read_text())), end='')"
    page = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    stale = "the page differs from the record; generate it again: .venv/bin/python docs/architectures.py"
    assert (DOCS / "reference/architectures.md").read_text() == page, stale


def test_every_type_and_task_works_or_is_refused() -> None:
    record = json.loads(RECORD.read_text())
    if record["transformers"] != transformers.__version__:
        pytest.skip(f"the record is of transformers {record['transformers']}")
    assert list(record["types"]) == model_types()
    for kind, tasks in record["types"].items():
        assert list(tasks) == tasks_of(kind)
        for task, outcomes in tasks.items():
            assert list(outcomes) == [ranks.value for ranks in Ranks], (kind, task)
            for ranks, outcome in outcomes.items():
                verdict, _, reason = outcome.partition(": ")
                assert verdict in (WORKS, REFUSED, NOT_BUILT), (kind, task, ranks, outcome)
                assert bool(reason) == (verdict != WORKS), (kind, task, ranks, outcome)
