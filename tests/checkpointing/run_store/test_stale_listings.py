"""A storage whose listings lag behind, as with the attribute cache of an NFS mount."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format.layout import CLAIM
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import digests_of, small_model, train_step

LAG_S = 0.5


class Lagging:
    """A real storage; what was put shows in listings only `LAG_S` later. Reading by name sees all."""

    def __init__(self, inner: LocalStorage) -> None:
        self.inner, self.url = inner, inner.url
        self.after_put: Callable[[str], None] = lambda path: None
        self._since: dict[str, float] = {}

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self.inner.put(path, chunks)
        for place in (path, *map(str, Path(path).parents)):
            self._since.setdefault(place, time.monotonic())
        self.after_put(path)

    def open(self, path: str) -> BinaryIO:
        return self.inner.open(path)

    def list(self, path: str) -> list[Entry]:
        horizon = time.monotonic() - LAG_S
        return [item for item in self.inner.list(path) if self._since.get(f"{path}/{item.name}", 0) <= horizon]

    def delete(self, path: str) -> None:
        self.inner.delete(path)


@pytest.mark.parametrize(
    ("settle_s", "resumed"),
    [
        pytest.param(0.0, None, id="not told: the commit is missed"),
        pytest.param(LAG_S, 1, id="told: nothing is lost"),
    ],
)
def test_a_commit_acknowledged_beside_a_claim_that_did_not_show(
    tmp_path: Path, settle_s: float, resumed: int | None
) -> None:
    storage = Lagging(LocalStorage(tmp_path))
    model, optimizer = small_model()
    old = Checkpointer(storage, "run", launch="first")
    old.resume(model, optimizer)
    train_step(model, optimizer, 0)
    time.sleep(LAG_S)  # its claim is old

    def commit(path: str) -> None:
        if path.endswith(CLAIM):
            storage.after_put = lambda path: None
            assert old.save(1, model, optimizer, {"step": 1}), "the old attempt saw a claim that does not show yet"

    storage.after_put = commit
    twin, twins_optimizer = small_model(seed=1)
    state = Checkpointer(storage, "run", launch="second", settle_s=settle_s).resume(twin, twins_optimizer)
    assert (state or {}).get("step") == resumed
    assert (digests_of(twin, twins_optimizer) == digests_of(model, optimizer)) == (resumed is not None)
    if resumed is not None:
        assert not old.save(2, model, optimizer, {"step": 2}), "by now the old attempt sees the claim"
