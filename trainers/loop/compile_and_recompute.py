"""torch.compile and activation recomputation.

Neither may make a step depend on earlier steps. So a kernel is compiled for one shape: one for any shape would depend
on which shape came first.
"""

import time
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.torch_internals import limit_recompiles
from outlast.trainers.config.train import TrainSettings

#: Shapes that a function may be compiled for, in training and evaluation together.
_NUM_SHAPES = 4096


def prepare_module(model: nn.Module, train: TrainSettings, ranks: RankGroup, device: torch.device) -> None:
    """Set up recomputation and compilation in place, so that parameter names stay. Call it before parallelizing.

    Raises:
        ConfigError: The model cannot recompute its activations.
        PreflightError: torch.compile does not work on some rank's machine.
    """
    check_recomputes(model, train)
    if train.gradient_checkpointing:
        enable_recomputing(model)
    if train.compile:
        limit_recompiles(_NUM_SHAPES)
        ranks.run_on_all(lambda: _check_compiler(device))
        model.compile(dynamic=False)


def enable_recomputing(model: nn.Module) -> None:
    """Let the model recompute its activations in the backward pass."""
    inner: Any = model
    enable = getattr(inner, "activation_checkpointing_enable", None)  # the name in newer transformers
    (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def check_recomputes(model: nn.Module, train: TrainSettings) -> None:
    """Raise ConfigError if the settings require recomputation and the model does not support it."""
    if train.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} cannot recompute its activations", hint="set train.gradient_checkpointing: false"
        )


def _check_compiler(device: torch.device) -> None:
    """Compile a function that no cache holds."""
    salt = time.time()
    try:
        torch.compile(lambda values: values * salt, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        needs = "a C++ compiler (g++, or CXX)" if device.type == "cpu" else "triton and a C compiler (gcc, or CC)"
        raise PreflightError(
            f"torch.compile does not work on this machine: {first_line(error)}",
            hint=f"it needs {needs} on every worker; or set train.compile: false",
        ) from error
