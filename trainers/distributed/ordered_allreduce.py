"""All-reduce in rank order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn import functional


def ordered_sum_(flat: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Replaces a one-dimensional tensor, on every rank, by the sum over the ranks, added in rank order."""
    missing = -flat.numel() % dist.get_world_size(group)
    padded = functional.pad(flat, (0, missing)) if missing else flat
    dist.all_gather_into_tensor(padded, sum_of_parts(padded, group), group=group)
    return flat.copy_(padded[: flat.numel()]) if missing else flat


def sum_of_parts(flat: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over the ranks, added in rank order, of this rank's chunk; `flat` has one of equal size for each."""
    received = torch.empty_like(flat)
    dist.all_to_all_single(received, flat, group=group)
    total, *others = received.chunk(dist.get_world_size(group))
    for part in others:
        total += part
    return total


def _sum_in_rank_order(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(ordered_sum_(bucket.buffer()))
    return done


def _sum_in_any_order(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda result: result.value()[0])
    return future
