"""Parts of a tensor are used only if they are together exactly that tensor: no overlap, no gap, nothing outside."""

from __future__ import annotations

import ast
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import DamagedError, NoCheckpointError
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef, checkpoint_dir, optimizer_shard
from outlast.checkpointing.format.manifest import FileEntry, Manifest, ManifestError
from outlast.checkpointing.format.safetensors import encode
from outlast.checkpointing.restore.reader import read_tensors, read_verified
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.save.writer import write_file
from outlast.checkpointing.state.shards import Region, cover_fault
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import small_model, train_step

REF = CheckpointRef(1, AttemptId(1, "abcd"))
Part = tuple[list[int], list[int]]  # shape and offset


def checkpoint(storage: LocalStorage, files: dict[str, Any], shards: dict[str, Any]) -> Manifest:
    """One whose files hold these tensors, with `shards` in every header."""
    chunks = {name: encode(tensors, {"shards": json.dumps(shards[name])}) for name, tensors in files.items()}
    entries = tuple(write_file(storage, "checkpoint", name, data) for name, data in chunks.items())
    return Manifest(REF, (), entries, 1, {}, 0.0, "")


def read_parts(folder: Path, shape: list[int], parts: list[Part]) -> torch.Tensor:
    """The tensor that these parts, of ones, are read as."""
    names = [optimizer_shard(rank, len(parts)) for rank in range(len(parts))]
    files = {name: {"w/m": torch.ones(part)} for name, (part, _) in zip(names, parts, strict=True)}
    shards = {name: {"w/m": [shape, offset]} for name, (_, offset) in zip(names, parts, strict=True)}
    storage = LocalStorage(folder)
    return read_tensors(storage, "checkpoint", checkpoint(storage, files, shards))["w/m"]


