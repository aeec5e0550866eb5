"""docs/reference/architectures.md agrees with the record of the sweep, and the record with transformers' tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.architectures.cases import model_types, tasks_of
from tests.support.architectures.record import RECORD

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    code = f"import json, sys; sys.path.insert(0, {str(DOCS)!r}); import architectures as a; "
    code += "print(a.page(json.loads(a.RECORD.read_text())), end='')"
    page = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (DOCS / "reference/architectures.md").read_text() == page, "run .venv/bin/python docs/architectures.py"


def test_every_type_and_task_has_an_outcome() -> None:
    recorded = json.loads(RECORD.read_text())["types"]
    assert {kind: list(tasks) for kind, tasks in recorded.items()} == {kind: tasks_of(kind) for kind in model_types()}
