"""Weights by their Hugging Face names, whatever wraps the model.

Prefixes of wrappers (`module.`, `_orig_mod.`) must never reach a file: `from_pretrained` would load such a file without
raising, and leave the weights random. So wrappers are taken off the module, not off the names, and loading is strict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import WEIGHTS
from outlast.checkpointing.format.safetensors import TensorSpec

_WRAPPERS = (DataParallel, DistributedDataParallel)
#: What wrappers of inner modules (`torch.compile`, activation checkpoints) put into names.
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module)\.")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module under DDP, DataParallel and `torch.compile`, in any order."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


#: Indices and ranges, one a dimension; an index takes the dimension away. None at all: the whole.
Cut = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class WeightNaming:
    """Which weights make the Hugging Face part of a checkpoint, and what they are called there.

    Attributes:
        file: The file's name, when it is one.
        names: The model's own name to the file's, of those that are saved; None for all, as they are called.
        cuts: For a weight of the model that is several in a file, such as stacked experts: the file's names, and which
            part of the weight each of them is. Before `names`.
    """

    file: str = WEIGHTS
    names: Mapping[str, str] | None = None
    cuts: Mapping[str, Mapping[str, Cut]] = field(default_factory=dict)

    def of(self, name: str) -> Mapping[str, Cut]:
        """The file's names for a weight, each with its part of the weight; none if it is not saved."""
        if name in self.cuts:
            return self.cuts[name]
        called = name if self.names is None else self.names.get(name)
        return {} if called is None else {called: ()}


ALL = WeightNaming()


def named_weights(model: nn.Module, naming: WeightNaming = ALL) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, in the order of `state_dict`; tied ones once, under the first name.

    The tensors are the model's own, not copies; DTensors where the model is sharded.
    """
    inner = unwrap(model)
    seen: set[tuple[object, ...]] = set()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in inner.state_dict(keep_vars=True).items():
        key, parts = _identity(tensor), naming.of(plain_name(name))
        if not parts or key in seen:
            continue
        seen.add(key)
        for called, cut in parts.items():
            if cut and isinstance(tensor, DTensor):
                raise ConfigError(
                    f"{name} is several weights in a file, and it is sharded; outlast cannot cut it then",
                    hint="train this architecture without sharding (DDP)",
                )
            weights[called] = tensor.detach()[cut] if cut else tensor.detach()
    return weights


def parameter_names(model: nn.Module, naming: WeightNaming = ALL) -> set[str]:
    """Names of what only an optimizer changes; the rest of `named_weights` may change in a forward pass."""
    own = (plain_name(name) for name, _ in unwrap(model).named_parameters(remove_duplicate=False))
    return {called for name in own for called in naming.of(name)}


def plain_name(name: str) -> str:
    """The name without what wrappers of inner modules add."""
    return _INNER.sub("", name)


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0 or isinstance(tensor, DTensor):
        return ("itself", id(tensor))  # sharding keeps tied parameters the same object
    storage = tensor.untyped_storage()
    place = (storage._cdata if tensor.is_meta else storage.data_ptr(), tensor.storage_offset())  # meta has no address
    return (*place, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def check_weights(model: nn.Module, found: Mapping[str, TensorSpec]) -> None:
    """Refuses weights, by their own names, that are another model's. Raises as `compare_weights`."""
    compare_weights({name: TensorSpec.of(tensor) for name, tensor in named_weights(model).items()}, found)


def compare_weights(own: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    """Refuses a checkpoint's weights that are another model's, before they are read.

    Args:
        own: Type and whole shape of each weight of the model.
        found: The same, of the checkpoint.

    Raises:
        ConfigError: They do not fit.
    """
    problems = [f"{name} is missing" for name in own.keys() - found.keys()]
    problems += [f"{name} is not in the model" for name in found.keys() - own.keys()]
    for name in own.keys() & found.keys():
        mine, theirs = own[name], found[name]
        if mine != theirs:
            problems.append(f"{name}: {list(theirs.shape)} {theirs.dtype}, wanted {list(mine.shape)} {mine.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; …" if len(problems) > 5 else "")
        raise ConfigError(
            f"the checkpoint holds the weights of another model ({len(problems)} differences: {shown})",
            hint="put `model:` back to what the run was started with, or start a new run under another name",
        )


def carried_state(model: nn.Module) -> list[str]:
    """Names of what is saved and is no parameter: running means, memories. A forward pass may change it, and then what
    a rank computes depends on the micro-batches that it had before.
    """
    return sorted(named_weights(model).keys() - parameter_names(model))
