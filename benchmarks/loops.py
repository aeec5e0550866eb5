"""The competitors of `benchmarks.throughput`: the same training, step for step, in the loops that people use.

Each is used as its own documentation says: the same model, fused AdamW, accumulation without needless communication,
clipping. All but outlast have the samples in one tensor in memory, which is the most favourable data set there is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from outlast.checkpointing.storage.base import Storage
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.config.train import Precision
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.distributed.world import World
from outlast.trainers.models.build import build_model
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.support.groups.worker_group import Quiet

#: Steps before the clock starts; as many go by after a save until it stops, so that it sees the whole of a save.
WARM_STEPS = 10
NEVER = 10**6


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be trained, and where.

    Attributes:
        config: The settings.
        prepared: Its data.
        storage: Holds the data, and what is saved.
        world: The ranks.
    """

    config: TrainingConfig
    prepared: Prepared
    storage: Storage
    world: World

    @property
    def num_steps(self) -> int:
        return self.config.train.steps or 0

    @property
    def is_on_cpu(self) -> bool:
        return self.world.device.type == "cpu"

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step on one rank."""
        return self.config.train.batch // self.config.train.micro_batch // self.world.size

    def model(self) -> Any:
        tokenizer = self.prepared.tokenizer(self.storage)
        task = CausalLM(self.config.data, tokenizer, {})
        return build_model(self.config.model, task, tokenizer, 0, fresh=True)[0].train().to(self.world.device)

    def data(self) -> InMemory:
        samples = self.prepared.split(self.storage, "train")
        return InMemory(CausalLM.collate(None, samples.take(range(len(samples))), [])["input_ids"])  # type: ignore[arg-type]


class InMemory(Dataset[dict[str, torch.Tensor]]):
    """Samples as the models of transformers take them.

    Args:
        ids: Shape [samples, length], int64.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[number], "labels": self.ids[number]}


class Laps:
    """Notes when steps begin, by the clock and in CPU time of this process.

    Args:
        num_steps: All steps.
        num_warm: Steps before the clock starts.
        settle: Waits for the device, where the clock starts and before the last step, where it stops.
    """

    def __init__(self, num_steps: int, num_warm: int = WARM_STEPS, settle: Callable[[], None] = lambda: None) -> None:
        self._at: list[tuple[float, float]] = []
        self._num_steps, self._num_warm, self._settle = num_steps, num_warm, settle

    def begin(self) -> None:
        if len(self._at) in (self._num_warm, self._num_steps - 1):
            self._settle()
        self._at.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> tuple[float, float]:
        """Seconds and CPU seconds of a step, from the first after the warm-up to the beginning of the last."""
        (first, first_cpu), (last, last_cpu) = self._at[self._num_warm], self._at[-1]
        count = len(self._at) - 1 - self._num_warm
        return (last - first) / count, (last_cpu - first_cpu) / count


Loop = Callable[[Case, Laps], None]


def bare(case: Case, laps: Laps) -> None:
    """What one would write by hand: DDP, or the model itself for one worker."""
    world, model = case.world, case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    batches = _batches(case)
    for _ in range(case.num_steps):
        laps.begin()
        for micro in range(case.num_micro):
            batch = next(batches)
            wrapped.require_backward_grad_sync = micro == case.num_micro - 1
            with world.autocast(case.config.train.precision):
                on_device = {name: value.to(world.device, non_blocking=True) for name, value in batch.items()}
                loss = wrapped(**on_device, use_cache=False).loss / case.num_micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _batches(case: Case) -> Iterator[dict[str, torch.Tensor]]:
    data, world = case.data(), case.world
    sampler = DistributedSampler(data, world.size, world.rank) if world.size > 1 else RandomSampler(data)
    loader = DataLoader(data, case.config.train.micro_batch, sampler=sampler, drop_last=True)
    while True:
        yield from loader


def accelerate(case: Case, laps: Laps) -> None:
    """The loop of accelerate's guide."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=case.is_on_cpu,
        gradient_accumulation_steps=case.num_micro,
        mixed_precision="bf16" if case.config.train.precision is Precision.BF16 else "no",
    )
    model, data = case.model(), case.data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader = DataLoader(data, case.config.train.micro_batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()
    for _ in range(case.num_steps):
        laps.begin()
        for _ in range(case.num_micro):
            batch = next(batches)
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch, use_cache=False).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


def trainer(every: int) -> Loop:
    """`transformers.Trainer`, with a save every so many steps, or none."""

    def run(case: Case, laps: Laps) -> None:
        from accelerate.state import AcceleratorState, GradientState
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Tells(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                laps.begin()

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=case.world.broadcast(folder),
                use_cpu=case.is_on_cpu,
                bf16=case.config.train.precision is Precision.BF16,
                max_steps=case.num_steps,
                per_device_train_batch_size=case.config.train.micro_batch,
                gradient_accumulation_steps=case.num_micro,
                learning_rate=1e-3,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                save_strategy="steps" if every else "no",
                save_steps=every or NEVER,
                save_total_limit=2,
                ddp_backend="gloo" if case.world.size > 1 else None,
                report_to=[],
                disable_tqdm=True,
            )
            Trainer(case.model(), arguments, train_dataset=case.data(), callbacks=[Tells()]).train()
            case.world.gather(None)  # nobody removes what another still writes

    return run


def outlast(exactness: str, every: int = NEVER, *, deterministic: bool = True) -> Loop:
    """Our own."""

    def run(case: Case, laps: Laps) -> None:
        body = case.config.model_dump(mode="json")
        name = f"{exactness}-{every}-{time.time_ns()}"
        body |= {"name": name, "exactness": exactness, "deterministic": deterministic}
        body["checkpoint"]["every"] = every
        config = TrainingConfig.model_validate(case.world.broadcast(body))
        run_attempt(Assignment(config, {}, "bench", case.prepared), case.storage, case.world, _Tells(laps))

    return run


class _Tells(Quiet):
    """A `Control` that is asked once a step, on every rank."""

    def __init__(self, laps: Laps) -> None:
        self._laps = laps

    def stop_requested(self) -> bool:
        self._laps.begin()
        return False


LOOPS: dict[str, Loop] = {
    "bare PyTorch DDP": bare,
    "HF Trainer": trainer(0),
    "accelerate": accelerate,
    "outlast fast": outlast("fast"),
    "outlast same-world": outlast("same-world"),
    "outlast elastic": outlast("elastic"),
    "HF Trainer, a save every 20 steps": trainer(20),
    "outlast same-world, a save every 20 steps": outlast("same-world", 20),
}


def timed(loop: Loop, case: Case) -> tuple[float, float]:
    """Seconds of a step, the slowest rank's, and CPU seconds, the ranks' mean."""
    make_deterministic(False, 1)
    laps = Laps(case.num_steps)
    loop(case, laps)
    found = case.world.gather(laps.per_step())
    return max(wall for wall, _ in found), sum(cpu for _, cpu in found) / len(found)
