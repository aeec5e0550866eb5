"""Tensors that a model may not have: those that no checkpoint, alignment or digest can handle."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from outlast.checkpointing.error_hints import shorten_list
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.safetensors import DTYPES
from outlast.checkpointing.state.named_weights import WeightNaming, named_weights, plain_name


def check_tensors(model: nn.Module) -> None:
    """Check the tensors of a model that was just built.

    Raises:
        ConfigError: A tensor is not initialized or not dense, or the state is not made of the model's own tensors.
    """
    name = type(model).__name__
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"{key} of {name} gets its shape in the first forward pass only",
                hint="give all sizes in the constructor, such as nn.Linear instead of nn.LazyLinear",
            )
        if tensor.layout != torch.strided:
            raise ConfigError(
                f"{key} of {name} is not a dense tensor: {str(tensor.layout).removeprefix('torch.')}",
                hint="register a dense one, or its indices and values, and make the sparse one in the forward pass",
            )
    state, again = model.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    for key, value in state.items():
        if value is not again[key] or not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"the state of {name} has {key}, which is neither a parameter nor a buffer; no checkpoint holds it",
                hint="keep it in a persistent buffer, instead of get_extra_state or a hook of state_dict",
            )


def check_finite(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise ConfigError if a weight of a model that was loaded from these directories has NaN or an infinite value."""
    found = [plain_name(name) for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if found:
        raise ConfigError(
            f"the files of {' and '.join(paths)} hold NaN or infinite values in {shorten_list(found, 3, 'weights')}",
            hint="use other files: no step with these weights has a finite loss",
        )


def check_dtypes(model: nn.Module, naming: WeightNaming) -> None:
    """Raise ConfigError if checkpoints cannot hold the type of a weight."""
    for name, tensor in named_weights(model, naming).items():
        if tensor.dtype not in DTYPES.values():
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise ConfigError(
                f"{name} of {type(model).__name__} is {str(tensor.dtype).removeprefix('torch.')}, which safetensors "
                "files do not hold",
                hint=f"use one of {known}; complex numbers as pairs: torch.view_as_complex",
            )
