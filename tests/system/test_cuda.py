"""The way back on a GPU: killed and resumed equals uninterrupted there too. Needs one; about a minute on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.save.staging import StagingBuffer
from outlast.checkpointing.state.shards import local_shard
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.in_place_group import in_place_group
from tests.support.groups.worker_group import digests, fault, losses, resumed, run_group
from tests.support.small_model import digests_of
from tests.system.test_kill_matrix import LLAMA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

OVERLAPPED = {"checkpoint": {"overlap": True, "keep_best": 1}}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32": (1, {}, {}),
    "bf16": (1, {}, {"precision": "bf16"}),
    "fp16": (1, {}, {"precision": "fp16", "loss_scale": 2.0**30}),
    "llama": (1, LLAMA, {"precision": "bf16"}),
    "sgd": (1, {}, {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}),
    "recomputed": (1, {}, {"gradient_checkpointing": True}),
    "compiled": (1, LLAMA, {"compile": True, "precision": "bf16"}),
    "elastic": (1, {"exactness": "elastic"}, {}),
    "two-ranks": (2, {}, {"precision": "bf16"}),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(
    case: str, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """A save in the background is struck, so that pinned buffers, the side stream and the fence all take part."""
    size, sections, train = CASES[case]
    settings = {"sections": {**sections, **OVERLAPPED}, "eval_every": 3, **train}
    undisturbed, struck = f"cuda-{case}", f"cuda-{case}-struck"
    strike = fault(FaultPoint.WHILE_WRITING, 6, size - 1, FaultAction.SIGKILL, tmp_path)
    limit_s = 300.0

    def ended(run: str, **more: Any) -> list[Any]:
        found = run_group(assign(run, **settings, **more), storage, size, limit_s=limit_s, device="cuda:0")
        return [item.outcome for item in found]

    assert ended(undisturbed) == [Outcome.DONE] * size
    assert None in ended(struck, faults=(strike,))
    assert Path(strike.record).exists(), "the fault did not fire"
    assert ended(struck, launch="second") == [Outcome.DONE] * size
    assert [event["step"] for event in resumed(storage, struck)] == [3]
    assert digests(storage, struck) == digests(storage, undisturbed)
    assert losses(storage, struck) == losses(storage, undisturbed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_replaced_in_memory(
    rank: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """With gloo, because the ranks share a device."""
    run_group(assign("cuda-quiet", precision="bf16"), storage, 2, limit_s=300.0, device="cuda:0")
    run, strike = f"cuda-in-place-{rank}", fault(FaultPoint.STEP, 7, rank, FaultAction.SIGKILL, tmp_path)
    assignment = assign(run, precision="bf16", faults=(strike,))
    with in_place_group(assignment, storage, 2, num_spares=1, device="cuda:0") as group:
        ended = group.ended(300.0)
    assert Path(strike.record).exists()
    assert sum(item is not None and item.outcome is Outcome.DONE for item in ended) == 2, ended
    assert digests(storage, run) == digests(storage, "cuda-quiet")
    assert losses(storage, run) == losses(storage, "cuda-quiet")


@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="NCCL needs a GPU for each rank and the spare")
def test_a_killed_rank_is_replaced_in_memory_with_nccl(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    strike = fault(FaultPoint.STEP, 7, 1, FaultAction.SIGKILL, tmp_path)
    quiet, struck = assign("nccl-quiet"), assign("nccl-struck", faults=(strike,))
    for assignment, num_lost in ((quiet, 0), (struck, 1)):
        with in_place_group(assignment, storage, 2, num_spares=1, device="cuda:{}", backend="nccl") as group:
            ended = group.ended(300.0)
        assert sum(item is not None and item.outcome is Outcome.DONE for item in ended) == 3 - num_lost, ended
    assert Path(strike.record).exists()
    assert digests(storage, "nccl-struck") == digests(storage, "nccl-quiet")
    assert losses(storage, "nccl-struck") == losses(storage, "nccl-quiet")


def wide(width: int = 4096) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(width, width, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4096, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_next_step_does_not_reach_into_the_copy(tmp_path: Path) -> None:
    """The optimizer's step is queued at once behind a copy of 200 MB, and waits for it on the device."""
    model, optimizer = wide()
    checkpointer = Checkpointer(LocalStorage(tmp_path), "run")
    checkpointer.resume(model, optimizer)
    checkpointer.reserve(model, optimizer)
    for number in range(1, 6):
        before = digests_of(model, optimizer)
        torch.cuda.synchronize()
        assert checkpointer.async_save(number, model, optimizer, {"step": number})
        step(model, optimizer)
        assert checkpointer.wait()
        assert digests_of(model, optimizer) != before
        other, fresh = wide()
        Checkpointer(LocalStorage(tmp_path), "run").resume(other, fresh)
        assert digests_of(other, fresh) == before
        checkpointer = Checkpointer(LocalStorage(tmp_path), "run")
        checkpointer.resume(model, optimizer)
    assert len(read_catalog(LocalStorage(tmp_path), "run").accepted) > 1


def test_state_is_read_to_where_it_belongs(tmp_path: Path) -> None:
    model, optimizer = wide()
    assert Checkpointer(LocalStorage(tmp_path), "run").save(1, model, optimizer, {})
    other, fresh = wide()
    fresh.state.clear()
    Checkpointer(LocalStorage(tmp_path), "run").resume(other, fresh)
    assert {value.device.type for state in fresh.state.values() for value in state.values()} == {"cuda"}
    assert digests_of(other, fresh) == digests_of(model, optimizer)


def test_a_snapshot_takes_no_more_host_memory_than_its_share() -> None:
    share = {"weight": local_shard(torch.ones(3 * 2**20 + 1, device="cuda"))}
    snapshot = StagingBuffer()
    snapshot.reserve(share)
    assert snapshot._buffer.is_pinned()
    assert snapshot._buffer.numel() == 12 * 2**20 + 64
