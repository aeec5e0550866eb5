"""Prepared data of rows with labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.preparation.prepare import Prepared, prepare
from tests.support.groups.worker_group import tiny_config
from tests.support.tasks.label_rows import write


@pytest.fixture
def prepared(storage: LocalStorage, tmp_path: Path) -> Callable[..., Prepared]:
    """Prepares rows, or a file, for a new model or one of a directory."""

    def make(rows: Any, *, model: Path | None = None, task: str = "sequence-classification", **data: Any) -> Prepared:
        source = rows if isinstance(rows, str | None) else write(tmp_path / "rows.jsonl", rows)
        chosen = {"task": task, **({"config": None, "tokenizer": None, "path": str(model)} if model else {})}
        sections = {"model": chosen, "data": {"train": source, "eval": None, **data}}
        return prepare(tiny_config("labels", storage.url, "", sections=sections, eval_every=None), storage)

    return make
