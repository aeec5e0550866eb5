"""The competitors of `benchmarks.stall`: one small class each, all saving the same model and optimizer.

Every one is used as its own documentation says, and made durable by us where it does not do so itself: `finish` calls
fsync on each file and directory that was written. Loads are each library's own and verify nothing, but for outlast's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.training import Training, sync, sync_tree
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.format.safetensors import bytes_view, tensor_bytes
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.storage.local import LocalStorage


class Peer(Protocol):
    """Something that saves and loads a training."""

    name: str
    overlaps: bool
    """Whether a step is trained between `save` and `finish`."""

    def prepare(self, training: Training, folder: Path) -> None:
        """Gets ready to save `training` into directories of `folder`, which exists."""

    def save(self, step: int) -> None:
        """Saves; training goes on when it returns."""

    def finish(self) -> Path:
        """Waits until the last save is durable and returns its directory."""

    def load(self, twin: Training) -> None:
        """Loads the last save into another training of the same shape."""

    def close(self) -> None:
        """Gives back what `prepare` took."""


class _Base:
    overlaps = False

    def prepare(self, training: Training, folder: Path) -> None:
        self.training, self.folder = training, folder

    def begin(self, step: int) -> Path:
        self.path = self.folder / f"step-{step}"
        return self.path

    def finish(self) -> Path:
        sync_tree(self.path)
        return self.path

    def close(self) -> None:
        pass


class Memcpy(_Base):
    """The limit of a copy: into kept buffers, and back."""

    name = "memcpy"

    def save(self, step: int) -> None:
        if not hasattr(self, "_pairs"):
            self._pairs = [(_on_host(tensor), tensor) for tensor in self.training.state.values()]
        for kept, tensor in self._pairs:
            kept.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def finish(self) -> Path:
        return self.begin(0)

    def load(self, twin: Training) -> None:
        for (kept, _), tensor in zip(self._pairs, twin.state.values(), strict=True):
            tensor.copy_(kept)


class RawWrite(_Base):
    """The limit of a disk: all bytes into one file, fsync; read straight into the tensors."""

    name = "raw write + fsync"

    def save(self, step: int) -> None:
        self.begin(step).mkdir()
        with open(self.path / "bytes", "xb", buffering=0) as file:
            for tensor in self.training.state.values():
                view = tensor_bytes(tensor)
                while view:
                    view = view[os.write(file.fileno(), view) :]
            os.fsync(file.fileno())
        sync(self.path)
        sync(self.folder)

    def finish(self) -> Path:
        return self.path

    def load(self, twin: Training) -> None:
        with open(self.path / "bytes", "rb", buffering=0) as file:
            for tensor in twin.state.values():
                host = tensor if tensor.device.type == "cpu" else _on_host(tensor)
                view = bytes_view(host.reshape(-1).view(torch.uint8))
                while view:
                    view = view[file.readinto(view) :]
                tensor.copy_(host)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor; a device copies into it by itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Outlast(_Base):
    """Our own. `how` is `overlapped` (lazy), `blocking` (copied before it returns) or `committed` (`save`)."""

    def __init__(self, how: str) -> None:
        self.name, self._how = f"outlast {how}", how
        self._is_async, self.overlaps = how != "committed", how == "overlapped"

    def prepare(self, training: Training, folder: Path) -> None:
        super().prepare(training, folder)
        # The benchmark removes old checkpoints itself, outside the clock, for every peer.
        self._checkpointer = Checkpointer(LocalStorage(folder), "run", retention=Retention(keep_last=10**6))
        self._checkpointer.resume(training.model, training.optimizer)

    def save(self, step: int) -> None:
        self._ref = CheckpointRef(step, self._checkpointer.attempt)
        content = (step, self.training.model, self.training.optimizer, {"step": step})
        if self._is_async:
            assert self._checkpointer.async_save(*content, lazy=self._how == "overlapped")
        else:
            assert self._checkpointer.save(*content)

    def finish(self) -> Path:
        if self._is_async:
            assert self._checkpointer.wait()
        return self.folder / layout.checkpoint_dir("run", self._ref)

    def load(self, twin: Training) -> None:
        # A loader claims the run and would supersede the saver, so it finds the attempt under another run's name.
        run = f"load-{self._ref.step}"
        attempts = self.folder / layout.attempts_dir(run)
        source = self.folder / layout.attempt_dir("run", self._ref.attempt)
        shutil.copytree(source, attempts / str(self._ref.attempt), copy_function=os.link)
        found = Checkpointer(LocalStorage(self.folder), run).resume(twin.model, twin.optimizer)
        assert found == {"step": self._ref.step}, found


class TorchSave(_Base):
    """`torch.save` of both state dicts."""

    name = "torch.save"

    def save(self, step: int) -> None:
        self.begin(step).mkdir()
        torch.save(whole(self.training), self.path / "state.pt")

    def load(self, twin: Training) -> None:
        take(twin, torch.load(self.path / "state.pt", weights_only=True))


class Safetensors(_Base):
    """`safetensors.torch.save_file` of the named tensors."""

    name = "safetensors"

    def save(self, step: int) -> None:
        self.begin(step).mkdir()
        save_file(self.training.state, self.path / "state.safetensors")

    def load(self, twin: Training) -> None:
        twin.put(load_file(self.path / "state.safetensors"))


class Dcp(_Base):
    """`torch.distributed.checkpoint.save`."""

    name = "DCP sync"

    def save(self, step: int) -> None:
        dcp.save(_dcp_state(self.training), checkpoint_id=self.begin(step))

    def load(self, twin: Training) -> None:
        state = _dcp_state(twin)
        dcp.load(state, checkpoint_id=self.path)
        set_state_dict(twin.model, twin.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


class DcpAsync(Dcp):
    """`torch.distributed.checkpoint.async_save`.

    Args:
        how: What the row says.
        kind: Who writes: a thread or a process, both of DCP's own.
        kept: Whether it copies into shared memory that is kept from save to save.
        staged_aside: Whether a thread makes that copy and the optimizer's step waits for it, as outlast does.
    """

    overlaps = True

    def __init__(self, how: str, kind: str, *, kept: bool = False, staged_aside: bool = False) -> None:
        self.name, self._kind, self._kept, self._aside = f"DCP async, {how}", kind, kept, staged_aside
        self._stager: DefaultStager | None = None

    def prepare(self, training: Training, folder: Path) -> None:
        super().prepare(training, folder)
        if self._kept:
            options = StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=True,
                use_async_staging=self._aside,
                use_non_blocking_copy=torch.cuda.is_available(),
            )
            self._stager = DefaultStager(options)
        self._staged: Any = None
        self._fence = training.optimizer.register_step_pre_hook(lambda *_: self._staged and self._staged.result())

    def save(self, step: int) -> None:
        answer = dcp.async_save(
            _dcp_state(self.training),
            checkpoint_id=self.begin(step),
            async_checkpointer_type=AsyncCheckpointerType(self._kind),
            async_stager=self._stager,
        )
        self._staged = getattr(answer, "staging_completion", None)
        self._written: Any = getattr(answer, "upload_completion", answer)

    def finish(self) -> Path:
        self._written.result()
        self._staged = None
        return super().finish()

    def close(self) -> None:
        self._fence.remove()
        if self._stager is not None:
            self._stager.close()


class HfTrainer(_Base):
    """`transformers.Trainer`'s own save in its training loop, and what it loads on `resume_from_checkpoint`."""

    name = "HF Trainer"

    def _trainer(self, training: Training) -> Any:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(output_dir=str(self.folder), use_cpu=True, report_to=[], disable_tqdm=True)
        schedule = torch.optim.lr_scheduler.ConstantLR(training.optimizer, factor=1.0)
        return Trainer(training.model, arguments, optimizers=(training.optimizer, schedule))

    def prepare(self, training: Training, folder: Path) -> None:
        super().prepare(training, folder)
        self._saver = self._trainer(training)

    def save(self, step: int) -> None:
        self._saver.state.global_step = step
        self._saver._save_checkpoint(self._saver.model, trial=None)
        self.path = self.folder / f"checkpoint-{step}"

    def load(self, twin: Training) -> None:
        trainer = self._trainer(twin)
        trainer._load_from_checkpoint(str(self.path))
        trainer._load_optimizer_and_scheduler(str(self.path))


