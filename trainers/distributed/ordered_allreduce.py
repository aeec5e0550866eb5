"""All-reduce in rank order, and the communication hooks of DDP.

Stock DDP adds in an order that depends on its buckets, and rebuilds them after the first step: with three or more ranks
a resumed run differs in the last bits from an uninterrupted one. Here each rank owns one chunk, receives all ranks'
parts of it (all-to-all), adds them in rank order and distributes the sum (all-gather), independent of the buckets. This
moves as many bytes as a ring. Addition of two terms is commutative, so two ranks do not need it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional


def ordered_sum_(flat: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Replace a one-dimensional tensor on every rank by the sum over the ranks, added in rank order."""
    missing = -flat.numel() % dist.get_world_size(group)
    padded = functional.pad(flat, (0, missing)) if missing else flat
    dist.all_gather_into_tensor(padded, sum_of_parts(padded, group), group=group)
    return flat.copy_(padded[: flat.numel()]) if missing else flat


def sum_of_parts(flat: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum over the ranks, added in rank order, of this rank's chunk of `flat`: one equal chunk per rank."""
    received = torch.empty_like(flat)
    dist.all_to_all_single(received, flat, group=group)
    total, *others = received.chunk(dist.get_world_size(group))
    for part in others:
        total += part
    return total


def rank_order_hook(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(ordered_sum_(bucket.buffer()))
    return done


def any_order_hook(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda result: result.value()[0])
    return future
