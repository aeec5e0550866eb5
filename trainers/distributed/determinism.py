"""Deterministic kernels, and seeds of all random generators. A seed must never depend on the rank."""

import os
import random

import numpy as np
import torch

from outlast.trainers.data.batch_plan import derive_seed


def seed_everything(*parts: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices). The rank must not be among the integers."""
    key = derive_seed(*parts)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    if torch.accelerator.is_available():
        torch.manual_seed(key >> 1)
    else:
        torch.default_generator.manual_seed(
            key >> 1
        )  # the same, without the stack trace that torch records for a later device


def make_deterministic(enabled: bool, num_threads: int) -> None:
    """Fix what may change bits: the number of intra-op threads and, if enabled, the choice of kernels."""
    torch.set_num_threads(num_threads)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # By default torch would fill each new tensor with NaN, which only helps to find reads of uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