WHOLE: dict[str, tuple[list[int], list[Part]]] = {
    "rows": ([4, 2], [([2, 2], [0, 0]), ([2, 2], [2, 0])]),
    "columns": ([4, 2], [([4, 1], [0, 1]), ([4, 1], [0, 0])]),
    "boxes": ([4, 2], [([2, 2], [0, 0]), ([2, 1], [2, 0]), ([2, 1], [2, 1])]),
    "an empty part": ([2], [([0], [0]), ([2], [0])]),
    "nothing": ([0, 3], [([0, 3], [0, 0]), ([0, 3], [0, 0])]),
    "a scalar": ([], [([], [])]),
}
BROKEN: dict[str, tuple[list[int], list[Part], str]] = {
    "overlap and gap": ([4, 2], [([2, 2], [0, 0]), ([2, 2], [1, 0])], "overlap"),
    "twice the same": ([4, 2], [([2, 2], [0, 0]), ([2, 2], [0, 0])], "overlap"),
    "two wholes": ([4, 2], [([4, 2], [0, 0]), ([4, 2], [0, 0])], "overlap"),
    "crossing": ([4, 4], [([4, 2], [0, 0]), ([2, 4], [1, 0])], "overlap"),
    "two scalars": ([], [([], []), ([], [])], "overlap"),
    "a gap": ([4, 2], [([2, 2], [0, 0]), ([1, 2], [2, 0])], "2 of its 8 elements are in no part"),
    "beyond the end": ([4, 2], [([2, 2], [0, 0]), ([2, 2], [3, 0])], "is not within"),
    "too large": ([2, 2], [([4, 2], [0, 0])], "is not within"),
    "other dimensions": ([4], [([2, 2], [0, 0])], "is not of 1 dimensions"),
    "offset of other dimensions": ([4, 1], [([4, 1], [0])], "is not of 2 dimensions"),
    "a shape beyond all memory": ([2**62, 2], [([2, 2], [0, 0])], "in no part"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_parts_that_are_exactly_a_tensor_are_read(name: str, tmp_path: Path) -> None:
    shape, parts = WHOLE[name]
    assert torch.equal(read_parts(tmp_path, shape, parts), torch.ones(shape))


@pytest.mark.parametrize("name", BROKEN)
def test_other_parts_are_damage(name: str, tmp_path: Path) -> None:
    shape, parts, message = BROKEN[name]
    with pytest.raises(DamagedError, match=f"tensor w/m: .*{message}"):
        read_parts(tmp_path, shape, parts)


def test_parts_of_several_types_or_shapes_are_damage(tmp_path: Path) -> None:
    names = [optimizer_shard(rank, 2) for rank in range(2)]
    storage = LocalStorage(tmp_path)
    for tensors, shapes in (([torch.ones(2), torch.ones(2).half()], [4, 4]), ([torch.ones(2), torch.ones(2)], [4, 5])):
        files = {name: {"w/m": item} for name, item in zip(names, tensors, strict=True)}
        shards = {name: {"w/m": [[size], [2 * at]]} for at, (name, size) in enumerate(zip(names, shapes, strict=True))}
        with pytest.raises(DamagedError, match="its parts differ in type or shape"):
            read_tensors(storage, "checkpoint", checkpoint(storage, files, shards))


@pytest.mark.parametrize(
    "shards",
    ["[]", "1", "{", "[" * 100_000, '{"w/m": 1}', '{"w/m": [[2]]}', '{"w/m": [[2], ["0"]]}', '{"w/m": [[2], [-1]]}',
     '{"w/m": [[2.0], [0]]}', '{"w/m": [[true], [0]]}', '{"w/m": [[9223372036854775808], [0]]}'],
)  # fmt: skip
def test_shards_that_are_no_shards_are_damage(shards: str, tmp_path: Path) -> None:
    storage, name = LocalStorage(tmp_path), optimizer_shard(0, 1)
    entry = write_file(storage, "checkpoint", name, encode({"w/m": torch.ones(2)}, {"shards": shards}))
    with pytest.raises(DamagedError, match=f"{name}: "):
        read_tensors(storage, "checkpoint", Manifest(REF, (), (entry,), 1, {}, 0.0, ""))


@given(st.data())
def test_a_cover_is_what_marks_every_element_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    regions = [
        Region(
            tuple(data.draw(st.integers(0, max(0, n - 1))) for n in shape),
            tuple(data.draw(st.integers(0, n)) for n in shape),
        )
        for _ in range(data.draw(st.integers(0, 4)))
    ]
    is_inside = all(
        at + n <= m
        for item in regions
        if prod(item.shape)
        for at, n, m in zip(item.offset, item.shape, shape, strict=True)
    )
    marks = torch.zeros(shape, dtype=torch.int64)
    if is_inside:
        for item in regions:
            if prod(item.shape):
                item.of(marks, Region.whole(shape)).add_(1)
    assert (cover_fault(shape, regions) is None) is (is_inside and bool((marks == 1).all()))


def test_a_thousand_parts_take_no_time_to_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded by any one dimension, a part is compared with its neighbours only."""
    compared = 0
    intersection = Region.intersection

    def counted(self: Region, other: Region) -> Region | None:
        nonlocal compared
        compared += 1
        return intersection(self, other)

    monkeypatch.setattr(Region, "intersection", counted)
    for dim in range(2):
        regions = [Region((n, 0) if dim == 0 else (0, n), (1, 9) if dim == 0 else (9, 1)) for n in range(1000)]
        assert cover_fault((1000, 9) if dim == 0 else (9, 1000), reversed(regions)) is None
    assert compared <= 4 * 1000


def damaged(folder: Path, change: Any) -> list[str]:
    """What `resume` finds in a checkpoint whose optimizer state is changed, with digests that fit."""
    storage = LocalStorage(folder)
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    assert Checkpointer(storage, "run").save(1, model, optimizer, {"step": 1})
    [manifest] = read_catalog(storage, "run").accepted
    directory, name = checkpoint_dir("run", manifest.ref), optimizer_shard(0, 1)
    tensors, metadata = change(read_tensors(storage, directory, manifest))
    entry = write_file(storage, directory, name, encode(tensors, metadata))
    files = tuple(entry if item.path == name else item for item in manifest.files)
    body = Manifest(manifest.ref, (), files, 1, {}, 0.0, "", manifest.extra)
    storage.put(f"{directory}/manifest.json", [body.to_json()])
    model, optimizer = small_model(seed=1)
    before = [item.clone() for item in model.parameters()]
    with pytest.raises(NoCheckpointError) as caught:
        Checkpointer(storage, "run").resume(model, optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    return caught.value.message.splitlines()


def test_state_that_shadows_a_weight_is_damage(tmp_path: Path) -> None:
    found = damaged(tmp_path, lambda tensors: ({"0.weight": tensors["0.weight"]}, {}))
    assert "model.safetensors: 0.weight is also the name of optimizer state" in found[-1]


@pytest.mark.parametrize("text", ["{", "{}", '{"class": "AdamW"}', '{"class": "AdamW", "groups": [1]}', "[" * 100_000])
def test_a_description_of_no_optimizer_is_damage(text: str, tmp_path: Path) -> None:
    found = damaged(tmp_path, lambda tensors: ({}, {"optimizer": text}))
    assert optimizer_shard(0, 1) in found[-1]


def test_a_file_with_too_few_digests_is_damage(tmp_path: Path) -> None:
    """Else its last blocks would not be read, and the memory in their place passes as their bytes."""
    storage = LocalStorage(tmp_path)
    entry = write_file(storage, "checkpoint", "a", [b"123"])
    for blocks in ((), entry.blocks * 2):
        with pytest.raises(ManifestError, match=f"a has 3 bytes and {len(blocks)} digests of blocks"):
            read_verified(storage, "checkpoint", FileEntry("a", 3, entry.xxh3_128, blocks))


def test_no_assertion_guards_data() -> None:
    """`python -O` removes them."""
    room = Path(__file__).parents[3] / "checkpointing"
    found = [
        f"{path.relative_to(room)}:{node.lineno}"
        for path in room.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
