"""Weights by their plain names, whatever wraps the model; tied ones once; loading is strict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import named_weights, unwrap
from tests.support.small_model import load_weights


class Net(nn.Module):
    """Tied embeddings, a batch norm with counters, a buffer that is not saved, an empty one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.embed(numbers)))
        return result


NAMES = [
    "nothing",
    "embed.weight",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
]
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "data-parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "compiled-in-data-parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[type-var]
    "data-parallel-in-compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_no_wrapper_shows_in_a_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert list(named_weights(wrapped)) == NAMES


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_weights_go_from_any_wrapper_into_any_other(wrap: Callable[[nn.Module], nn.Module]) -> None:
    source, target = Net(1), Net(2)
    source(torch.tensor([1, 2, 3]))  # moves the counters of the norm
    assert not torch.equal(source.embed.weight, target.embed.weight)
    load_weights(wrap(target), named_weights(source))
    for name, tensor in named_weights(source).items():
        assert torch.equal(tensor, named_weights(target)[name]), name
    assert target.head.weight is target.embed.weight, "still tied"
    assert target.norm.num_batches_tracked is not None
    assert target.norm.num_batches_tracked.item() == 1


def test_a_module_of_the_users_that_is_called_module_is_not_a_wrapper() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)

    assert list(named_weights(Mine())) == ["module.weight", "module.bias"]


def test_tied_weights_are_named_once_and_views_are_not_tied() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(6, dtype=torch.float32)
            self.register_buffer("whole", base)
            self.register_buffer("again", base)
            self.register_buffer("first", base[:3])
            self.register_buffer("last", base[3:])
            self.register_buffer("square", base.view(2, 3))

    assert list(named_weights(Views())) == ["whole", "first", "last", "square"]


def test_they_are_the_models_own() -> None:
    model = Net()
    weights = named_weights(model)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    assert weights["norm.weight"].tolist() == [3.0] * 3
    assert not any(tensor.requires_grad for tensor in weights.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("norm.bias"), "norm.bias is missing"),
        (lambda weights: weights.update(more=torch.zeros(1)), "more is not in the model"),
        (
            lambda weights: weights.update({"norm.bias": torch.zeros(4)}),
            r"norm.bias: \[4\] torch.float32, not \[3\]",
        ),
        (lambda weights: weights.update({"norm.bias": torch.zeros(3, 1)}), r"norm.bias: \[3, 1\]"),
        (
            lambda weights: weights.update({"norm.bias": torch.zeros(3).half()}),
            "torch.float16, not .* torch.float32",
        ),
        (lambda weights: weights.update({"module.norm.bias": weights.pop("norm.bias")}), "2 differences"),
    ],
    ids=["missing", "extra", "shape", "same-size-other-shape", "dtype", "prefixed"],
)
def test_loading_is_strict_and_changes_nothing_when_it_refuses(
    change: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    model, weights = Net(1), {name: tensor.clone() for name, tensor in named_weights(Net(2)).items()}
    before = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    change(weights)
    with pytest.raises(ConfigError, match="another model") as caught:
        load_weights(model, weights)
    with pytest.raises(ConfigError, match=said):
        load_weights(model, weights)
    assert "start a new run under another name" in caught.value.hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model).items())


def test_many_differences_are_not_all_listed() -> None:
    with pytest.raises(ConfigError, match=r"7 differences: .*; …\)"):
        load_weights(Net(), {})
