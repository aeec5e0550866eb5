"""Private parts of torch: imported here alone. Tried on torch 2.13."""

import torch
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)


def limit_recompiles(num_shapes: int) -> None:
    """Limit for how many shapes a function is compiled. Beyond them it fails: uncompiled kernels have other bits."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = num_shapes
    dynamo.fail_on_recompile_limit_hit = True
    if torch.are_deterministic_algorithms_enabled() and hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # no choice of kernels by the clock
