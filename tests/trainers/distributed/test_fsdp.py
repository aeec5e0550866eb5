"""`scale.parallel: fsdp`: a sharded model trains, is killed, resumes exactly, and is published as full weights."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.restore.reader import read_tensors
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import load_run
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Exactness, Parallel
from outlast.trainers.distributed.fsdp import blocks, shard, whole
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.ranks import on_ranks
from tests.support.groups.worker_group import (
    StopAt,
    digests,
    fault,
    losses,
    newest,
    resumed,
    run_group,
    tiny_config,
    with_parallel,
)

Assign = Callable[..., Assignment]


@pytest.fixture
def shard_assignment(assign: Assign) -> Assign:
    """As `assign`, with the model sharded over the ranks."""
    return lambda name, **options: with_parallel(assign(name, **options), Parallel.FSDP)


def run_to_the_end(assignment: Assignment, storage: LocalStorage, size: int) -> None:
    assert [item.outcome for item in run_group(assignment, storage, size)] == [Outcome.DONE] * size


def evaluations(storage: LocalStorage, run: str) -> dict[int, float]:
    return {
        event["step"]: event["eval_loss"] for _, event in run_events(RunStore(storage, run)) if event["event"] == "eval"
    }


@pytest.mark.parametrize(
    ("size", "train", "overlap"),
    [
        pytest.param(2, {}, False, id="2"),
        pytest.param(3, {}, True, id="3-uneven-overlapped", marks=pytest.mark.faults),
        pytest.param(2, {"precision": "bf16"}, True, id="2-bf16", marks=pytest.mark.faults),
        pytest.param(
            3, {"batch": 10, "micro_batch": 2, "clip": 0.0}, False, id="3-unclipped", marks=pytest.mark.faults
        ),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    size: int, train: dict[str, Any], overlap: bool, shard_assignment: Assign, storage: LocalStorage, tmp_path: Path
) -> None:
    calm, run = f"fsdp-{tmp_path.name}", f"fsdp-{tmp_path.name}-killed"
    sections = {"checkpoint": {"overlap": overlap}}
    run_to_the_end(shard_assignment(calm, sections=sections, **train), storage, size)
    for launch, injected in enumerate(
        [
            fault(FaultPoint.STEP, 4, size - 1, FaultAction.SIGKILL, tmp_path),
            fault(FaultPoint.WHILE_WRITING, 9, 0, FaultAction.SIGKILL, tmp_path),
        ]
    ):
        assignment = shard_assignment(run, faults=(injected,), launch=f"{launch}", sections=sections, **train)
        ended = run_group(assignment, storage, size)
        assert Path(injected.record).exists(), "the fault did not fire"
        assert ended[injected.rank].exit_code == -signal.SIGKILL
    run_to_the_end(shard_assignment(run, launch="last", sections=sections, **train), storage, size)
    assert [event["step"] for event in resumed(storage, run)] == [3, 6]
    assert digests(storage, run) == digests(storage, calm)
    assert losses(storage, run) == losses(storage, calm)
    assert evaluations(storage, run) == evaluations(storage, calm)


@pytest.mark.faults
@pytest.mark.parametrize("size", [2, 3])
def test_fp16_and_clipping_equal_those_of_ddp_and_resume(
    size: int, shard_assignment: Assign, assign: Assign, storage: LocalStorage, tmp_path: Path
) -> None:
    """A rank has the gradients of its shard only, but all must detect the same overflows and compute the same norm."""
    train = {"precision": "fp16", "loss_scale": 2.0**24, "loss_scale_window": 2, "clip": 0.1}
    calm, run = f"fsdp-fp16-{size}", f"fsdp-fp16-{size}-killed"
    run_to_the_end(shard_assignment(calm, **train), storage, size)
    run_to_the_end(assign(f"ddp-fp16-{size}", **train), storage, size)
    assert skipped(storage, calm) == skipped(storage, f"ddp-fp16-{size}") != []
    assert norms(storage, calm) == pytest.approx(norms(storage, f"ddp-fp16-{size}"), rel=1e-2)
    assert losses(storage, calm) == pytest.approx(losses(storage, f"ddp-fp16-{size}"), rel=1e-3)
    injected = fault(FaultPoint.STEP, 7, size - 1, FaultAction.SIGKILL, tmp_path)
    run_group(shard_assignment(run, faults=(injected,), **train), storage, size)
    assert Path(injected.record).exists(), "the fault did not fire"
    run_to_the_end(shard_assignment(run, launch="last", **train), storage, size)
    assert digests(storage, run) == digests(storage, calm)
    assert losses(storage, run) == losses(storage, calm)


def skipped(storage: LocalStorage, run: str) -> list[tuple[int, float]]:
    return [
        (item["step"], item["scale"])
        for _, item in run_events(RunStore(storage, run))
        if item["event"] == "step-skipped"
    ]


def norms(storage: LocalStorage, run: str) -> dict[int, float]:
    """The gradient's norm before clipping, of the steps that were not skipped."""
    steps = [event for _, event in run_events(RunStore(storage, run)) if event["event"] == "step"]
    return {event["step"]: event["grad_norm"] for event in steps if event["grad_norm"] is not None}


