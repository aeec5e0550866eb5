"""The host copy of a step's state, taken while training goes on.

The state only changes in the optimizer's step, so a copy may overlap the next forward and backward pass: the step waits
for it in a pre-hook, and that is the only fence. Buffers are allocated once and reused, because fresh pages cost more
than the copy (github.com/pytorch/pytorch, `StateDictStager`, does likewise).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.shards import LocalShard

_ALIGNMENT = 64
_SPARE_BYTES = 256 * 2**20


class StagingBuffer:
    """Host buffers for one rank's share, and the copy into them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, parts: Mapping[str, LocalShard], num_sharing: int = 1) -> None:
        """Allocates the buffers, if they are not large enough yet.

        Args:
            parts: What will be copied.
            num_sharing: How many ranks do so on this machine at the same time.

        Raises:
            ConfigError: They do not fit into this machine's memory.
        """
        num_bytes = sum(_padded(part) for part in parts.values())
        if num_bytes <= self._buffer.numel():
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)
        free = free_bytes()
        if free is not None and num_sharing * num_bytes + _SPARE_BYTES > free:
            raise ConfigError(
                f"a snapshot of a rank's share needs {num_bytes:,} bytes of host memory; this machine has "
                f"{num_sharing} of the ranks, and {free:,} bytes are free",
                hint="set checkpoint.overlap: false, which writes from the weights themselves while training waits; "
                "or use more workers, each of which then holds a smaller share",
            )
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._buffer[::4096] = 0  # touches every page now, not in the first save
        if any(part.tensor.is_cuda for part in parts.values()):
            _pin(self._buffer)

    def take(self, parts: Mapping[str, LocalShard], *, now: Collection[str]) -> HostCopy:
        """Begins a copy, one at a time. Somebody must call its `run`.

        Args:
            parts: What to copy.
            now: Names of those that the forward pass changes, such as running means: copied before this returns.
        """
        self.reserve(parts)
        target, position = {}, 0
        for name, part in parts.items():
            flat = self._buffer[position : position + part.tensor.numel() * part.tensor.element_size()]
            target[name] = part.with_tensor(flat.view(part.tensor.dtype).view(part.tensor.shape))
            position += _padded(part)
        copy = HostCopy({name: (part.tensor, target[name].tensor) for name, part in parts.items()}, target)
        try:
            copy.begin(now)
        except BaseException:
            copy.close()
            raise
        return copy


class HostCopy:
    """One copy on its way.

    Attributes:
        parts: The parts, on the host; whole once `wait` has returned.
        fenced_s: Seconds that the optimizer's step has waited for it.
    """

    def __init__(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], parts: Mapping[str, LocalShard]) -> None:
        self.parts = parts
        self.fenced_s = 0.0
        self._pairs = dict(pairs)
        self._done = threading.Event()
        self._on_device: Any = None
        # Of every optimizer: a second one may change the same weights. The hook goes when the copy is forgotten.
        self._hook = register_optimizer_step_pre_hook(lambda *_: self._fence())

    @torch.no_grad()
    def begin(self, now: Collection[str]) -> None:
        """Copies what cannot wait; on a device, hands the rest to a side stream."""
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
        """Copies the rest. Any thread may."""
        try:
            for source, target in self._pairs.values():
                target.copy_(source)
            if self._on_device is not None:
                self._on_device.synchronize()
        finally:
            self._done.set()

    def close(self) -> None:
        """Takes the fence away."""
        self._hook.remove()

    def _fence(self) -> None:
        """Lets no optimizer change what is not yet copied. On a device the device waits, not this thread."""
        began = time.monotonic()
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)
        else:
            self._done.wait()
        self.fenced_s += time.monotonic() - began


def _pin(buffer: torch.Tensor) -> None:
    """Locks the buffer's pages, so that a device copies into them by itself, and lets them go with it.

    By hand, because torch's own pinned memory comes in powers of two: up to twice what was asked for.

    Raises:
        ConfigError: The driver refuses.
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
    return -(-part.tensor.numel() * part.tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def free_bytes() -> int | None:
    """Memory that this process may still take: of the machine, or of its control group; None where nobody tells."""
    found = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + sum(int(value) for key, value in cached if key == "inactive_file"))
    return min(found, default=None)
