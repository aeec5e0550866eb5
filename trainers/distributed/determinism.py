"""Deterministic algorithms and seeds."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from outlast.trainers.data.sampler import mix


def seed_everything(*parts: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (all devices). The rank must not be among the integers."""
    key = mix(*parts)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    if torch.accelerator.is_available():
        torch.manual_seed(key >> 1)
    else:
        torch.default_generator.manual_seed(key >> 1)  # the same, without a stack trace for a device that may come


def make_deterministic(enabled: bool, num_threads: int) -> None:
    """Fixes what changes bits: the number of intra-op threads and, if enabled, the choice of kernels."""
    torch.set_num_threads(num_threads)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # Else torch writes NaN into every tensor before its first use, which only shows who reads what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
