"""Evaluation: loss and scores over a held-out set, sharded over the ranks, the same number at any world size."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from outlast.checkpointing.weights import unwrap
from outlast.trainers.data import PackedData
from outlast.trainers.sampling import share
from outlast.trainers.tasks import Task
from outlast.trainers.world import World


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, data: PackedData, world: World, micro_batch: int, precision: str
) -> dict[str, float]:
    """The mean over all of `data` of the loss (`eval_loss`) and of the task's scores (such as `eval_accuracy`).

    Each rank takes a contiguous share of the micro-batches; their sums are added in micro-batch order in float64, so
    the result does not depend on who computed which. Runs on the unwrapped module, because DDP's forward is collective;
    a sharded one's is too, so ranks with less to do run idle passes.
    """
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    num_micro = -(-len(data) // micro_batch)
    table = torch.zeros(num_micro, 2 + len(task.scores), dtype=torch.float64)
    for micro in share(num_micro, world.rank, world.size):
        batch = task.collate(data.rows(range(micro * micro_batch, min((micro + 1) * micro_batch, len(data)))))
        table[micro, 0] = task.count(batch)
        with world.autocast(precision):
            found = task.measure(inner, {key: value.to(world.device) for key, value in batch.items()})
        table[micro, 1:] = found.double().cpu()
    for _ in range(world.num_idle(num_micro, inner)):
        batch = task.collate(data.rows(range(min(micro_batch, len(data)))))
        task.measure(inner, {key: value.to(world.device) for key, value in batch.items()})
    if isinstance(inner, FSDPModule):
        inner.reshard()  # the outermost stays gathered after a forward pass; what is saved are the shards
    inner.train(was_training)
    count, *sums = (sum(column) for column in world.add(table).T.tolist())
    return {f"eval_{name}": total / count for name, total in zip(("loss", *task.scores), sums, strict=True)}
