"""State that is spread over ranks: saved by some number of them, loaded by another, the same to the last bit."""

from __future__ import annotations

import json
import weakref
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.format.safetensors import TensorSpec
from outlast.checkpointing.restore.verify import tensor_digest, tensor_digests, verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.save import writer
from outlast.checkpointing.save.writer import weight_files
from outlast.checkpointing.state.named_weights import named_weights
from outlast.checkpointing.state.optimizer_state import optimizer_tensors
from outlast.checkpointing.state.shards import LocalShard, Region
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.groups.ranks import on_ranks

KINDS = ["ddp", "fsdp", "fsdp-nested", "fsdp-compiled", "fsdp-mixed"]


class Net(nn.Module):
    """Dimensions that no number of ranks divides, tied embeddings, frozen weights, a norm with counters, an empty
    buffer, a scalar one, an integer one, half precision."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.inner = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 5))
        self.one = nn.Linear(5, 1)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.brief = nn.Linear(5, 3).to(torch.bfloat16)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("scale", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("numbers", torch.arange(3, dtype=torch.int32))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.inner(self.norm(self.embed(numbers))))
        half = self.brief(hidden.to(torch.bfloat16)).float()
        result: torch.Tensor = (
            self.head(hidden).sum() * self.scale.float() + half.sum() + self.one(hidden).square().sum()
        )
        return result


def parallel(model: nn.Module, kind: str) -> nn.Module:
    if kind == "plain":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    assert isinstance(model, Net)
    if kind == "fsdp-nested":
        fully_shard(model.inner)
    fully_shard(model.brief)  # one dtype a group
    fully_shard(model)
    if kind == "fsdp-compiled":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if kind == "fsdp-mixed":
        model.inner[0] = torch.compile(model.inner[0], backend="eager")  # type: ignore[assignment]
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    found = {**named_weights(model), **optimizer_tensors(model, optimizer)}
    return {name: tensor_digest(whole(tensor)) for name, tensor in found.items()}


def make(seed: int, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = parallel(Net(seed), kind)
    return model, torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    optimizer.zero_grad()
    model(torch.randint(7, (6,))).backward()
    optimizer.step()


def save(folder: str, kind: str, max_shard_bytes: int) -> dict[str, str]:
    """Three steps, one save in the background that a fourth step must not disturb."""
    model, optimizer = make(1, kind)
    saver = Checkpointer(LocalStorage(Path(folder)), "run", max_shard_bytes=max_shard_bytes)
    assert saver.resume(model, optimizer) is None
    for number in range(3):
        step(model, optimizer, number)
    expected = state_digests(model, optimizer)
    assert saver.async_save(3, model, optimizer, {"step": 3})
    step(model, optimizer, 3)
    assert saver.wait()
    assert state_digests(model, optimizer) != expected
    return expected


def load(folder: str, kind: str, save_again: bool) -> dict[str, str]:
    model, optimizer = make(2, kind)
    saver = Checkpointer(LocalStorage(Path(folder)), "run", launch="second")
    assert saver.resume(model, optimizer) == {"step": 3}
    found = state_digests(model, optimizer)
    if save_again:
        step(model, optimizer, 3)
        assert saver.save(4, model, optimizer, {"step": 4})
        again, moments = make(3, kind)
        Checkpointer(LocalStorage(Path(folder)), "run", launch="third").resume(again, moments)
        assert state_digests(again, moments) == state_digests(model, optimizer)
    return found


CASES = [("fsdp", 1, "fsdp", 2), ("fsdp", 2, "fsdp", 3), ("fsdp", 3, "fsdp", 1), ("fsdp", 3, "fsdp", 2)]
CASES += [("ddp", 2, "fsdp", 3), ("fsdp", 3, "ddp", 2), ("ddp", 1, "ddp", 3), ("ddp", 3, "plain", 1)]
CASES += [("plain", 1, "fsdp", 3), ("fsdp-nested", 2, "fsdp", 3), ("fsdp-compiled", 2, "fsdp-nested", 3)]
CASES += [("fsdp-mixed", 3, "fsdp", 2), ("fsdp", 2, "fsdp-mixed", 3)]


@pytest.mark.parametrize(
    ("kind", "size", "other", "other_size"), CASES, ids=[f"{a}-{m}-to-{b}-{n}" for a, m, b, n in CASES]
)
def test_saved_on_some_ranks_and_loaded_on_others(
    kind: str, size: int, other: str, other_size: int, tmp_path: Path
) -> None:
    saved = on_ranks(size, save, str(tmp_path), kind, 2**60)
    assert all(item == saved[0] for item in saved)
    storage = LocalStorage(tmp_path)
    [manifest] = read_catalog(storage, "run").accepted
    directory = checkpoint_dir("run", manifest.ref)
    assert tensor_digests(storage, directory, manifest) == saved[0]
    assert verify(storage, directory, manifest) == []

    loaded = on_ranks(other_size, load, str(tmp_path), other, True)
    assert all(item == saved[0] for item in loaded)


def test_weights_lie_whole_in_files_of_a_limited_size(tmp_path: Path) -> None:
    """As transformers names and indexes them, and the safetensors library reads them."""
    expected, _ = on_ranks(2, save, str(tmp_path), "fsdp", 300)
    [manifest] = read_catalog(LocalStorage(tmp_path), "run").accepted
    folder = tmp_path / checkpoint_dir("run", manifest.ref)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("model*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    found = {name: (file, tensor) for file in files for name, tensor in load_file(folder / file).items()}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values())
    assert {name: tensor_digest(tensor) for name, (_, tensor) in found.items()}.items() <= expected.items()
    assert "head.weight" not in found, "tied to the embedding"
    loaded = on_ranks(3, load, str(tmp_path), "fsdp", False)
    assert all(item == expected for item in loaded)


def test_frozen_weights_are_in_the_model_alone(tmp_path: Path) -> None:
    on_ranks(2, save, str(tmp_path), "fsdp", 2**60)
    folder = next(tmp_path.glob("run/attempts/*/checkpoint-3"))
    state = [name for path in folder.glob("training_state/*.safetensors") for name in load_file(path)]
    assert "frozen.weight" in load_file(folder / "model.safetensors")
    assert {name.rsplit("/", 1)[0] for name in state}.isdisjoint({"frozen.weight", "frozen.bias"})
    assert len(state) > 10


class Wide(nn.Module):
    """Eight weights of 4 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(8))


