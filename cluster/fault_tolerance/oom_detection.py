"""Telling that memory ran out, and what to change then. Ray and the kernel end a process without asking it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
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
_RAYS_WORDS = ("oom_context", "Memory on the node", "running low on memory")
_PATIENCE_S = 5.0


def is_device_shortage(said: str) -> bool:
    """Whether an exception says that an accelerator's memory ran out."""
    return any(word in said for word in _DEVICE_WORDS)


def is_host_shortage(said: str) -> bool:
    """Whether an exception, or Ray of a worker that it ended, says that a machine's memory ran out."""
    return any(word in said for word in (*_HOST_WORDS, *_RAYS_WORDS))


def was_killed_by_kernel(worker: Mapping[str, Any]) -> bool:
    """Whether the kernel of a dead worker's node has killed something for want of memory since the worker began.

    Args:
        worker: What the attempt's claim says of the rank: `node`, and `oom_kills` at its start.
    """
    before = worker.get("oom_kills")
    if before is None:
        return False
    if worker["node"] == ray.get_runtime_context().get_node_id():
        return (num_oom_kills() or 0) > int(before)
    there = NodeAffinitySchedulingStrategy(worker["node"], soft=False)
    look = ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(num_oom_kills)
    with suppress(RayError, GetTimeoutError, ValueError):  # the node does not answer: then nobody knows
        now: int | None = ray.get(look.remote(), timeout=_PATIENCE_S)
        return now is not None and now > int(before)
    return False


def log_of_this_process() -> str:
    """The file that this process' stderr goes to, or nothing."""
    with suppress(OSError):
        target = Path("/proc/self/fd/2").readlink()
        return str(target) if target.is_absolute() and not str(target).startswith("/dev/") else ""
    return ""
