"""How steps are computed: fp16 with its loss scale, recomputed activations, compiled kernels; all exact over a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import LOOP_STATE, checkpoint_dir
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import TrainSettings
from outlast.trainers.loop.compile_and_recompute import prepare_module
from outlast.trainers.loop.loss_scale import apply_gradients, load_scaler, make_scaler, scaler_state
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.conftest import Reference
from tests.support.groups.worker_group import digests, fault, losses, newest, run_group

#: The first scale overflows for some steps, the window makes it grow again and overflow again.
FP16 = {"precision": "fp16", "loss_scale": 2.0**24, "loss_scale_window": 2}
CPU = torch.device("cpu")


def settings(**train: Any) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 10, **train})


def skipped(storage: LocalStorage, run: str) -> dict[int, float]:
    """The scale after each step that was left out; a step that was done twice was left out twice."""
    found: dict[int, float] = {}
    for _, event in run_events(RunStore(storage, run)):
        if event["event"] == "step-skipped":
            assert found.setdefault(event["step"], event["scale"]) == event["scale"]
    return found


def loop_state(storage: LocalStorage, run: str) -> dict[str, Any]:
    directory = checkpoint_dir(run, newest(storage, run).ref)
    state: dict[str, Any] = json.loads(read_bytes(storage, f"{directory}/{LOOP_STATE}"))
    return state


def killed_equals_uninterrupted(
    run: str, size: int, step: int, assign: Callable[..., Assignment], storage: LocalStorage, folder: Path, **train: Any
) -> None:
    """`run` is the uninterrupted one."""
    killed = f"{run}-killed-{step}"
    strike = fault(FaultPoint.STEP, step, size - 1, FaultAction.SIGKILL, folder)
    run_group(assign(killed, faults=(strike,), **train), storage, size, limit_s=240)
    assert Path(strike.record).exists()
    ended = run_group(assign(killed, launch="second", **train), storage, size, limit_s=240)
    assert [item.outcome for item in ended] == [Outcome.DONE] * size
    assert digests(storage, killed) == digests(storage, run)
    assert losses(storage, killed) == losses(storage, run)
    assert skipped(storage, killed) == skipped(storage, run)
    assert loop_state(storage, killed) == loop_state(storage, run)


# -- fp16 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_overflows_changes_nothing_but_the_scale(kind: Any, fused: bool) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = kind([weight], lr=0.1, fused=fused)
    scaler = make_scaler(settings(**FP16), CPU)
    for largest, applied in ((torch.inf, False), (torch.nan, False), (1.0, True)):
        before, scale = weight.detach().clone(), scaler.get_scale()
        scaler.scale((weight * largest).sum()).backward()
        scaler.unscale_(optimizer)
        assert apply_gradients(optimizer, scaler) is applied
        assert scaler.get_scale() == (scale if applied else scale / 2)
        assert torch.equal(weight.detach(), before) is not applied
        optimizer.zero_grad()


def test_a_scalers_state_comes_back() -> None:
    scaler = make_scaler(settings(**FP16), CPU)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for largest in (torch.inf, 1.0):
        scaler.scale((weight * largest).sum()).backward()
        scaler.unscale_(optimizer)
        apply_gradients(optimizer, scaler)
        optimizer.zero_grad()
    state = json.loads(json.dumps(scaler_state(scaler)))
    assert state == {"scale": 2.0**23, "_growth_tracker": 1}
    other = make_scaler(settings(**FP16), CPU)
    load_scaler(other, state)
    assert scaler_state(other) == state
    other.scale(torch.ones(1))
    assert (other.get_scale(), scaler_state(other)) == (2.0**23, state)
    assert scaler_state(make_scaler(settings(), CPU)) == {}


def test_overflows_are_exact_over_a_kill(
    assign: Callable[..., Assignment], storage: LocalStorage, reference: Callable[[int], Reference], tmp_path: Path
) -> None:
    """Some steps are left out before the kill and some after it, and the resume falls into a growing window."""
    ended = run_group(assign("fp16", **FP16), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    left_out = skipped(storage, "fp16")
    assert any(step <= 3 for step in left_out)
    assert any(step > 6 for step in left_out)
    assert len(left_out) < 10
    assert loop_state(storage, "fp16")["scaler"]["scale"] < 2.0**24
    assert losses(storage, "fp16")[1] == pytest.approx(reference(2).losses[1], rel=1e-2)
    assert losses(storage, "fp16") != reference(2).losses
    killed_equals_uninterrupted("fp16", 2, 7, assign, storage, tmp_path, **FP16)


@pytest.mark.faults
@pytest.mark.parametrize("step", [1, 4, 8])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_overflows_are_exact_whatever_the_optimizer(
    optimizer: str, size: int, step: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """An unfused optimizer has no state at all before the first step that counts. About 5 s each."""
    run, train = f"fp16-{optimizer}-{size}", {**FP16, "optimizer": optimizer, "lr": 1e-3}
    if not read_catalog(storage, run).accepted:
        run_group(assign(run, **train), storage, size)
    assert 1 in skipped(storage, run)
    killed_equals_uninterrupted(run, size, step, assign, storage, tmp_path, **train)


# -- recomputed activations --------------------------------------------------------------------------------------------


def test_activations_are_recomputed_to_the_same_bits(
    assign: Callable[..., Assignment], storage: LocalStorage, reference: Callable[[int], Reference], tmp_path: Path
) -> None:
    """With dropout on: the generators are put back before a layer is computed again."""
    ended = run_group(assign("recomputed", gradient_checkpointing=True), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert digests(storage, "recomputed") == reference(2).digests
    killed_equals_uninterrupted("recomputed", 2, 5, assign, storage, tmp_path, gradient_checkpointing=True)


def test_less_is_kept_when_activations_are_recomputed(assign: Callable[..., Assignment], storage: LocalStorage) -> None:
    assert num_kept("recomputed-not", False, assign, storage) > 2 * num_kept("recomputed-yes", True, assign, storage)


def num_kept(run: str, recompute: bool, assign: Callable[..., Assignment], storage: LocalStorage) -> int:
    """How many tensors a forward pass keeps for its backward pass."""
    assignment = assign(run, gradient_checkpointing=recompute)
    tokenizer = assignment.prepared.tokenizer(storage)
    task = CausalLM(assignment.config.data, tokenizer, assignment.prepared.facts)
    model, _ = build_model(assignment.config.model, task, tokenizer, 0, fresh=True)
    prepare_module(model, assignment.config.train, RankGroup(), CPU)
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss_sum(model.train(), task.collate(assignment.prepared.split(storage, "train").take(range(4)), range(4)))
    return len(kept)


def test_a_model_that_cannot_recompute_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear cannot recompute its activations"):
        prepare_module(nn.Linear(2, 2), settings(gradient_checkpointing=True), RankGroup(), CPU)


# -- compiled kernels --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
def test_a_machine_without_a_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/such/compiler",))
    with pytest.raises(PreflightError, match=r"torch\.compile does not work on this machine") as caught:
        prepare_module(nn.Linear(2, 2), settings(compile=True), RankGroup(), CPU)
    assert "train.compile: false" in caught.value.hint


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 2])
def test_compiled_runs_are_exact_over_a_kill(
    size: int,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    reference: Callable[[int], Reference],
    tmp_path: Path,
) -> None:
    """About a minute and a half. Dropout draws other masks when it is compiled, and names stay plain."""
    run = f"compiled-{size}"
    ended = run_group(assign(run, compile=True), storage, size, limit_s=240)
    assert [item.outcome for item in ended] == [Outcome.DONE] * size
    assert losses(storage, run) == pytest.approx(reference(size).losses, rel=0.05)
    assert losses(storage, run) != reference(size).losses, "it was compiled"
    assert digests(storage, run).keys() == reference(size).digests.keys()
    killed_equals_uninterrupted(run, size, 5, assign, storage, tmp_path, compile=True)
