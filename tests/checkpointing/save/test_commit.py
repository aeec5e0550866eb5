"""What a commit may cost when the storage fails around it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, StorageError, StorageRefused
from outlast.checkpointing.format.layout import CLAIM, attempt_dir
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage import retry
from outlast.checkpointing.storage.base import Buffer
from outlast.checkpointing.storage.local import LocalStorage
from tests.checkpointing.run_store.test_catalog import Interrupted, numbered, start
from tests.support.small_model import small_model


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


def test_one_checkpoint_that_cannot_be_deleted_keeps_no_other(storage: LocalStorage) -> None:
    class Locked(LocalStorage):
        def delete(self, path: str) -> None:
            if "/checkpoint-1/" in path:
                raise StorageRefused("cannot delete: locked")
            super().delete(path)

    worker = start(Locked(Path(storage.url)), "a")
    assert [worker.save() for _ in range(6)] == [True] * 6
    lying = {entry.name for entry in storage.list(attempt_dir("run", worker.ref.attempt)) if entry.num_bytes is None}
    assert lying == {"checkpoint-1", "checkpoint-5", "checkpoint-6"}


def test_overtaken_while_it_claims(storage: LocalStorage) -> None:
    model, optimizer = small_model()
    saver = Checkpointer(
        Interrupted(Path(storage.url), lambda: numbered(storage, "0009-ffffffff"), before_put=CLAIM), "run"
    )
    assert saver.superseded
    assert saver.resume(model, optimizer) is None
    assert saver.wait() is False
    assert saver.async_save(1, model, optimizer, {}) is False
    assert saver.save(1, model, optimizer, {}) is False
    assert read_catalog(storage, "run").is_fresh


def test_a_step_whose_commit_may_be_there_is_not_written_again(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy(LocalStorage):
        def put(self, path: str, chunks: Iterable[Buffer]) -> None:
            super().put(path, chunks)
            if path.endswith("checkpoint-1/manifest.json"):
                raise StorageError("the answer was lost")

    monkeypatch.setattr(retry, "_PAUSE_S", 0.0)
    model, optimizer = small_model()
    saver = Checkpointer(Lossy(Path(storage.url)), "run")
    with pytest.raises(StorageError, match="the answer was lost"):
        saver.save(1, model, optimizer, {})
    with pytest.raises(ConfigError, match="is not begun again"):
        saver.save(1, model, optimizer, {})
    assert saver.save(2, model, optimizer, {})
