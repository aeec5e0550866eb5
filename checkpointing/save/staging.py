"""Staging: the host copy of a step's state, taken while training continues.

The state only changes in the optimizer's step, so the copy may overlap the next forward and backward pass: a pre-hook
of the optimizer step waits for it, which is the only fence. Buffers are allocated once and reused, because fresh pages
cost more than the copy (`StateDictStager` of github.com/pytorch/pytorch does the same).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.shards import LocalShard

_ALIGNMENT = 64
_SPARE_BYTES = 256 * 2**20


class StagingBuffer:
    """Host buffers for one rank's payload, and the copy into them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, parts: Mapping[str, LocalShard], num_sharing: int = 1) -> None:
        """Allocate the buffers for `parts` unless they are large enough; `num_sharing` ranks of this machine do so.

        Raises ConfigError if they do not fit into this machine's memory.
        """
        num_bytes = bytes_needed(parts)
        if num_bytes <= self._buffer.numel():
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)
        free = free_bytes()
        if num_sharing * num_bytes + _SPARE_BYTES > free:
            raise ConfigError(
                f"the snapshot of a rank needs {num_bytes:,} bytes of host memory; this machine has "
                f"{num_sharing} of the ranks, and {free:,} bytes are free",
                hint="set checkpoint.overlap: false, which writes from the weights themselves while training waits; "
                "or use more workers, so that each has less to copy",
            )
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._buffer[::4096] = 0  # touches every page now, not in the first save
        if any(part.tensor.is_cuda for part in parts.values()):
            pin(self._buffer)

    def take(self, parts: Mapping[str, LocalShard], *, now: Collection[str]) -> HostCopy:
        """Begin a copy, one at a time; a thread must call its `run`.

        Those named in `now` are copied before this returns, because the forward pass changes them.
        """
        self.reserve(parts)
        return begin_copy(self._buffer, parts, now)


class HostCopy:
    """A copy in progress.

    Attributes:
        parts: The parts on the host; complete once `run` has returned.
        fenced_s: Seconds that the optimizer's step has waited for it.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        parts: Mapping[str, LocalShard],
        now: Collection[str],
    ) -> None:
        self.parts = parts
        self.fenced_s = 0.0
        self._pairs = dict(pairs)
        self._done = threading.Event()
        self._on_device: Any = None
        self._begin(now)
        # A hook of every optimizer: a second one may change the same weights.
        self._hook = register_optimizer_step_pre_hook(lambda *_: self._fence())

    @torch.no_grad()
    def _begin(self, now: Collection[str]) -> None:
        """Copy what cannot wait; on a device, start the rest on a side stream."""
        is_on_device = any(source.is_cuda for source, _ in self._pairs.values())
        for name in now:
            source, target = self._pairs.pop(name)
            target.copy_(source, non_blocking=True)
        if not is_on_device:
            return
        self._on_device = torch.cuda.current_stream().record_event()
        if not self._pairs:
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for source, target in self._pairs.values():
                target.copy_(source, non_blocking=True)
        self._on_device = stream.record_event()
        self._pairs.clear()

    @torch.no_grad()
    def run(self) -> None:
        """Copy the rest, in any thread."""
        try:
            for source, target in self._pairs.values():
                target.copy_(source)
            if self._on_device is not None:
                self._on_device.synchronize()
        finally:
            self._done.set()

    def wait(self) -> None:
        """Wait until all is copied, or the copy has failed."""
        self._done.wait()

    def close(self) -> None:
        """Remove the fence."""
        self._hook.remove()

    def _fence(self) -> None:
        """Wait until all is copied, before an optimizer changes it. On a device the stream waits, not this thread."""
        began = time.monotonic()
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)
        else:
            self._done.wait()
        self.fenced_s += time.monotonic() - began


def begin_copy(buffer: torch.Tensor, parts: Mapping[str, LocalShard], now: Collection[str]) -> HostCopy:
    """Begin a copy into `buffer`, in the order of `parts`; as `StagingBuffer.take`."""
    target, position = {}, 0
    for name, part in parts.items():
        flat = buffer[position : position + part.tensor.nbytes]
        target[name] = replace(part, tensor=flat.view(part.tensor.dtype).view(part.tensor.shape))
        position += _padded(part)
    return HostCopy({name: (part.tensor, target[name].tensor) for name, part in parts.items()}, target, now)


def bytes_needed(parts: Mapping[str, LocalShard]) -> int:
    """Return the size of a buffer for `parts`."""
    return sum(_padded(part) for part in parts.values())


def pin(buffer: torch.Tensor) -> None:
    """Pin the buffer's pages for as long as it exists, so that a device copies into them. Raises ConfigError.

    torch's own pinned memory is not used: its sizes are powers of two, up to twice the size requested.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if error:
        raise ConfigError(
            f"cannot lock {buffer.numel():,} bytes of host memory for a snapshot (CUDA error {error})",
            hint="set checkpoint.overlap: false, which writes from the weights themselves while training waits",
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False


def _padded(part: LocalShard) -> int:
    return -(-part.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def free_bytes() -> int:
    """Return the free memory of the machine or of the control group, whichever is less."""
    limits = [int(psutil.virtual_memory().available)]
    with suppress(OSError, ValueError):  # psutil does not read the limits of control groups
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(limit - used + sum(int(value) for key, value in cached if key == "inactive_file"))
    return min(limits)
