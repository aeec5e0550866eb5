"""Saves that overlap training: the copy is of the step that was saved, one save at a time, and no failure is silent."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save import staging as snapshot
from outlast.checkpointing.save.staging import HostCopy
from outlast.checkpointing.storage.base import Entry
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import digests_of, small_model, train_step


class Held:
    """A storage whose puts of weights wait until they are let go, and then perhaps fail."""

    def __init__(self, root: Path) -> None:
        self._inner = open_storage(str(root))
        self.url = self._inner.url
        self.go = threading.Event()
        self.arrived = threading.Event()
        self.failure: Exception | None = None

    def put(self, path: str, chunks: Iterable[bytes | memoryview]) -> None:
        if path.endswith("model.safetensors"):
            self.arrived.set()
            assert self.go.wait(30)
            if self.failure:
                raise self.failure
        self._inner.put(path, chunks)

    def open(self, path: str) -> BinaryIO:
        return self._inner.open(path)

    def list(self, path: str) -> list[Entry]:
        return self._inner.list(path)

    def delete(self, path: str) -> None:
        self._inner.delete(path)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    storage = Held(tmp_path)
    yield storage
    storage.go.set()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every copy begins only when some optimizer has come to its step, which is as late as a copy can begin."""
    at_step = threading.Event()
    copy_now = HostCopy.run

    def run(self: HostCopy) -> None:
        assert at_step.wait(30)
        copy_now(self)

    monkeypatch.setattr(HostCopy, "run", run)
    hook = register_optimizer_step_pre_hook(lambda *_: at_step.set())
    yield at_step
    hook.remove()


def saved(storage: LocalStorage, run: str = "run") -> dict[int, dict[str, str]]:
    """Digests of every accepted checkpoint by step."""
    found = read_catalog(storage, run).accepted
    return {item.ref.step: tensor_digests(storage, checkpoint_dir(run, item.ref), item) for item in found}


def events(storage: Any, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in run_events(RunStore(storage, "run")) if event["event"] == kind]


class WithNorm(nn.Module):
    """A batch norm changes its counters in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.norm(inputs))
        return result


def test_what_is_saved_is_the_step_that_was_saved(tmp_path: Path, late: threading.Event) -> None:
    torch.manual_seed(0)
    model = WithNorm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    saver.resume(model, optimizer)
    expected = {}
    for step in range(1, 5):
        train_step_of(model, optimizer, step)
        expected[step] = digests_of(model, optimizer)
        late.clear()
        assert saver.async_save(step, model, optimizer, {"step": step})
        train_step_of(model, optimizer, 100 + step)  # its forward pass and its update come before the copy
        assert saver.wait()
    assert len(set(map(str, expected.values()))) == 4
    found = saved(LocalStorage(tmp_path))
    assert found == {step: expected[step] for step in found}
    assert len(found) == 3


def train_step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def test_another_optimizer_of_the_same_weights_waits_too(tmp_path: Path, late: threading.Event) -> None:
    model, optimizer = small_model()
    other = torch.optim.SGD(model.parameters(), lr=0.5)
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    train_step(model, optimizer, 1)
    expected = digests_of(model, optimizer)
    late.clear()
    assert saver.async_save(1, model, optimizer, {})
    train_step(model, other, 2)
    assert saver.wait()
    assert saved(LocalStorage(tmp_path)) == {1: expected}


def test_a_loop_that_changes_weights_itself_asks_for_the_copy_at_once(held: Held, tmp_path: Path) -> None:
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    expected = digests_of(model, optimizer)
    saver = Checkpointer(held, "run")
    assert saver.async_save(1, model, optimizer, {}, lazy=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    held.go.set()
    assert saver.wait()
    assert saved(LocalStorage(tmp_path)) == {1: expected}


def test_one_save_at_a_time_and_the_next_is_skipped(held: Held, tmp_path: Path) -> None:
    model, optimizer = small_model()
    saver = Checkpointer(held, "run")
    train_step(model, optimizer, 1)
    assert saver.async_save(1, model, optimizer, {})
    assert held.arrived.wait(30)
    assert saver.is_busy
    assert saver.async_save(2, model, optimizer, {})
    held.go.set()
    assert saver.wait()
    assert saver.async_save(3, model, optimizer, {})
    assert saver.save(4, model, optimizer, {}), "waits for the one in flight"
    saver.flush()
    assert [(event["step"], event["in_flight"]) for event in events(held, "save-skipped")] == [(2, 1)]
    assert sorted(saved(LocalStorage(tmp_path))) == [1, 3, 4]
    assert [event["step"] for event in events(held, "save")] == [1, 3, 4]


def test_a_failure_in_the_background_is_raised_and_told(held: Held) -> None:
    model, optimizer = small_model()
    saver = Checkpointer(held, "run")
    train_step(model, optimizer, 1)
    held.failure = StorageError("the disk is gone", hint="look for it")
    assert saver.async_save(1, model, optimizer, {})
    assert held.arrived.wait(30)
    assert not saver.has_failed_or_superseded
    held.go.set()
    while not saver.has_failed_or_superseded:
        train_step(model, optimizer, 2)
    with pytest.raises(StorageError, match="the disk is gone") as caught:
        saver.async_save(2, model, optimizer, {})
    assert caught.value.hint == "look for it"
    held.failure = None
    assert saver.save(3, model, optimizer, {}), "the attempt may go on"
    saver.flush()
    assert [event["step"] for event in events(held, "save-failed")] == [1]


def test_superseded_in_the_background(held: Held) -> None:
    model, optimizer = small_model()
    saver = Checkpointer(held, "run", launch="old")
    train_step(model, optimizer, 1)
    assert saver.async_save(1, model, optimizer, {})
    assert held.arrived.wait(30)
    Checkpointer(held, "run", launch="new")
    held.go.set()
    assert saver.wait() is False
    assert saver.superseded
    assert saver.async_save(2, model, optimizer, {}) is False
    assert saver.save(2, model, optimizer, {}) is False
    assert saver.wait() is False


def test_memory_is_taken_once(tmp_path: Path) -> None:
    model, optimizer = small_model(width=64)
    train_step(model, optimizer, 1)
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    saver.reserve(model, optimizer)
    buffer = saver._staging._buffer
    place, num_bytes = buffer.data_ptr(), sum(tensor.nbytes for tensor in tensors_of(model, optimizer))
    assert num_bytes <= buffer.numel() <= num_bytes + 64 * 16
    del buffer
    for step in range(1, 4):
        assert saver.async_save(step, model, optimizer, {})
        assert saver.wait()
    assert saver._staging._buffer.data_ptr() == place


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.state_dict().values(), *states]


def test_a_copy_that_does_not_fit_is_refused_before_anything_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    monkeypatch.setattr(snapshot, "free_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="and 1,000 bytes are free") as caught:
        saver.reserve(model, optimizer)
    assert "checkpoint.overlap: false" in caught.value.hint
    with pytest.raises(ConfigError):
        saver.async_save(1, model, optimizer, {})
    assert saver.save(1, model, optimizer, {}), "which needs no copy"


def test_free_memory_is_what_the_machine_says() -> None:
    assert 10 * 2**20 < snapshot.free_bytes() < 2**50


def test_no_fence_stays_behind(tmp_path: Path) -> None:
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    before = len(_global_optimizer_pre_hooks)
    for step in range(1, 4):
        saver.async_save(step, model, optimizer, {})
        saver.wait()
    assert len(_global_optimizer_pre_hooks) == before
