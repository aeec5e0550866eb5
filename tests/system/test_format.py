"""The page of the checkpoint format is enough: a program written from it alone reads a run as outlast does."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format.layout import MANIFEST, checkpoint_dir
from outlast.checkpointing.format.manifest import FORMAT
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Parallel
from tests.conftest import Reference
from tests.support.groups.worker_group import run_group, with_parallel
from tests.support.small_model import small_model, train_step

RUN = "run"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reader() -> Any:
    spec = importlib.util.spec_from_file_location("read_run", ROOT / "examples" / "read_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not any(name.startswith("outlast") for name in vars(module))
    return module


KINDS = {"float32": "torch.float32", "int64": "torch.int64"}


def assert_same(reader: Any, storage: LocalStorage, run: str) -> None:
    """The accepted checkpoints, the newest whole one among them, and the digests of its tensors."""
    place = storage.path(run)
    said = [(item["attempt"], item["step"]) for item in reader.accepted(place)]
    seen = {(str(item.ref.attempt), item.ref.step): item for item in read_catalog(storage, run).accepted}
    assert said == list(seen)
    manifest, _ = reader.resume_point(place)
    ours = seen[manifest["attempt"], manifest["step"]]
    theirs = {
        name: hashlib.sha256(f"{KINDS[tensor.dtype.name]}{list(tensor.shape)}".encode() + tensor.tobytes()).hexdigest()
        for name, tensor in reader.load(place, manifest).items()
    }
    assert theirs == tensor_digests(storage, checkpoint_dir(run, ours.ref), ours)
    if run == RUN:
        model, optimizer = small_model(seed=9)
        state = Checkpointer(storage, run).resume(model, optimizer)
        assert state == {"step": manifest["step"]}, "a next attempt resumes from another one"


def test_a_run_of_two_ranks(reader: Any, storage: LocalStorage, reference: Callable[[int], Reference]) -> None:
    assert_same(reader, storage, reference(2).run)


def test_state_that_is_spread_over_ranks(reader: Any, storage: LocalStorage, assign: Callable[..., Assignment]) -> None:
    run_group(with_parallel(assign("format-fsdp", steps=2), Parallel.FSDP), storage, 2)
    manifest, _ = reader.resume_point(storage.path("format-fsdp"))
    assert manifest["world_size"] == 2
    assert_same(reader, storage, "format-fsdp")


@pytest.fixture
def begun(tmp_path: Path) -> tuple[LocalStorage, Callable[..., Checkpointer]]:
    storage = LocalStorage(tmp_path)

    def attempt(*steps: int) -> Checkpointer:
        model, optimizer = small_model()
        saver = Checkpointer(storage, RUN, retention=Retention(3))
        saver.resume(model, optimizer)
        for step in steps:
            train_step(model, optimizer, step)
            assert saver.save(step, model, optimizer, {"step": step})
        return saver

    return storage, attempt


def test_attempts_that_follow_each_other(reader: Any, begun: Any) -> None:
    storage, attempt = begun
    attempt(1, 2)
    attempt()
    attempt(3, 4)
    (storage.path("run/attempts") / "0009-zz").mkdir()
    (storage.path("run/attempts") / "notes").mkdir()
    assert_same(reader, storage, RUN)


def test_a_zombie_does_not_count(reader: Any, begun: Any) -> None:
    storage, attempt = begun
    zombie = attempt(1, 2)
    attempt(3)
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    assert not zombie.save(9, model, optimizer, {"step": 9})
    assert [item["step"] for item in reader.accepted(storage.path(RUN))] == [3, 2, 1]
    assert_same(reader, storage, RUN)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "extra", "manifest"])
def test_what_is_damaged_is_passed_over(reader: Any, begun: Any, damage: str) -> None:
    storage, attempt = begun
    saver = attempt(1, 2)
    place = storage.path(checkpoint_dir(RUN, saver.accepted[0].ref))
    weights = place / "model.safetensors"
    match damage:
        case "flip":
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "remove":
            weights.unlink()
        case "extra":
            (place / "pytorch_model.bin").write_bytes(b"")
        case "manifest":
            (place / MANIFEST).write_bytes((place / MANIFEST).read_bytes().replace(b'"step": 2', b'"step": 3'))
    manifest, _ = reader.resume_point(storage.path(RUN))
    assert manifest["step"] == 1
    assert_same(reader, storage, RUN)


def test_the_page_speaks_of_this_format() -> None:
    assert f"\nFormat {FORMAT}. " in (ROOT / "docs" / "reference" / "checkpoint-format.md").read_text()
