"""How a step is computed where that is a choice: fp16's loss scale, recomputed activations, compiled kernels.

None of it may make a step depend on the steps before, the loss scale excepted, which is in every checkpoint. So kernels
are compiled for one shape each: a kernel for any shape would depend on which shape came first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, PreflightError, first_line
from outlast.checkpointing.state.rank_group import Ranks
from outlast.trainers.config.training_config import TrainSettings

#: Shapes that one function may be compiled for, in training and in evaluation.
_NUM_SHAPES = 4096


def make_scaler(train: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    """The loss scale of fp16; for other precisions one that does nothing."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=train.loss_scale,
        growth_interval=train.loss_scale_window,
        enabled=train.precision == "fp16",
    )


def apply_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """One update with gradients that were unscaled already. False when they overflowed and the update was left out.

    The gradients are sums over the ranks, so all ranks see the same overflow.
    """
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """What moves in a scaler, JSON; nothing when it does nothing."""
    state = scaler.state_dict()
    return {key: state[key] for key in ("scale", "_growth_tracker") if key in state}


def load_scaler(scaler: torch.amp.GradScaler, saved: Mapping[str, Any]) -> None:
    """Puts `scaler_state` back."""
    if saved:
        scaler.load_state_dict({**scaler.state_dict(), **saved})


def prepare_module(model: nn.Module, train: TrainSettings, ranks: Ranks, device: torch.device) -> None:
    """Makes the model compute as the settings say, in place, so that its names stay. Before it is parallelized.

    Raises:
        ConfigError: The model cannot recompute its activations.
        PreflightError: Nothing can be compiled on some rank's machine.
    """
    check_recomputes(model, train)
    if train.gradient_checkpointing:
        inner: Any = model
        enable = getattr(inner, "activation_checkpointing_enable", None)  # its name in newer transformers
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
    if train.compile:
        _settle_compiler()
        ranks.everybody(lambda: _check_compiler(device))
        model.compile(dynamic=False)


def check_recomputes(model: nn.Module, train: TrainSettings) -> None:
    """Raises ConfigError if the model is to recompute its activations and cannot."""
    if train.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} cannot recompute its activations", hint="set train.gradient_checkpointing: false"
        )


def _settle_compiler() -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = _NUM_SHAPES
    dynamo.fail_on_recompile_limit_hit = True  # beyond it uncompiled kernels would go on, with other bits
    if torch.are_deterministic_algorithms_enabled() and hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # no choice of kernels by the clock


def _check_compiler(device: torch.device) -> None:
    """Compiles a line that no cache holds."""
    salt = time.time()
    try:
        torch.compile(lambda values: values * salt, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        needs = "a C++ compiler (g++, or CXX)" if device.type == "cpu" else "triton and a C compiler (gcc, or CC)"
        raise PreflightError(
            f"torch.compile does not work on this machine: {first_line(error)}",
            hint=f"it needs {needs} on every worker; or set train.compile: false",
        ) from error


class Stopwatch:
    """Adds up the seconds of a rank's forward passes, on the device's own clock where it has one.

    Args:
        device: Where they run.
        listener: Hears what a micro-batch took.
    """

    def __init__(self, device: torch.device, listener: Callable[[float], None]) -> None:
        self._listener = listener
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._is_cuda:
            span = (self._mark(), self._mark())
            span[0].record()
            yield
            span[1].record()
            self._spans.append(span)
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    @staticmethod
    def _mark() -> torch.cuda.Event:
        mark: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return mark

    def tell(self, data_s: float, num_micro: int) -> None:
        """Tells of the step before. To be called when the device has caught up with it; else it waits for that.

        Args:
            data_s: What reading a step's data took.
            num_micro: The micro-batches that this rank does in a step.
        """
        seconds, self._seconds = self._seconds, 0.0
        for begin, end in self._spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._spans.clear()
        if num_micro and seconds:
            self._listener((data_s + seconds) / num_micro)
