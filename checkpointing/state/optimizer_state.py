"""Optimizer state as named tensors, distributed over the ranks for writing.

Under DDP every rank has the same optimizer state and writes a part of it; under FSDP each writes what it has. Names are
`<parameter>/<key>`, such as `transformer.wte.weight/exp_avg`, and do not depend on the world size. A plain number is
marked by its type (`weight/step:int`), because a tensor in its place would round differently.
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.optimizer_groups import named_parameters
from outlast.checkpointing.state.shards import Region, like, local_shard

_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
_NUMBER_NAMES = {cls.__name__: cls for cls in _NUMBERS}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's per-parameter state by name, not copied.

    Raises ConfigError for a value that is neither a tensor nor a number.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in named_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            cls = type(value)
            if cls in _NUMBERS:
                tensors[f"{name}/{key}:{cls.__name__}"] = torch.tensor(value, dtype=_NUMBERS[cls])
            elif isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach()
            else:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps a {cls.__name__} as the state {key!r} of {name}; only tensors "
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
    """Load saved state into an optimizer: moments on their parameter's device, step counters where it expects them.

    The tensors are not copied. Those named in `sharded` are this rank's part, placed as the parameter. Raises as
    `check_moments`.
    """
    parameters = named_parameters(model)
    check_moments(model, tensors)
    optimizer.state.clear()
    devices = devices_of_state(model, optimizer, tensors)
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        key, _, number = key.partition(":")
        if number in _NUMBER_NAMES:
            optimizer.state[parameter][key] = _NUMBER_NAMES[number](tensor.item())
            continue
        placed = tensor.detach().to(devices[full_name])
        optimizer.state[parameter][key] = like(parameter, placed) if full_name in sharded else placed


def check_moments(model: nn.Module, names: Collection[str]) -> None:
    """Raise ConfigError for saved optimizer state of parameters that the model does not have."""
    parameters = named_parameters(model)
    for name in sorted({full_name.rpartition("/")[0] for full_name in names}):
        if name not in parameters:
            raise ConfigError(
                f"the checkpoint has optimizer state for {name!r}, which the model does not have",
                hint="build the model as it was when the checkpoint was saved, or resume without an optimizer",
            )


def devices_of_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Collection[str]
) -> dict[str, torch.device]:
    """Return the device of each state tensor: the parameter's, or the CPU for most step counters and for numbers."""
    parameters = named_parameters(model)
    groups = [group for group in optimizer.param_groups if group.get("fused") or group.get("capturable")]
    on_device = {id(parameter) for group in groups for parameter in group["params"]}
    devices = {}
    for full_name in names:
        name, key = full_name.rsplit("/", 1)
        parameter = parameters.get(name)
        is_with_parameter = parameter is not None and ":" not in key and (key != "step" or id(parameter) in on_device)
        devices[full_name] = parameter.device if parameter is not None and is_with_parameter else torch.device("cpu")
    return devices


def regions_of_state(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Region]:
    """Return the region that this rank needs of each state tensor, given its full shape, if it is sharded."""
    parameters = named_parameters(model)
    regions: dict[str, Region] = {}
    for name, shape in shapes.items():
        parameter = parameters.get(name.rsplit("/", 1)[0])
        if isinstance(parameter, DTensor) and tuple(parameter.shape) == shape:
            regions[name] = local_shard(parameter).region
    return regions


def assign_to_ranks(tensors: Mapping[str, torch.Tensor], size: int, rank_0_bytes: int = 0) -> list[list[str]]:
    """Return the names that each of `size` ranks writes: the largest first, each to the rank with the least bytes.

    Rank 0 starts with the `rank_0_bytes` that it writes anyway.
    """
    shares: list[list[str]] = [[] for _ in range(size)]
    load = [rank_0_bytes] + [0] * (size - 1)
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += tensors[name].nbytes
    return shares
