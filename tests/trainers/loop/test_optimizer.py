"""Optimizers and schedules by name: options that are checked, rates that are transformers', state that is restored."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import load_run
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import OPTIMIZERS, TrainSettings
from outlast.trainers.loop.lr_schedule import learning_rate
from outlast.trainers.loop.optimizer import group_numbers, load_group_numbers, make_optimizer, resolve_optimizer
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import digests, fault, losses, run_group
from tests.support.small_model import digests_of, train_step

MOMENTUM = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}
OWN = {"optimizer": f"{__name__}:Drifting"}


class Drifting(torch.optim.SGD):
    """Keeps a number in its parameter groups that moves as it goes, as Prodigy and schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["drift"] = group.get("drift", 1.0) * 0.9
            group["momentum"] = 0.5 * group["drift"]
        super().step()


class NoDefaults(torch.optim.Optimizer):
    """An optimizer that needs a closure."""

    def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
        closure()


def settings(**train: Any) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 20, "lr": 0.1, **train})


# -- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(
    ("mine", "theirs", "options"),
    [
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "min_lr": 0.02}, "cosine_with_min_lr", {"min_lr": 0.02}),
        ({"schedule": "polynomial", "power": 2.0, "min_lr": 0.03}, "polynomial", {"power": 2.0, "lr_end": 0.03}),
        ({"schedule": "inverse_sqrt"}, "inverse_sqrt", {}),
        ({"schedule": "wsd", "decay": 6}, "warmup_stable_decay", {"num_decay_steps": 6}),
        (
            {"schedule": "wsd", "decay": 0.3, "min_lr": 0.05},
            "warmup_stable_decay",
            {"num_decay_steps": 6, "min_lr_ratio": 0.5},
        ),
    ],
    ids=str,
)
def test_rates_are_those_of_transformers(
    mine: dict[str, Any], theirs: str, options: dict[str, Any], warmup: int
) -> None:
    """The warm-up is a step ahead, for theirs begins at zero; that of their wsd begins at min_lr, and is left out."""
    train = settings(warmup=warmup, **mine)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler: Any = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20, scheduler_specific_kwargs=options
    )
    factor = scheduler.lr_lambdas[0]
    expected = [0.1 * factor(step + 1 if step < warmup else step) for step in range(21)]
    found = [learning_rate(train, step, 20) for step in range(21)]
    begin = warmup if options.get("min_lr_ratio") else 0
    assert found[begin:] == pytest.approx(expected[begin:], abs=1e-12)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"schedule": "constant", "min_lr": 0.01}, "min_lr must be 0 with schedule constant"),
        ({"min_lr": 0.2}, "min_lr .0.2. must not exceed lr .0.1."),
        ({"schedule": "cosinus"}, "Input should be 'cosine'"),
        ({"optimizer": "adamW"}, "unknown optimizer 'adamW'; did you mean 'adamw'"),
        ({"optimizer": "adam_w"}, "unknown optimizer 'adam_w'; did you mean 'adamw'"),
        ({"optimizer": "sgd", "optimizer_options": {"momentun": 0.9}}, "SGD has no such option; did you mean 'mom"),
        ({"optimizer_options": {"lr": 1}}, "set train.lr instead"),
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "train.betas: SGD has no such option"),
        ({"eps": 1e-6, "optimizer_options": {"eps": 1e-6}}, "train.eps is given twice"),
        ({"optimizer": "sgd", "optimizer_options": {"momentum": -1}}, "rejects its options .*Invalid momentum"),
    ],
    ids=str,
)
def test_invalid_options_are_rejected(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_optimizer(settings(**train))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such:Thing", "cannot be imported"),
        ("torch.optim:Nothing", "cannot be imported"),
        ("builtins:dict", "is not a torch.optim.Optimizer"),
        ("torch.optim:LBFGS", "needs a closure"),
        (f"{__name__}:NoDefaults", "needs a closure"),
    ],
)
def test_a_custom_optimizer_is_checked_at_the_start(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_optimizer(settings(optimizer=path))


def test_the_settings_of_docs_are_settings(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    (tmp_path / "run.yaml").write_text((root / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    commands = (root / "docs/how-to/train.md").read_text().split("```console slow\n")[1].split("```")[0].splitlines()
    found = [load_run(str(tmp_path / "run.yaml"), shlex.split(line)[4::2])[0].train for line in commands]
    assert [item.precision.value for item in found] == ["bf16", "bf16", "fp16", "bf16", "bf16"]
    assert [item.early_stopping is not None for item in found] == [False] * 4 + [True]


# -- the optimizer -----------------------------------------------------------------------------------------------------


class OddRMSNorm(nn.Module):
    """A norm by name, with a weight of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


def test_what_does_not_decay() -> None:
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 3),
            "norm": nn.LayerNorm((2, 3)),
            "odd": OddRMSNorm(),
            "linear": nn.Linear(3, 3),
            "tied": nn.Linear(3, 5, bias=False),
        }
    )
    net["tied"].weight = net["embed"].weight
    net["linear"].register_parameter("extra_bias", nn.Parameter(torch.zeros(3, 3)))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decaying, exempt = (
        [names[id(item)] for item in group["params"]]
        for group in make_optimizer(net, settings(weight_decay=0.1)).param_groups
    )
    assert decaying == ["embed.weight", "linear.weight"]
    assert exempt == ["norm.weight", "norm.bias", "odd.weight", "linear.bias", "linear.extra_bias"]


def test_options_reach_the_constructor() -> None:
    net = nn.Linear(2, 2)
    options = {"beta2_decay": -0.7, "eps": [None, "1e-4"]}  # as YAML reads it
    adafactor = make_optimizer(net, settings(optimizer="adafactor", optimizer_options=options)).defaults
    assert (adafactor["beta2_decay"], adafactor["eps"], adafactor["lr"]) == (-0.7, (None, 1e-4), 0.1)
    adamw = make_optimizer(net, settings(betas=[0.8, 0.9], eps=1e-6)).param_groups[0]
    assert (adamw["betas"], adamw["eps"], adamw["weight_decay"], adamw["fused"]) == ((0.8, 0.9), 1e-6, 0.01, True)
    assert make_optimizer(net, settings(optimizer="sgd")).param_groups[0]["weight_decay"] == 0.0
    plain = make_optimizer(net, settings(optimizer_options={"foreach": False})).param_groups[0]
    assert not plain["fused"]


@pytest.mark.parametrize(
    "train",
    [*({"optimizer": name} for name in OPTIMIZERS), MOMENTUM, OWN, {"optimizer": "torch.optim:Adagrad"}],
    ids=str,
)
def test_state_comes_back_exactly(train: dict[str, Any], tmp_path: Path) -> None:
    """Three steps, a save, three steps; and the last three again from the save, by another process's objects."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        return model, make_optimizer(model, settings(lr=0.01, **train))

    storage = LocalStorage(tmp_path)
    model, optimizer = fresh()
    saver = Checkpointer(storage, "run")
    saver.resume(model, optimizer)
    for step in range(6):
        if step == 3:
            assert saver.save(3, model, optimizer, {"groups": group_numbers(optimizer)})
        train_step(model, optimizer, step)
    again, other = fresh()
    state = Checkpointer(storage, "run").resume(again, other)
    assert state is not None
    load_group_numbers(other, state["groups"])
    for step in range(3, 6):
        train_step(again, other, step)
    assert digests_of(again, other) == digests_of(model, optimizer)
    assert group_numbers(other) == group_numbers(optimizer)


def test_a_tensor_in_a_parameter_group_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    with pytest.raises(ConfigError, match="SGD keeps a tensor as 'lr' of a parameter group"):
        group_numbers(optimizer)


# -- whole runs --------------------------------------------------------------------------------------------------------


def killed_equals_uninterrupted(
    run: str, size: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, **train: Any
) -> None:
    assert run_group(assign(run, **train), storage, size)[0].outcome is Outcome.DONE
    strike = fault(FaultPoint.WHILE_WRITING, 6, size - 1, FaultAction.SIGKILL, tmp_path)
    run_group(assign(f"{run}-killed", faults=(strike,), **train), storage, size)
    assert Path(strike.record).exists()
    assert run_group(assign(f"{run}-killed", launch="second", **train), storage, size)[0].outcome is Outcome.DONE
    assert digests(storage, f"{run}-killed") == digests(storage, run)
    assert losses(storage, f"{run}-killed") == losses(storage, run)


def test_killed_and_resumed_equals_uninterrupted(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    train = {"optimizer": "adafactor", "schedule": "wsd", "decay": 4, "lr": 0.01}
    killed_equals_uninterrupted("adafactor", 2, assign, storage, tmp_path, **train)


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("train", [*({"optimizer": name} for name in OPTIMIZERS), MOMENTUM, OWN], ids=str)
def test_killed_and_resumed_equals_uninterrupted_for_all(
    train: dict[str, Any], size: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """About 5 s each."""
    run = "-".join(["opt", str(train["optimizer"]).rpartition(":")[2], str(len(train)), str(size)])
    killed_equals_uninterrupted(run, size, assign, storage, tmp_path, **train)
