"""Optimizer state: dealt out over ranks without loss, and back to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.optimization import Adafactor

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.safetensors import encode
from outlast.checkpointing.state.named_weights import named_weights
from outlast.checkpointing.state.optimizer_state import assign_to_ranks, load_optimizer, optimizer_tensors
from tests.support.decoded_safetensors import decode
from tests.support.small_model import digests_of, load_weights, train_step

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "transformers-adafactor": lambda parameters: Adafactor(parameters, relative_step=True, warmup_init=True),
}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_goes_on_as_if_nothing_had_happened(make: Make) -> None:
    """Through the container and back, into an optimizer that has never stepped, or has stepped elsewhere."""
    model = net(0)
    optimizer = make(list(model.parameters()))
    for step in range(3):
        train_step(model, optimizer, step)
    files = [b"".join(encode(part)) for part in (named_weights(model), optimizer_tensors(model, optimizer))]
    weights, moments = (decode(torch.frombuffer(bytearray(data), dtype=torch.uint8)) for data in files)
    for step in range(3, 6):
        train_step(model, optimizer, step)

    for stepped in (False, True):
        other = net(1)
        restored = make(list(other.parameters()))
        if stepped:
            train_step(other, restored, 77)
        load_weights(other, weights)
        load_optimizer(other, restored, {name: tensor.clone() for name, tensor in moments.items()})
        for step in range(3, 6):
            train_step(other, restored, step)
        assert digests_of(other, restored) == digests_of(model, optimizer)


def test_names_say_what_and_whose() -> None:
    model = net(0)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    assert optimizer_tensors(model, optimizer) == {}
    train_step(model, optimizer, 0)
    tensors = optimizer_tensors(nn.DataParallel(model), optimizer)
    assert {name.rsplit("/", 1)[0] for name in tensors} == {name for name, _ in model.named_parameters()}
    assert {name.rsplit("/", 1)[1] for name in tensors} == {"exp_avg", "exp_avg_sq", "step"}
    assert tensors["0.weight/exp_avg"] is not None
    assert tensors["0.weight/exp_avg"].data_ptr() == optimizer.state[model[0].weight]["exp_avg"].data_ptr()  # type: ignore[index]


def test_frozen_and_tied_parameters_have_no_state_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad])
    train_step(model, optimizer, 0)
    whose = {name.rsplit("/", 1)[0] for name in optimizer_tensors(model, optimizer)}
    assert whose == {"0.weight", "0.bias", "1.bias", "2.bias"}


def test_numbers_stay_numbers() -> None:
    model = net(0)
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    kept = {"step": 2**60 + 1, "rms": 0.1, "is_warm": True}
    optimizer.state[model[0].weight].update(kept)  # type: ignore[index]
    data = b"".join(encode(optimizer_tensors(model, optimizer)))
    load_optimizer(model, optimizer, decode(torch.frombuffer(bytearray(data), dtype=torch.uint8)))
    found = optimizer.state[model[0].weight]  # type: ignore[index]
    assert found == kept
    assert [type(found[key]) for key in kept] == [int, float, bool]


def test_what_is_loaded_is_kept_and_not_copied() -> None:
    model = net(0)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    train_step(model, optimizer, 0)
    given_tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    load_optimizer(model, optimizer, given_tensors)
    for name, tensor in optimizer_tensors(model, optimizer).items():
        assert tensor.data_ptr() == given_tensors[name].data_ptr()


def test_state_of_a_stranger_is_refused() -> None:
    model = net(0)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    with pytest.raises(ConfigError, match=r"state for '9\.weight'"):
        load_optimizer(model, optimizer, {"9.weight/exp_avg": torch.zeros(1)})


def test_state_that_no_file_can_hold_is_refused() -> None:
    model = net(0)
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    optimizer.state[model[0].weight]["history"] = ["text"]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"a list as the state 'history' of 0\.weight"):
        optimizer_tensors(model, optimizer)


# -- dealing -----------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), num_ranks=st.integers(1, 9))
def test_dealing_gives_each_to_one_and_loads_evenly(sizes: list[int], num_ranks: int) -> None:
    tensors = {f"p{index}/exp_avg": torch.empty(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    shares = assign_to_ranks(tensors, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    loads = [sum(tensors[name].nbytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(seed=st.randoms(use_true_random=False), num_ranks=st.integers(1, 5))
def test_dealing_does_not_depend_on_the_order(seed: Any, num_ranks: int) -> None:
    """Each rank deals for itself, so all must come to the same."""
    names = [f"p{index}" for index in range(12)]
    tensors = {name: torch.empty(index // 3) for index, name in enumerate(names)}
    seed.shuffle(names)
    assert assign_to_ranks({name: tensors[name] for name in names}, num_ranks) == assign_to_ranks(tensors, num_ranks)
