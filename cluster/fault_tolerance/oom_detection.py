"""Detection of out-of-memory failures, and the advice for them.

Ray and the kernel end a process without an exception in it, so this reads error texts, Ray's tables and the kernel's
counters. It must never block a restart: a node that does not answer counts as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from outlast.trainers.host_info import num_oom_kills

DEVICE_ADVICE = (
    "spread the model over the workers with scale.parallel: fsdp, or, in a run that has no checkpoint yet, halve "
    "train.micro_batch, set train.gradient_checkpointing: true or train.precision: bf16"
)
HOST_ADVICE = (
    "run fewer workers on a node (a larger scale.cpus_per_worker), set checkpoint.overlap: false, or take nodes with "
    "more memory"
)

_DEVICE_WORDS = ("CUDA out of memory", "HIP out of memory", "XPU out of memory", "CUDA_ERROR_OUT_OF_MEMORY")
_HOST_WORDS = ("DefaultCPUAllocator", "MemoryError", "Cannot allocate memory")
_RAY_WORDS = ("oom_context", "Memory on the node", "running low on memory")
_TIMEOUT_S = 5.0


def is_device_shortage(message: str) -> bool:
    """Return whether an error message means that an accelerator's memory ran out."""
    return any(word in message for word in _DEVICE_WORDS)


def is_host_shortage(message: str) -> bool:
    """Return whether an error message, or Ray's reason for ending a worker, means that host memory ran out."""
    return any(word in message for word in (*_HOST_WORDS, *_RAY_WORDS))


def was_killed_by_kernel(worker: Mapping[str, Any]) -> bool:
    """Return whether the kernel of a dead worker's node has killed a process for lack of memory since the worker began.

    Args:
        worker: The rank in the attempt's claim: `node`, and `oom_kills` at its start.
    """
    before = worker.get("oom_kills")
    if before is None:
        return False
    if worker["node"] == ray.get_runtime_context().get_node_id():
        return (num_oom_kills() or 0) > int(before)
    on_node = NodeAffinitySchedulingStrategy(worker["node"], soft=False)
    read_count = ray.remote(num_cpus=0, scheduling_strategy=on_node, max_retries=0)(num_oom_kills)
    with suppress(RayError, ValueError):  # the node does not answer: unknown
        now: int | None = ray.get(read_count.remote(), timeout=_TIMEOUT_S)
        return now is not None and now > int(before)
    return False


def log_of_this_process() -> str:
    """Return the file that this process' stderr is redirected to, or an empty string."""
    with suppress(OSError):
        target = Path("/proc/self/fd/2").readlink()
        return str(target) if target.is_absolute() and not str(target).startswith("/dev/") else ""
    return ""
