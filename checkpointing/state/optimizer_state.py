"""Optimizer state as named tensors, dealt out over the ranks.

Under DDP every rank holds the same optimizer state, so each writes a share of it; under FSDP each writes what it holds.
Names are `<parameter>/<key>`, such as `transformer.wte.weight/exp_avg`; they mean the same at any world size. What is a
plain number to the optimizer says so (`weight/step:int`), since a tensor in its place would round otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.model_weights import plain_name, unwrap
from outlast.checkpointing.state.shards import Region, like, local_shard

_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
_NUMBER_NAMES = {kind.__name__: kind for kind in _NUMBERS}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's per-parameter state, tensors by name; the optimizer's own, not copies.

    Raises:
        ConfigError: State that is neither a tensor nor a number.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _named_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            kind = type(value)
            if kind in _NUMBERS:
                tensors[f"{name}/{key}:{kind.__name__}"] = torch.tensor(value, dtype=_NUMBERS[kind])
            elif isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach()
            else:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps a {kind.__name__} as the state {key!r} of {name}; only tensors "
                    "and numbers can be saved",
                    hint="use an optimizer that keeps its state in tensors",
                )
    return tensors


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    *,
    sharded: Collection[str] = (),
) -> None:
    """Puts saved state back. Moments go to their parameter's device, step counters stay where the optimizer wants them.

    Args:
        model: The model, wrapped or not.
        optimizer: Its optimizer, which keeps the tensors as they are.
        tensors: State by name.
        sharded: Names of those of which this is only the rank's part, placed as its parameter.

    Raises:
        ConfigError: State of parameters that the model does not have.
    """
    parameters = _named_parameters(model)
    optimizer.state.clear()
    devices = devices_of_state(model, optimizer, tensors)
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        if name not in parameters:
            raise ConfigError(
                f"the checkpoint holds optimizer state for {name}, which the model does not have",
                hint="build the model as it was when the checkpoint was saved, or resume without an optimizer",
            )
        parameter = parameters[name]
        key, _, number = key.partition(":")
        if number in _NUMBER_NAMES:
            optimizer.state[parameter][key] = _NUMBER_NAMES[number](tensor.item())
            continue
        placed = tensor.detach().to(devices[full_name])
        optimizer.state[parameter][key] = like(parameter, placed) if full_name in sharded else placed


def devices_of_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Collection[str]
) -> dict[str, torch.device]:
    """Where the optimizer wants each state tensor: beside its parameter, but for what counts steps and is no tensor."""
    parameters = _named_parameters(model)
    groups = [group for group in optimizer.param_groups if group.get("fused") or group.get("capturable")]
    counted_there = {id(parameter) for group in groups for parameter in group["params"]}
    devices = {}
    for full_name in names:
        name, key = full_name.rsplit("/", 1)
        parameter = parameters.get(name)
        is_beside = parameter is not None and ":" not in key and (key != "step" or id(parameter) in counted_there)
        devices[full_name] = parameter.device if parameter is not None and is_beside else torch.device("cpu")
    return devices


def regions_of_state(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Region]:
    """Which part of a state tensor this rank needs, of those that are sharded as their parameters are.

    Args:
        model: The model, wrapped or not.
        shapes: Whole shape of each tensor, by name.
    """
    parameters = _named_parameters(model)
    boxes: dict[str, Region] = {}
    for name, shape in shapes.items():
        parameter = parameters.get(name.rsplit("/", 1)[0])
        if isinstance(parameter, DTensor) and tuple(parameter.shape) == shape:
            boxes[name] = local_shard(parameter).box
    return boxes


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def assign_to_ranks(tensors: Mapping[str, torch.Tensor], size: int, laden_bytes: int = 0) -> list[list[str]]:
    """Names of the tensors that each of `size` ranks writes: the largest first, each to the least laden rank.

    Args:
        tensors: What is to be written.
        size: Number of ranks.
        laden_bytes: What rank 0 writes besides.
    """
    shares: list[list[str]] = [[] for _ in range(size)]
    load = [laden_bytes] + [0] * (size - 1)
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += tensors[name].nbytes
    return shares
