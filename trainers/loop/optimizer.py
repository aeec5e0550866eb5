"""Optimizers by name or dotted path, with checked options.

Nothing here may keep state of its own: an optimizer's state is saved with the checkpoint, tensors by parameter and the
numbers of its parameter groups in the loop state.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from outlast.checkpointing.error_hints import did_you_mean
from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.train import TrainSettings
from outlast.trainers.user_code import import_object

#: The classes of `config.train.OPTIMIZERS`.
_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}
#: Classes whose fused kernels also support sharded parameters.
_FUSED = (torch.optim.AdamW, torch.optim.Adam)
#: Options with a setting of their own under `train`.
_NAMED = ("lr", "weight_decay")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def resolve_optimizer(train: TrainSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and its options except weight decay, checked against its constructor.

    Raises:
        ConfigError: It cannot be imported, is not an optimizer, or does not support an option.
    """
    optimizer_class = _CLASSES.get(train.optimizer) or _own_class(train.optimizer)
    title, taken = optimizer_class.__name__, inspect.signature(optimizer_class).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in taken.values())
    known = [name for name in list(taken)[1:] if name not in _NAMED]
    options = {name: _parse_option(value) for name, value in train.optimizer_options.items()}
    for name in options:
        if name in _NAMED:
            raise ConfigError(f"train.optimizer_options.{name}: set train.{name} instead")
        if name not in known and not takes_any:
            raise ConfigError(f"train.optimizer_options.{name}: {title} has no such option{_suggestion(name, known)}")
    common = {"betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay or None}
    for name, value in common.items():
        if value is not None and name in options:
            raise ConfigError(f"train.{name} is given twice: also in train.optimizer_options")
        if value is not None and name not in taken and not takes_any:
            raise ConfigError(f"train.{name}: {title} has no such option{_suggestion(name, known)}")
        if value is not None and name != "weight_decay":
            options[name] = value
    if optimizer_class in _FUSED and not options.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        options["fused"] = True
    try:
        optimizer_class([nn.Parameter(torch.zeros(2, 2))], **{"lr": train.lr, **options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"train.optimizer: {train.optimizer} rejects its options {options}: {error}") from error
    return optimizer_class, options


def _own_class(path: str) -> type[torch.optim.Optimizer]:
    own = import_object(path, "train.optimizer")
    if not (isinstance(own, type) and issubclass(own, torch.optim.Optimizer)):
        raise ConfigError(f"train.optimizer: {path!r} is not a torch.optim.Optimizer")
    closure = inspect.signature(own.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"train.optimizer: {path!r} needs a closure (like LBFGS), which is not supported")
    optimizer_class: type[torch.optim.Optimizer] = own
    return optimizer_class


def _parse_option(value: Any) -> Any:
    """Convert lists to tuples, and numbers that YAML reads as text (`1e-6`) to numbers."""
    if isinstance(value, list):
        return tuple(_parse_option(item) for item in value)
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _suggestion(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known) or f"; known: {', '.join(known)}"


def make_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimizer of the trained parameters, in two groups: with weight decay, and without.

    Tensors of fewer than two dimensions, everything in a norm (torch's, or a class named like one, such as
    `LlamaRMSNorm`), and parameters named bias do not decay.

    Raises:
        ConfigError: As `resolve_optimizer`, or the optimizer does not support sharded parameters.
    """
    optimizer_class, options = resolve_optimizer(train)
    decaying: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter, decays in _parameters(model):
        (decaying if decays else exempt).append(parameter)
        if optimizer_class is torch.optim.Adafactor and isinstance(parameter, DTensor):
            raise ConfigError("torch's Adafactor cannot factor sharded parameters", hint="use train.optimizer: adamw")
    takes = inspect.signature(optimizer_class).parameters
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": exempt}]
    if "weight_decay" in takes or train.weight_decay:
        groups[0]["weight_decay"], groups[1]["weight_decay"] = train.weight_decay, 0.0
    return optimizer_class([group for group in groups if group["params"]], **{"lr": train.lr, **options})


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield each trained parameter once, in the model's order, and whether it decays."""
    seen: set[int] = set()
    for module in model.modules():
        is_norm = isinstance(module, _NORMS) or type(module).__name__.lower().endswith("norm")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                is_bias = name == "bias" or name.endswith("_bias")
                yield parameter, parameter.ndim >= 2 and not is_norm and not is_bias


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers in the parameter groups that differ from the defaults, as JSON: some optimizers change them.

    Raises:
        ConfigError: A parameter group holds a tensor.
    """
    changed: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps a tensor as {key!r} of a parameter group, which cannot be saved",
                    hint="use an optimizer that keeps numbers there, and tensors by parameter",
                )
        numbers = {key: value for key, value in group.items() if isinstance(value, (bool, int, float)) and key != "lr"}
        changed.append({key: value for key, value in numbers.items() if value != optimizer.defaults.get(key)})
    return changed


def load_group_numbers(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Restore `group_numbers`."""
    for group, numbers in zip(optimizer.param_groups, saved, strict=True):
        group.update(numbers)