class Accelerate(_Base):
    """`accelerator.save_state`."""

    name = "accelerate save_state"

    def _accelerator(self, training: Training) -> Any:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        accelerator.prepare(training.model, training.optimizer)
        return accelerator

    def prepare(self, training: Training, folder: Path) -> None:
        super().prepare(training, folder)
        self._saver = self._accelerator(training)

    def save(self, step: int) -> None:
        self._saver.save_state(str(self.begin(step)))

    def load(self, twin: Training) -> None:
        self._accelerator(twin).load_state(str(self.path))


def whole(training: Training) -> dict[str, Any]:
    """Both state dicts, as a training script would save them."""
    return {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}


def take(twin: Training, saved: dict[str, Any]) -> None:
    """Loads what `whole` gave."""
    twin.model.load_state_dict(saved["model"])
    twin.optimizer.load_state_dict(saved["optimizer"])


def _dcp_state(training: Training) -> dict[str, Any]:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optimizer": optimizer}


@contextmanager
def dcp_group(folder: Path) -> Iterator[None]:
    """The process group of one that DCP's writing process asks for, and that process, brought up by a tiny save: its
    start (seconds, and the memory of a Python with torch) is nobody's row."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder.absolute()}/group", rank=0, world_size=1)
    kind = AsyncCheckpointerType.PROCESS
    warm: Any = dcp.async_save({"one": torch.ones(1)}, checkpoint_id=folder / "warm", async_checkpointer_type=kind)
    warm.result()
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_peers() -> list[Peer]:
    """Everybody but Ray, whose `report` only runs inside a Ray worker (`benchmarks.stall_ray`)."""
    return [
        *(Outlast(how) for how in ("overlapped", "blocking", "committed")),
        TorchSave(),
        Safetensors(),
        Dcp(),
        DcpAsync("thread", "thread"),
        DcpAsync("process", "process"),
        DcpAsync("process, kept shared memory", "process", kept=True),
        DcpAsync("process, kept shared memory, staged aside", "process", kept=True, staged_aside=True),
        HfTrainer(),
        Accelerate(),
        Memcpy(),
        RawWrite(),
    ]
