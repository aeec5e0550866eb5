"""The ranks of an attempt, their device, and how their gradients are added.

Stock DDP adds in an order that depends on its buckets, and it rebuilds them after the first step: from three ranks on,
a resumed run differs in the last bits from one that went through. The ordered reducer adds in rank order whatever the
buckets: each rank owns one chunk, receives everyone's part of it (all-to-all), adds them in order, and hands the sum
round (all-gather). That moves as many bytes as a ring. Two terms have one sum, so two ranks need none of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpointing.state.model_weights import carried_state
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.trainers.config.train import Exactness, Precision
from outlast.trainers.data.sampler import share
from outlast.trainers.distributed.ordered_allreduce import _sum_in_any_order, _sum_in_rank_order


class World(RankGroup):
    """This process among the workers.

    Attributes:
        device: Where this rank computes.
        node: Name of the machine, as the cluster calls it.
        log: Where this rank's stderr goes, if anybody keeps it.
        marks: When this process reached what on its way to the first step, in seconds since the epoch.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        node: str = "",
        log: str = "",
        marks: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.node, self.log = node, log
        self.device = device or torch.device("cpu")
        self.marks = dict(marks)

    def mark(self, name: str) -> dict[str, float]:
        """Notes that this process has reached `name`, and returns all marks. For people: nothing may depend on them."""
        self.marks[name] = round(time.time(), 3)
        return dict(self.marks)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over the ranks, of a float64 tensor on the host.

        Exact for counts, and for values that are zero on all ranks but one: then the order does not matter.
        """
        return self.add_meanwhile(values)()

    def add_meanwhile(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As `add`, but begins only. What it returns waits for the sum; it is to be called before the next `add`."""
        assert values.dtype == torch.float64
        work: Any = None if self.group is None else dist.all_reduce(values, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            return values

        return wait

    def autocast(self, precision: Precision) -> torch.autocast:
        """The context of a forward pass: bf16 or fp16 where an operation allows it, or nothing for fp32."""
        dtype = torch.float16 if precision is Precision.FP16 else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=precision is not Precision.FP32)

    def num_idle(self, num_micro: int, model: nn.Module) -> int:
        """How often this rank must run `model` besides its share of `num_micro`, lest the others wait for it for ever.

        Every pass through a sharded model is collective, and every step through DDP. What an idle pass computes must
        not count.
        """
        mine = len(share(num_micro, self.rank, self.size))
        if isinstance(model, FSDPModule):
            return -(-num_micro // self.size) - mine
        return int(isinstance(model, DistributedDataParallel) and not mine)

    def parallelize(self, model: nn.Module, exactness: Exactness) -> nn.Module:
        """The model under DDP with the reducer that `exactness` asks for.

        The model itself for a single rank, when it is sharded, and for `elastic`, whose reducer needs no wrapper.
        """
        if self.size == 1 or isinstance(model, FSDPModule) or exactness is Exactness.ELASTIC:
            return model
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=bool(carried_state(model)),  # what is saved must be rank 0's on every rank
            gradient_as_bucket_view=True,  # the sum need not be copied back
        )
        is_ordered = exactness is Exactness.SAME_WORLD and self.size > 2
        hook = _sum_in_rank_order if is_ordered else _sum_in_any_order
        wrapped.register_comm_hook(None, lambda _, bucket: hook(bucket))  # DDP dislikes annotations as text
        return wrapped
