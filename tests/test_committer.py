"""What a commit may cost when the storage fails around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.layout import attempt_dir
from outlast.checkpointing.storage import LocalStorage
from tests.test_lineage import Interrupted, start


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.mark.parametrize("survived", range(4))
def test_a_deletion_that_fails_is_no_end_and_is_tried_again(survived: int, storage: LocalStorage) -> None:
    failures = [StorageError("cannot delete: Input/output error")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    worker = start(Interrupted(Path(storage.url), fail, before_delete=survived), "a")
    assert [worker.save() for _ in range(3)] == [True] * 3
    assert not failures
    lying = {entry.name for entry in storage.list(attempt_dir("run", worker.ref.attempt)) if entry.num_bytes is None}
    assert lying == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert worker.save()
    lying = {entry.name for entry in storage.list(attempt_dir("run", worker.ref.attempt)) if entry.num_bytes is None}
    assert lying == {"checkpoint-3", "checkpoint-4"}