def test_the_numbers_equal_those_of_ddp(
    shard_assignment: Assign, storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """Up to rounding: gradients are added in another order. Checkpoint and published model have the full weights."""
    run_to_the_end(shard_assignment("fsdp-as-ddp"), storage, 3)
    assert losses(storage, "fsdp-as-ddp") == pytest.approx(reference(3).losses, rel=1e-4)
    assert evaluations(storage, "fsdp-as-ddp") == pytest.approx(evaluations(storage, reference(3).run), rel=1e-4)
    assert digests(storage, "fsdp-as-ddp").keys() == reference(3).digests.keys()

    manifest = newest(storage, "fsdp-as-ddp")
    files = [entry.path for entry in manifest.files if entry.path.startswith("training_state/optimizer-")]
    assert len(files) == 3, "each rank wrote its share of the moments"
    model = AutoModelForCausalLM.from_pretrained(next(storage.path("fsdp-as-ddp/attempts").glob("*/model")))
    directory = checkpoint_dir("fsdp-as-ddp", manifest.ref)
    saved = read_tensors(storage, directory, manifest, weights_only=True)
    for name, tensor in saved.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_another_number_of_ranks_and_ddp_resume(
    shard_assignment: Assign, assign: Assign, storage: LocalStorage, reference: Callable[[int], Reference]
) -> None:
    """The samples are the same, so the losses agree up to rounding; the journal records what changed."""
    run = "fsdp-resize"
    run_group(shard_assignment(run), storage, 2, StopAt(3))
    run_group(shard_assignment(run, launch="second"), storage, 3, StopAt(6))
    run_to_the_end(assign(run, launch="third"), storage, 1)
    assert losses(storage, run) == pytest.approx(reference(2).losses, rel=1e-4)
    changed = [event for _, event in run_events(RunStore(storage, run)) if event["event"] == "changed"]
    assert [(item["what"], item["before"], item["now"], item["same_bits"]) for item in changed] == [
        ("world_size", 2, 3, False),
        ("world_size", 3, 1, False),
        ("parallel", "fsdp", "ddp", False),
    ]


@pytest.mark.faults
def test_a_short_last_step_leaves_ranks_idle(shard_assignment: Assign, storage: LocalStorage) -> None:
    """17 samples in batches of 8: the last step is one micro-batch for three ranks."""
    epochs = 16.5 / shard_assignment("fsdp-short").prepared.num_samples
    for parallel in Parallel:
        assignment = shard_assignment(f"{parallel.value}-short", steps=None, epochs=epochs, eval_every=None)
        run_to_the_end(with_parallel(assignment, parallel), storage, 3)
    assert losses(storage, "fsdp-short") == pytest.approx(losses(storage, "ddp-short"), rel=1e-5)


def test_elastic_is_refused() -> None:
    sections = {"exactness": "elastic", "scale": {"parallel": "fsdp"}}
    with pytest.raises(ValueError, match=r"exactness: elastic needs scale\.parallel: ddp"):
        tiny_config("fsdp-elastic", "runs", "text.txt", sections=sections)


def test_a_run_file_is_refused_before_resources_are_allocated(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\nmodel: {path: gpt2}\ndata: {train: a.txt}\nscale: {parallel: fsdp}\n")
    config, _ = load_run(str(tmp_path / "run.yaml"))
    assert config.scale.parallel is Parallel.FSDP
    with pytest.raises(ConfigError, match=r"exactness: elastic needs scale\.parallel: ddp.*; use exactness"):
        load_run(str(tmp_path / "run.yaml"), ["exactness=elastic"])


# -- what is spread, and how it is added -------------------------------------------------------------------------------


def test_blocks_are_found() -> None:
    """By `_no_split_modules`, or else the largest list; never a block that shares a parameter with the rest."""
    model: Any = nn.Module()
    model.embed = nn.Embedding(9, 4)
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])) for _ in range(3))
    assert blocks(model) == list(model.layers)
    model.layers[1][0].weight = model.layers[2][0].weight
    assert blocks(model) == [model.layers[0]]
    model._no_split_modules = ["Linear"]
    assert blocks(model) == [model.small[0]]
    assert blocks(nn.Linear(2, 2)) == []


class Net(nn.Module):
    """Dimensions that three ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.layers = nn.ModuleList([nn.Linear(7, 3), nn.Linear(3, 2)])

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(numbers)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def gradients(exactness: Exactness) -> tuple[int, list[Any], list[Any]]:
    """Return the number of sharded modules, this rank's own gradients, and their sums as FSDP leaves them."""
    found, world = [], World()
    for is_spread in (False, True):
        torch.manual_seed(1)
        model = Net()
        if is_spread:
            shard(model, world, exactness)
        torch.manual_seed(2 + world.rank)
        model(torch.randn(4, 5) * 10.0 ** torch.randint(-3, 3, (4, 5))).square().sum().backward()
        found.append([whole(parameter.grad).numpy() for parameter in model.parameters() if parameter.grad is not None])
    return sum(isinstance(item, FSDPModule) for item in model.modules()), found[0], found[1]


@pytest.mark.parametrize("exactness", [Exactness.SAME_WORLD, Exactness.FAST])
def test_gradients_are_added_in_rank_order(exactness: Exactness) -> None:
    """Or in the library's order for `exactness: fast`."""
    answers = on_ranks(3, gradients, exactness)
    own = [answer[1] for answer in answers]
    for number_of_spread, _, sums in answers:
        assert number_of_spread == 3
        assert len(sums) == 6
        for number, found in enumerate(sums):
            expected = own[0][number] + own[1][number] + own[2][number]
            if exactness is Exactness.SAME_WORLD:
                assert found.tobytes() == expected.tobytes()
            else:
                assert found == pytest.approx(expected, rel=1e-4)
