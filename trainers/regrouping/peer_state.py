"""The state of a training group in memory: who holds the newest, and its copy to those who lack it.

A step is a pure function, so two ranks that have done equally many steps hold the same bits, and a rank that has done
one more is right: the others copy. Nothing is read from the storage. Weights and moments are sent in flat pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from outlast.checkpointing.state.loop_state import decode_state, encode_state
from outlast.checkpointing.state.named_weights import carried_state
from outlast.checkpointing.state.optimizer_groups import encode_optimizer, load_groups
from outlast.checkpointing.state.optimizer_state import devices_of_state, load_optimizer, optimizer_tensors
from outlast.trainers.distributed.world import World
from outlast.trainers.regrouping.membership import RegroupFailed

#: How far a rank's loop is: steps, entries of its history, and whether the newest step's end is done.
Progress = tuple[int, int, int]
_PIECE_BYTES, _LARGE_BYTES = 4 * 2**20, 2**18


def newest_holder(progress: Sequence[Progress | None]) -> int:
    """Return the rank that holds the newest state, the lowest of equals; at least one holds any."""
    held = [(item, -rank) for rank, item in enumerate(progress) if item is not None]
    return -max(held)[1]


def share_state(
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress | None,
    state: Mapping[str, Any] | None,
    forget: Callable[[], None],
) -> tuple[int, dict[str, Any]]:
    """Bring every rank to the newest state that one of them holds. Every rank calls it.

    Args:
        world: This rank.
        model: The unwrapped model, built alike on each rank, so that what is not trained is equal.
        optimizer: Its optimizer.
        progress: How far this rank is; None if it holds no state.
        state: The rest of this rank's state; None if it holds none.
        forget: Called before this rank's tensors are overwritten: if the source is lost meanwhile, they are a mixture.

    Returns:
        The rank that held the newest state, and that state without the tensors.

    Raises:
        RegroupFailed: Rank 0 alone holds a part of the state, as of buffers that forward passes change.
    """
    if carried_state(model):
        raise RegroupFailed("the model has buffers that only rank 0 keeps; they are in its checkpoints alone")
    everyone = world.gather(progress)
    source = newest_holder(everyone)
    newest = everyone[source]
    assert newest is not None
    head: Any = None
    if world.rank == source:
        assert state is not None
        moments = optimizer_tensors(model, optimizer)
        specs = [(name, item.dtype, tuple(item.shape)) for name, item in moments.items()]
        head = (encode_state(state), encode_optimizer(model, optimizer), specs)
    text, described, specs = _broadcast(world, source, head)
    holders = [item is not None and item[0] == newest[0] for item in everyone]
    if not all(holders):
        if not holders[world.rank]:
            forget()
        _share_tensors(world, model, optimizer, source, specs, is_holder=holders[world.rank])
        if not holders[world.rank]:
            load_groups(optimizer, described, "the state in memory")
    return source, decode_state(text.encode(), "the state in memory")


def _broadcast(world: World, source: int, item: Any) -> Any:
    items = [item]
    if world.group is not None:
        dist.broadcast_object_list(items, src=source, group=world.group)
    return items[0]


def _share_tensors(
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: int,
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]],
    *,
    is_holder: bool,
) -> None:
    """Send the trained weights and the optimizer's state from `source`. Those who hold them get equal bits."""
    weights = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    devices = devices_of_state(model, optimizer, [name for name, *_ in specs])
    moments = (
        optimizer_tensors(model, optimizer)
        if is_holder
        else {name: torch.empty(shape, dtype=dtype, device=devices[name]) for name, dtype, shape in specs}
    )
    for piece in _pieces([*weights, *(moments[name] for name, *_ in specs)]):
        _send_piece(world, piece, source)
    if not is_holder:
        load_optimizer(model, optimizer, moments)


def _pieces(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors, in order: a large one is sent alone, small ones together."""
    piece: list[torch.Tensor] = []
    for tensor in tensors:
        if _is_alone(tensor):
            yield [tensor]
            continue
        piece.append(tensor)
        if sum(item.nbytes for item in piece) >= _PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


def _is_alone(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is sent from its own memory into that of the others; equal on all ranks."""
    return tensor.nbytes >= _LARGE_BYTES and tensor.device.type == "cpu"


@torch.no_grad()
def _send_piece(world: World, piece: list[torch.Tensor], source: int) -> None:
    first, is_source = piece[0], world.rank == source
    if _is_alone(first):
        flat = first if first.is_contiguous() else first.contiguous()
        dist.broadcast(flat.view(torch.uint8), src=source, group=world.group)
        if flat is not first and not is_source:
            first.copy_(flat)
        return
    sizes = [item.nbytes for item in piece]
    if is_source:
        flat = torch.cat([item.contiguous().reshape(-1).view(torch.uint8).cpu() for item in piece])
    else:
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(flat, src=source, group=world.group)
    if is_source:
        return
    for item, part in zip(piece, torch.split(flat, sizes), strict=True):
        if part.numel():
            # A copy of its own: a view of another type needs an offset that is a multiple of its size.
            item.copy_(part.clone().view(item.dtype).view(item.shape))
