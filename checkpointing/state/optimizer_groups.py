"""The optimizer itself: its class, its parameter groups by name, and the numbers that schedulers change in them.

Saved beside the optimizer's tensors, so that these are never loaded into another optimizer, and so that learning rates
continue. What decides only how an update is computed (`fused`, `foreach`) stays as the script built it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.state.loop_state import decode_state, encode_state
from outlast.checkpointing.state.named_weights import plain_name, unwrap

_NOT_SAVED = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
_NUM_SHOWN = 3


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names of optimizer state: those of the model without wrappers."""
    return {plain_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def encode_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Describe an optimizer as JSON text.

    Values that have no encoding, such as functions, are left out: the script builds them again. Raises ConfigError if
    the optimizer has parameters or state that `model` does not have, which would be lost.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    check_covered(names, optimizer)
    groups = []
    for group in optimizer.param_groups:
        numbers = {key: value for key, value in group.items() if key not in _NOT_SAVED and _is_saved(value)}
        on_host = {key: _on_host(value) for key, value in numbers.items()}
        groups.append({"params": [names[id(parameter)] for parameter in group["params"]], "numbers": on_host})
    return encode_state({"class": type(optimizer).__name__, "groups": groups}, "the optimizer")


def check_covered(names: Mapping[int, str], optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError unless an optimizer's parameters and state belong to the parameters with the ids `names`."""
    title = type(optimizer).__name__
    others = [item for group in optimizer.param_groups for item in group["params"] if id(item) not in names]
    if others:
        shapes = ", ".join(str(list(item.shape)) for item in others[:_NUM_SHOWN])
        raise ConfigError(
            f"{title} has {len(others)} parameters that the model does not have (shapes {shapes}): their state would "
            "not be in the checkpoint",
            hint="save a module that holds all of them, such as nn.ModuleDict, or give them an optimizer of their own",
        )
    for key, value in optimizer.state.items():
        is_empty = isinstance(value, dict) and not value
        if id(key) not in names and not is_empty:
            shown = "a tensor that is no parameter" if isinstance(key, torch.Tensor) else repr(key)
            raise ConfigError(
                f"{title} keeps state under {shown}; only state of the model's parameters can be saved",
                hint="use an optimizer that keeps its state by parameter, or put the rest into the loop state",
            )


def _is_saved(value: Any) -> bool:
    try:
        encode_state({"": _on_host(value)})
    except ConfigError:
        return False
    return True


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, text: str, path: str) -> None:
    """Raise ConfigError if `text` describes another optimizer, and DamagedError if it is no description."""
    saved_class, saved = _parse(text, path)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    own = [
        {names.get(id(item), "a tensor of no model") for item in group["params"]} for group in optimizer.param_groups
    ]
    title = type(optimizer).__name__
    problems = [f"it is of {saved_class}, not {title}"] if saved_class != title else []
    if len(saved) != len(own):
        problems.append(f"it has {len(saved)} parameter groups, not {len(own)}")
    else:
        for index, (mine, (theirs, _)) in enumerate(zip(own, saved, strict=True)):
            problems += _differences(index, mine, set(theirs))
    if problems:
        raise ConfigError(
            f"the checkpoint holds the state of another optimizer: {'; '.join(problems)}",
            hint="build the optimizer as it was when the checkpoint was saved, or resume without one",
        )


def _differences(index: int, mine: set[str], theirs: set[str]) -> Iterator[str]:
    for names, relation in ((theirs - mine, "it also has"), (mine - theirs, "it lacks")):
        if names:
            more = ", …" if len(names) > _NUM_SHOWN else ""
            yield f"in group {index} {relation} {', '.join(sorted(names)[:_NUM_SHOWN])}{more}"


def load_groups(optimizer: torch.optim.Optimizer, text: str, path: str) -> None:
    """Load the numbers of the parameter groups; a number in a tensor stays in that tensor."""
    for group, (_, numbers) in zip(optimizer.param_groups, _parse(text, path)[1], strict=True):
        for key, value in numbers.items():
            own = group.get(key)
            if not isinstance(own, torch.Tensor):
                group[key] = value
            elif isinstance(value, torch.Tensor):
                own.copy_(value)
            else:
                own.fill_(value)


def _parse(text: str, path: str) -> tuple[str, list[tuple[list[str], dict[str, Any]]]]:
    """Return the class, and the parameters and the numbers of each group."""
    try:
        body = decode_state(text.encode(), path)
        groups = [(list(map(str, group["params"])), dict(group["numbers"])) for group in body["groups"]]
        return str(body["class"]), groups
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DamagedError(f"{path}: its description of the optimizer is not readable ({error})") from error
