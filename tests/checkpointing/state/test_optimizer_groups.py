"""Learning rates and other numbers of the optimizer continue, and its state is never loaded into another optimizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import optimizer_shard
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.local import LocalStorage

Make = Callable[[torch.optim.Optimizer], Any]


class Warmup:
    """A function with a state of its own, which torch's schedulers save."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / (1 + self.calls)


MAKE: dict[str, Make] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR-object": lambda o: schedulers.LambdaLR(o, Warmup()),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 8, 8]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=6),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 9, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=True, mode="exp_range", gamma=0.9),
    "CyclicLR-own": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False, scale_fn=lambda x: 0.9**x),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.CosineAnnealingLR(o, 9)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=6), schedulers.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.5, anneal_epochs=6),
}


def test_every_scheduler_of_torch_is_here() -> None:
    classes = {
        name
        for name, item in vars(schedulers).items()
        if isinstance(item, type) and issubclass(item, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} <= MAKE.keys()


def training(make: Make, lr: float | torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1)
    return model, optimizer, make(optimizer)


def rates(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, num_steps: int) -> list[Any]:
    """The numbers of the groups after each step."""
    found = []
    for step in range(num_steps):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        is_plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
        scheduler.step(*([1.0 + step] if is_plateau else []))
        numbers = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        found.append(repr(numbers))
    return found


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", MAKE)
def test_learning_rates_continue_as_if_undisturbed(name: str, is_tensor: bool, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")  # of torch, about orders of calls
    lr = torch.tensor(0.05) if is_tensor else 0.05
    if is_tensor and name == "CyclicLR-own":
        pytest.skip("torch compares the tensor of its own function")
    seen: set[str] = set()
    for num_steps in (1, 4, 5):
        run = f"run{num_steps}"
        model, optimizer, scheduler = training(MAKE[name], lr)
        checkpointer = Checkpointer(LocalStorage(tmp_path), run)
        assert checkpointer.resume(model, optimizer) is None
        rates(model, optimizer, scheduler, num_steps)
        assert checkpointer.save(num_steps, model, optimizer, {"scheduler": scheduler.state_dict()})
        undisturbed = rates(model, optimizer, scheduler, 7)

        model, optimizer, scheduler = training(MAKE[name], lr)
        state = Checkpointer(LocalStorage(tmp_path), run).resume(model, optimizer)
        assert state is not None
        scheduler.load_state_dict(state["scheduler"])
        assert rates(model, optimizer, scheduler, 7) == undisturbed
        seen |= set(undisturbed)
    assert len(seen) > 1


def saved(folder: Path, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> Path:
    """The file of the optimizer's state."""
    model = net()
    optimizer = optimizer_of(model)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    checkpointer = Checkpointer(LocalStorage(folder), "run")
    assert checkpointer.save(1, model, optimizer, {})
    return folder / checkpointer.store.checkpoint_dir(checkpointer.accepted[0].ref) / optimizer_shard(0, 1)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.5)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights, biases = ([item for item in model.parameters() if item.ndim == ndim] for ndim in (2, 1))
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups)


def swapped_groups(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(reversed(two_groups(model).param_groups)))


OTHERS: dict[str, tuple[Any, Any, str]] = {
    "class": (adamw, lambda m: torch.optim.SGD(m.parameters(), momentum=0.9), "it is of AdamW, not SGD"),
    "subclass": (adamw, lambda m: torch.optim.Adam(m.parameters()), "it is of AdamW, not Adam"),
    "groups": (adamw, two_groups, "it has 1 parameter groups, not 2"),
    "order": (two_groups, swapped_groups, r"in group 0 it also has 0\.weight, 1\.weight; in group 0 it lacks 0\.bias"),
    "fewer": (adamw, lambda m: torch.optim.AdamW(m[0].parameters()), r"in group 0 it also has 1\.bias, 1\.weight"),
    "more": (lambda m: torch.optim.AdamW(m[0].parameters()), adamw, r"in group 0 it lacks 1\.bias, 1\.weight"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_optimizer_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    first, second, message = OTHERS[name]
    saved(tmp_path, first)
    model = net()
    weights = [item.clone() for item in model.parameters()]
    with pytest.raises(ConfigError, match=f"the state of another optimizer: .*{message}"):
        Checkpointer(LocalStorage(tmp_path), "run").resume(model, second(model))
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))


def test_how_an_update_is_computed_stays_as_the_script_says(tmp_path: Path) -> None:
    saved(tmp_path, lambda model: torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.6), foreach=True))
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    Checkpointer(LocalStorage(tmp_path), "run").resume(model, optimizer)
    [group] = optimizer.param_groups
    assert (group["lr"], group["betas"], group["fused"], group["foreach"]) == (0.25, (0.5, 0.6), True, None)


def test_a_value_without_an_encoding_stays_as_the_script_says(tmp_path: Path) -> None:
    def with_function(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(model.parameters()), "schedule": print}], lr=0.5)

    saved(tmp_path, with_function)
    model = net()
    optimizer = with_function(model)
    optimizer.param_groups[0]["lr"] = 0.1
    Checkpointer(LocalStorage(tmp_path), "run").resume(model, optimizer)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["schedule"]) == (0.5, print)


def test_state_that_would_be_lost_is_refused_at_the_save(tmp_path: Path) -> None:
    model, other = net(), nn.Linear(3, 3)
    checkpointer = Checkpointer(LocalStorage(tmp_path), "run")
    optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()])
    with pytest.raises(
        ConfigError, match=r"AdamW has 2 parameters that the model does not have \(shapes \[3, 3\], \[3\]"
    ):
        checkpointer.save(1, model, optimizer, {})
    own = adamw(model)
    own.state["global"]["count"] = 1  # type: ignore[index]
    with pytest.raises(ConfigError, match="AdamW keeps state under 'global'"):
        checkpointer.async_save(1, model, own, {})


def test_a_checkpoint_of_0_1_0_has_no_description_and_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path / "now", adamw)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    assert "optimizer" in json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    monkeypatch.setattr(TrainState, "describe_optimizer", lambda self: None)
    saved(tmp_path / "then", adamw)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    assert Checkpointer(LocalStorage(tmp_path / "then"), "run").resume(model, optimizer) == {}
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert len(optimizer.state) == 4
