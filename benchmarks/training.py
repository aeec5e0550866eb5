"""What the checkpoint benchmarks save: a model, its AdamW and real training steps; and how files are made durable."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import nn

from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.state.named_weights import named_weights
from outlast.checkpointing.state.optimizer_state import optimizer_tensors

LAYERS = 10


class Training:
    """A model under AdamW: 12 bytes of state a parameter. One step is made at once, so that the state is there.

    Args:
        model: The model, on its device.
        loss: Makes the loss of a step, from it.

    Attributes:
        state: Weights and moments, sorted by name; the model's and the optimizer's own tensors, not copies.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        self.model, self._loss = model, loss
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.step()

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return dict(sorted({**named_weights(self.model), **optimizer_tensors(self.model, self.optimizer)}.items()))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())

    def step(self) -> tuple[float, float, float]:
        """One step. Returns its seconds, and the seconds and main-thread CPU seconds that the optimizer's step spent
        before it touched anything: in its pre-hooks, where a save that is still copying holds it up."""
        began = time.perf_counter()
        self._loss().backward()  # type: ignore[no-untyped-call]
        fence: list[tuple[float, float]] = []
        # Registered last, so it runs after every pre-hook that a checkpointer registered.
        last = self.optimizer.register_step_pre_hook(lambda *_: fence.append((time.perf_counter(), time.thread_time())))
        at, cpu_at = time.perf_counter(), time.thread_time()
        self.optimizer.step()
        last.remove()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay, so that a step's own memory is in no save's peak
        return time.perf_counter() - began, fence[0][0] - at, fence[0][1] - cpu_at

    def digest(self) -> str:
        """Of every tensor's name, dtype, shape and bytes."""
        whole = xxhash.xxh3_128()
        for name, tensor in self.state.items():
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole.update(tensor_bytes(tensor))
        return whole.hexdigest()

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies saved tensors into the state, for peers that know tensors but neither model nor optimizer."""
        for name, tensor in self.state.items():
            tensor.copy_(tensors[name])

    def forget(self) -> None:
        """Zeroes the state, so that only a load can bring it back."""
        for tensor in self.state.values():
            tensor.zero_()


def stacked(width: int, *, batch: int = 64) -> Training:
    """A stack of square linear layers, `LAYERS * width**2` parameters and their biases, on the CPU."""
    torch.manual_seed(7)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    given = torch.randn(batch, width)
    return Training(model, lambda: model(given).square().mean())


def sync_tree(directory: Path) -> None:
    """fsync of every file and directory in `directory`, and of the directory that it stands in."""
    for place, _, names in os.walk(directory, topdown=False):
        for name in (*names, "."):
            sync(Path(place, name))
    sync(directory.parent)


def sync(path: Path) -> None:
    """fsync of one file or directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cache(directory: Path) -> None:
    """Takes the files' clean pages out of the page cache; written pages must be durable already."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class Memory:
    """Resident memory of this process and its children, in bytes; what a child shares with others is not counted.

    `peak` is the kernel's own high-water mark since `reset`, so nothing samples while the clock runs. Marks of several
    processes are added up, though they may stem from different moments: an upper bound.
    """

    def now(self) -> int:
        ctypes.CDLL(None).malloc_trim(0)  # freed heap is nobody's, and a place to hide in
        return self._sum("VmRSS")

    def reset(self) -> None:
        self.now()
        for pid in _family():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._sum("VmHWM")

    def _sum(self, field: str) -> int:
        own, *children = (_status(pid) for pid in _family())
        return own[field] + sum(child[field] - child["RssShmem"] for child in children)


def _status(pid: int | None) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


def _family() -> list[int | None]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
