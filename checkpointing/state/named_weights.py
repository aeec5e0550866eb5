"""The weights of a model by their Hugging Face names, whatever wraps the model.

Prefixes of wrappers (`module.`, `_orig_mod.`) must never reach a file: `from_pretrained` would load such a file without
an error and leave the weights random. So wrappers are removed from the module, not from names, and loading is strict.
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
from outlast.checkpointing.state.shards import Cut

_WRAPPERS = (DataParallel, DistributedDataParallel)
#: Prefixes that wrappers of inner modules (`torch.compile`, activation checkpointing) add to names.
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module)\.")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel and `torch.compile`, in any order."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@dataclass(frozen=True, slots=True)
class WeightNaming:
    """Which weights are in the Hugging Face part of a checkpoint, and their names there."""

    file: str = WEIGHTS  #: name of the weights file, if there is one only
    #: Name in the model to name in the file, of the saved weights; None for all, unchanged
    names: Mapping[str, str] | None = None
    #: For a weight that is several in the file, such as stacked experts: the names in the file, and the part of the
    #: weight that each is. Takes precedence over `names`.
    cuts: Mapping[str, Mapping[str, Cut]] = field(default_factory=dict)
    #: Other namings that an earlier checkpoint of the run may have; the run then goes on with that one.
    older: tuple[WeightNaming, ...] = ()

    def of(self, name: str) -> Mapping[str, Cut]:
        """Return the names in the file for a weight, each with its part; empty if it is not saved."""
        if name in self.cuts:
            return self.cuts[name]
        file_name = name if self.names is None else self.names.get(name)
        return {} if file_name is None else {file_name: ()}


ALL = WeightNaming()


def named_weights(model: nn.Module, naming: WeightNaming = ALL) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers in the order of `state_dict`; tied ones once, by the first name.

    The tensors are the model's own, not copies; DTensors where the model is sharded, and those cannot be cut.
    """
    return {name: tensor[cut] if cut else tensor for name, (tensor, cut) in weight_slices(model, naming).items()}


def weight_slices(model: nn.Module, naming: WeightNaming = ALL) -> dict[str, tuple[torch.Tensor, Cut]]:
    """As `named_weights`, but return for each weight the tensor of the model and the part of it that the weight is."""
    inner = unwrap(model)
    seen: set[tuple[object, ...]] = set()
    weights: dict[str, tuple[torch.Tensor, Cut]] = {}
    for name, tensor in inner.state_dict(keep_vars=True).items():
        key, parts = identity(tensor), naming.of(plain_name(name))
        if not parts or key in seen:
            continue
        seen.add(key)
        weights |= {file_name: (tensor.detach(), cut) for file_name, cut in parts.items()}
    return weights


def parameter_names(model: nn.Module, naming: WeightNaming = ALL) -> set[str]:
    """Return the names of weights that only an optimizer changes; a forward pass may change the others."""
    own = (plain_name(name) for name, _ in unwrap(model).named_parameters(remove_duplicate=False))
    return {file_name for name in own for file_name in naming.of(name)}


def plain_name(name: str) -> str:
    """Remove the prefixes of wrappers of inner modules."""
    return _INNER.sub("", name)


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that tied weights share, and others do not."""
    if tensor.numel() == 0 or isinstance(tensor, DTensor):
        return ("itself", id(tensor))  # sharding keeps tied parameters the same object
    storage = tensor.untyped_storage()
    address = (storage._cdata if tensor.is_meta else storage.data_ptr(), tensor.storage_offset())  # meta has no pointer
    return (*address, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def check_weights(model: nn.Module, saved: Mapping[str, TensorSpec]) -> None:
    """Compare the weights of a model with saved ones. Raises as `compare_weights`."""
    compare_weights({name: TensorSpec.of(tensor) for name, tensor in named_weights(model).items()}, saved)


def compare_weights(own: Mapping[str, TensorSpec], saved: Mapping[str, TensorSpec]) -> None:
    """Compare a model's weights with a checkpoint's before these are read. Raises ConfigError if they differ."""
    problems = [f"{name} is missing" for name in own.keys() - saved.keys()]
    problems += [f"{name} is not in the model" for name in saved.keys() - own.keys()]
    for name in own.keys() & saved.keys():
        mine, theirs = own[name], saved[name]
        if mine != theirs:
            problems.append(f"{name}: {list(theirs.shape)} {theirs.dtype}, not {list(mine.shape)} {mine.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; …" if len(problems) > 5 else "")
        raise ConfigError(
            f"the checkpoint holds the weights of another model ({len(problems)} differences: {shown})",
            hint="put `model:` back to what the run was started with, or start a new run under another name",
        )


def plain_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers by the names that `named_weights` gives them. The tensors are the model's own."""
    return [(plain_name(name), buffer) for name, buffer in unwrap(model).named_buffers()]


def carried_state(model: nn.Module) -> list[str]:
    """Return the names of saved tensors that are not parameters, such as running means.

    If a forward pass changes them, the results of a rank depend on its earlier micro-batches.
    """
    return sorted(named_weights(model).keys() - parameter_names(model))
