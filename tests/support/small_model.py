"""A model of a few weights with an optimizer, for tests of the checkpoint room that need no worker group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from outlast.checkpointing.format.safetensors import TensorSpec, tensor_bytes
from outlast.checkpointing.state.named_weights import check_weights, named_weights
from outlast.checkpointing.state.optimizer_state import optimizer_tensors


def small_model(seed: int = 0, width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers and AdamW; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One update that follows from `step` alone."""
    width = next(model.parameters()).shape[1]
    inputs = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def digests_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """As `reader.tensor_digests`, of what is in memory."""
    tensors = {**named_weights(model), **optimizer_tensors(model, optimizer)}
    return {
        name: hashlib.sha256(f"{item.dtype}{list(item.shape)}".encode() + tensor_bytes(item)).hexdigest()
        for name, item in tensors.items()
    }


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Strictly, as a resume does it."""
    check_weights(model, {name: TensorSpec.of(tensor) for name, tensor in weights.items()})
    with torch.no_grad():
        for name, tensor in named_weights(model).items():
            tensor.copy_(weights[name])
