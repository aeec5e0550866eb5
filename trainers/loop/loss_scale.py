"""How a step is computed where that is a choice: fp16's loss scale, recomputed activations, compiled kernels.

None of it may make a step depend on the steps before, the loss scale excepted, which is in every checkpoint. So kernels
are compiled for one shape each: a kernel for any shape would depend on which shape came first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from outlast.trainers.config.train import Precision, TrainSettings


def make_scaler(train: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    """The loss scale of fp16; for other precisions one that does nothing."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=train.loss_scale,
        growth_interval=train.loss_scale_window,
        enabled=train.precision is Precision.FP16,
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
