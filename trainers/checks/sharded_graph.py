"""Check that a model can be sharded: all ranks must gather the same blocks in the same order, and reduce the same
gradients, or they would wait for each other, or add what does not belong together.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.distributed.fsdp import blocks
from outlast.trainers.tasks.model_inputs import base_model

_DDP = "-s scale.parallel=ddp"


def check_can_shard(model: nn.Module) -> None:
    """Check what needs no forward pass.

    Raises:
        ConfigError: The model has a parameter without dimensions, a block of parameters of several types, layers that
            are left out at random, or experts that are modules of their own.
    """
    name = type(unwrap(model)).__name__
    scalars = [key for key, parameter in model.named_parameters() if not parameter.ndim]
    if scalars:
        hint = f"{_DDP}, or give it one dimension, of length 1"
        raise ConfigError(f"{name}: {scalars[0]} has no dimension, so it cannot be sharded", hint=hint)
    groups = [list(block.parameters()) for block in blocks(model)]
    in_blocks = {id(parameter) for group in groups for parameter in group}
    for group in [*groups, [item for item in model.parameters() if id(item) not in in_blocks]]:
        types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in group})
        if len(types) > 1:
            raise ConfigError(
                f"{name} cannot be sharded: a block of it has weights of the types {', '.join(types)}", hint=_DDP
            )
    if drops_layers(model):
        raise ConfigError(
            f"{name} leaves layers out at random, other ones on each rank, so it cannot be sharded",
            hint=f"{_DDP}, or set its layerdrop to 0",
        )
    experts = [
        key
        for key, item in model.named_modules()
        if key.endswith("experts") and isinstance(item, (nn.ModuleList, nn.ModuleDict))
    ]
    if experts:
        raise ConfigError(
            f"{name} cannot be sharded: {experts[0]} are modules of their own, and which of them a rank uses depends "
            "on its tokens",
            hint=_DDP,
        )
    if getattr(getattr(base_model(model), "config", None), "zero_expert_num", 0):  # of LongCat-Flash
        raise ConfigError(
            f"{name} cannot be sharded: all tokens of a rank may go to experts without weights (zero_expert_num)",
            hint=_DDP,
        )


def drops_layers(model: nn.Module) -> bool:
    """Return whether the model leaves out layers at random (LayerDrop)."""
    configs = {
        id(item): item
        for module in base_model(model).modules()
        if (item := getattr(module, "config", None)) is not None
    }
    return any(_drops_layers(item.to_dict()) for item in configs.values() if hasattr(item, "to_dict"))


def _drops_layers(settings: Any) -> bool:
    """Return whether settings, or those within them, set a probability of leaving a layer out."""
    if isinstance(settings, (list, tuple)):
        return any(map(_drops_layers, settings))
    return isinstance(settings, dict) and any(
        ("layerdrop" in str(name).lower() and value) or _drops_layers(value) for name, value in settings.items()
    )


class BlockUse:
    """The blocks that each forward pass runs, in order, and the parameters in the graph of its loss.

    Args:
        model: The model, not sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._blocks = blocks(model)
        self._block_names = {id(module): name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._uses: list[tuple[list[str], set[str]]] = []
        for block in self._blocks:
            block.register_forward_pre_hook(self._begin)

    def _begin(self, block: nn.Module, _args: Any) -> None:
        self._running.append(self._block_names[id(block)])

    def begin(self) -> None:
        """Forget the blocks that ran before."""
        self._running = []

    def end(self, leaves: set[torch.Tensor]) -> None:
        """Record a forward pass. `leaves` are the parameters that get a gradient from its loss."""
        used = {self._names[id(item)] for item in leaves if id(item) in self._names}
        for block in self._blocks:
            name = self._block_names[id(block)]
            if name not in self._running and any(f"{name}.{own}" in used for own, _ in block.named_parameters()):
                raise ConfigError(
                    f"{name} cannot be sharded: the model calls its `forward` instead of the module itself", hint=_DDP
                )
        self._uses.append((self._running, used))

    def check(self) -> None:
        """Raise ConfigError if two of the passes differ."""
        (first, used), *others = self._uses
        for order, also_used in others:
            pairs: Sequence[tuple[str | None, str | None]] = list(zip_longest(first, order))
            changed = next((one or other for one, other in pairs if one != other), None) or min(
                used ^ also_used, default=None
            )
            if changed:
                raise ConfigError(
                    f"the micro-batches of a step use different blocks or parameters, such as {changed}, so the model "
                    "cannot be sharded",
                    hint=_DDP,
                )
