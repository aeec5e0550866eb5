"""Optimizer state as named tensors, dealt out over the ranks.

Under DDP every rank holds the same optimizer state, so each writes a share of it. Names are `<parameter>/<key>`, such
as `transformer.wte.weight/exp_avg`; they mean the same at any world size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.weights import unwrap


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's per-parameter state, tensors by name; the optimizer's own, not copies.

    Raises:
        TypeError: State that is neither a tensor nor a number.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in unwrap(model).named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int | float):
                value = torch.tensor(value, dtype=torch.float64)
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"cannot save optimizer state {name}/{key} of type {type(value).__name__}")
            tensors[f"{name}/{key}"] = value.detach()
    return tensors


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts saved state back. Moments go to their parameter's device, step counters stay where the optimizer wants them.

    Raises:
        ConfigError: State of parameters that the model does not have.
    """
    parameters = dict(unwrap(model).named_parameters())
    optimizer.state.clear()
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        if name not in parameters:
            raise ConfigError(f"the checkpoint holds optimizer state for {name}, which the model does not have")
        parameter = parameters[name]
        on_host = key == "step" and id(parameter) not in fused
        optimizer.state[parameter][key] = tensor.detach().clone().to("cpu" if on_host else parameter.device)


def deal(tensors: Mapping[str, torch.Tensor], size: int) -> list[list[str]]:
    """Names of the tensors that each of `size` ranks writes: the largest first, each to the least laden rank."""
    shares: list[list[str]] = [[] for _ in range(size)]
    load = [0] * size
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += tensors[name].nbytes
    return shares
