"""Weights by their Hugging Face names, whatever wraps the model.

Prefixes of wrappers (`module.`, `_orig_mod.`) must never reach a file: `from_pretrained` would load such a file without
raising, and leave the weights random. So wrappers are taken off the module, not off the names, and loading is strict.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from outlast.checkpointing.errors import ConfigError

_WRAPPERS = (DataParallel, DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module under DDP, DataParallel and `torch.compile`, in any order."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, in the order of `state_dict`; tied ones once, under the first name.

    The tensors are the model's own, not copies.
    """
    inner = unwrap(model)
    seen: set[tuple[object, ...]] = set()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in inner.state_dict(keep_vars=True).items():
        key = _identity(tensor)
        if key not in seen:
            weights[name] = tensor.detach()
            seen.add(key)
    return weights


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0:
        return ("empty", id(tensor))
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies the weights into the model, strictly: the same names, shapes and dtypes, nothing missing or left over.

    Raises:
        ConfigError: They are another model's weights.
    """
    own = named_weights(model)
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [f"{name} is not in the model" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        mine, theirs = own[name], weights[name]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            problems.append(f"{name}: {list(theirs.shape)} {theirs.dtype}, wanted {list(mine.shape)} {mine.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; …" if len(problems) > 5 else "")
        raise ConfigError(
            f"the checkpoint holds the weights of another model ({len(problems)} differences: {shown})",
            hint="put `model:` back to what the run was started with, or start a new run under another name",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
