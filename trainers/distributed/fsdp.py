"""FSDP2: every rank holds a shard of the model, and gathers the others block by block while it computes.

Each pass through a sharded model is collective, so ranks with fewer micro-batches must run idle passes. Gradients are
added in rank order, as under DDP; this module enforces the order, because no library guarantees one.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.train import Exactness
from outlast.trainers.distributed.ordered_allreduce import sum_of_parts
from outlast.trainers.distributed.world import World


def shard(model: nn.Module, world: World, exactness: Exactness) -> nn.Module:
    """Shard the model's parameters over the ranks, in place: each transformer block by itself, the rest together."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the step's count already
            module.set_force_sum_reduction_for_comms(True)
            if exactness is Exactness.SAME_WORLD:
                module.set_custom_reduce_scatter(_OrderedReduceScatter())  # type: ignore[arg-type]  # a private protocol
    return model.to(world.device)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: module-list items of a class in `_no_split_modules`, else of the largest list.

    A block that shares a parameter with the rest of the model is left out: a parameter can be in one shard group only.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer, _ in lists):
            lists.append((name, module))
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    candidates = [item for _, items in lists for item in items if type(item).__name__ in no_split]
    if not candidates and lists:
        _, largest = max(lists, key=lambda named: sum(parameter.numel() for parameter in named[1].parameters()))
        candidates = [part for item in largest for part in (item if isinstance(item, nn.ModuleList) else [item])]
    uses = _uses(model)
    return [item for item in candidates if (own := _uses(item)) and all(uses[key] == own[key] for key in own)]


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


class BlockOrder:
    """The order in which this rank gathers the parts of a sharded model. It must be the same on all ranks.

    Args:
        model: The sharded model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._order: list[int] = []
        self._names: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(partial(self._begin, len(self._names)))  # type: ignore[attr-defined]
                self._names.append(name)

    def _begin(self, index: int, _module: nn.Module, _args: Any) -> None:
        self._order.append(index)

    def check(self, world: World) -> None:
        """Compare the passes since the last call. Every rank calls it, before the weights change.

        Raises:
            ConfigError: The ranks gathered different parts, so the gradients are wrong.
        """
        order, self._order = self._order, []
        digests = torch.zeros(world.size, dtype=torch.float64)
        digests[world.rank] = xxhash.xxh3_64_intdigest(str(order).encode()) >> 12  # a float64 holds 52 bits
        if (digests := world.add(digests)).ne(digests[0]).any():
            raise ConfigError(
                f"the ranks ran different blocks of the sharded model in one step, rank {world.rank} "
                f"{', '.join(self._names[index] or 'the model' for index in order[:10])}, …: their gradients are wrong",
                hint="-s scale.parallel=ddp",
            )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor, gathered from all ranks if it is sharded. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _OrderedReduceScatter:
    """Reduce-scatter in rank order: the sum over the ranks of this rank's chunk."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        assert not async_op
        output_tensor.copy_(sum_of_parts(input_tensor, group))
