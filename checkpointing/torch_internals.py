"""Private parts of torch: imported here alone. Tried on torch 2.13."""

from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.nn.parallel.distributed import _find_tensors


def find_tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors in outputs of a model, found where DDP looks for them."""
    return list(_find_tensors(outputs))  # type: ignore[no-untyped-call]


def limit_recompiles(num_shapes: int) -> None:
    """Limit for how many shapes a function is compiled. Beyond them it fails: uncompiled kernels have other bits."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = num_shapes
    dynamo.fail_on_recompile_limit_hit = True
    if torch.are_deterministic_algorithms_enabled() and hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # no choice of kernels by the clock


def abort_groups() -> None:
    """Abort all process groups whose backend can: NCCL's collectives raise, also those that wait."""
    distributed_c10d._abort_process_group()


def restart_group_names() -> None:
    """Number process groups from zero again, as other processes do; a group that failed to connect was counted."""
    distributed_c10d._world.group_count = 0
