"""Loss scaling for fp16: the only part of a step's computation that depends on earlier steps.

So its state must be in every checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import torch

from outlast.trainers.config.train import Precision, TrainSettings


def make_scaler(train: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler of fp16; for other precisions a disabled one."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=train.loss_scale,
        growth_interval=train.loss_scale_window,
        enabled=train.precision is Precision.FP16,
    )


def apply_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Apply unscaled gradients. Returns False if they overflowed and the update was skipped.

    The gradients are sums over the ranks, so all ranks see the same overflow.
    """
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Return a scaler's state as JSON; empty if it is disabled."""
    state = scaler.state_dict()
    return {key: state[key] for key in ("scale", "_growth_tracker") if key in state}


def load_scaler(scaler: torch.amp.GradScaler, saved: Mapping[str, Any]) -> None:
    """Restore `scaler_state`."""
    if saved:
        scaler.load_state_dict({**scaler.state_dict(), **saved})