def save_wide(folder: str) -> int:
    """The most bytes that writing held at a time in tensors of its own making, on this rank."""
    model = Wide()
    fully_shard(model)
    counted = _CountingTorch()
    writer.torch = counted  # type: ignore[assignment, attr-defined]
    assert Checkpointer(LocalStorage(Path(folder)), "wide").save(1, model, None, {})
    return counted.peak


class _CountingTorch:
    """torch, with an eye on what `torch.empty` makes."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        tensor = torch.empty(*shape, **options)
        self.alive += tensor.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.nbytes)
        return tensor

    def _gone(self, num_bytes: int) -> None:
        self.alive -= num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_no_more_than_two_weights_are_gathered_at_a_time(tmp_path: Path) -> None:
    peak, *_ = on_ranks(3, save_wide, str(tmp_path))
    assert 0 < peak <= 2 * 4 * 2**20 + 4096


@given(st.data())
def test_boxes_intersect_as_sets_do(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    boxes = []
    for _ in range(2):
        begin = [data.draw(st.integers(0, n - 1)) for n in shape]
        boxes.append(
            Region(tuple(begin), tuple(data.draw(st.integers(0, n - b)) for n, b in zip(shape, begin, strict=True)))
        )
    marks = [torch.zeros(shape, dtype=torch.bool) for _ in boxes]
    for box, mark in zip(boxes, marks, strict=True):
        box.of(mark, Region.whole(tuple(shape))).fill_(True)
    both = marks[0] & marks[1]
    shared = boxes[0].intersection(boxes[1])
    assert both.sum().item() == (prod(shared.shape) if shared else 0)
    if shared:
        assert shared.of(both, Region.whole(tuple(shape))).all()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (100, {"model.safetensors": ["a", "b", "c"]}),
        (
            8,
            {
                "model-00001-of-00003.safetensors": ["a"],
                "model-00002-of-00003.safetensors": ["b"],
                "model-00003-of-00003.safetensors": ["c"],
            },
        ),
        (20, {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}),
    ],
)
def test_weights_are_split_in_order(limit: int, expected: dict[str, list[str]]) -> None:
    specs = {
        "a": TensorSpec(torch.float32, (2,)),
        "b": TensorSpec(torch.float32, (3,)),
        "c": TensorSpec(torch.float32, (40,)),
    }
    specs["c"] = TensorSpec(torch.float16, (8,))
    assert weight_files(specs, limit) == expected


@given(st.data())
def test_the_slices_of_shards_are_the_slice_of_the_whole(data: st.DataObject) -> None:
    """As of stacked experts, of which each is a weight in the file; shards end anywhere in the first dimension."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    cut: list[int | slice] = []
    for length in shape:
        begin = data.draw(st.integers(0, length - 1))
        cut.append(begin if data.draw(st.booleans()) else slice(begin, data.draw(st.integers(begin + 1, length))))
    whole = torch.arange(prod(shape)).view(shape)
    found = torch.full_like(whole[tuple(cut)], -1)
    ends = sorted({0, shape[0], *data.draw(st.lists(st.integers(0, shape[0]), max_size=3))})
    for begin, end in pairwise(ends):
        region = Region((begin, *[0] * (len(shape) - 1)), (end - begin, *shape[1:]))
        part = LocalShard(whole[begin:end], region, shape, is_sharded=True).cut(tuple(cut))
        assert (part.shape, part.region.shape) == (tuple(found.shape), tuple(part.tensor.shape))
        if part.is_copy:
            continue
        part.region.of(found, Region.whole(part.shape)).copy_(part.tensor)
    assert torch.equal(found, whole[tuple(cut)])
