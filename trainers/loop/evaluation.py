"""Evaluation: loss and scores over a held-out set, sharded over the ranks, the same number at any world size."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.config.train import Precision
from outlast.trainers.data.arrow_samples import Samples
from outlast.trainers.data.batch_plan import derive_seed, share
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.distributed.world import World
from outlast.trainers.tasks.base import Sums, Task


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, data: Samples, world: World, micro_batch: int, precision: Precision
) -> dict[str, float]:
    """Return the mean loss over `data` (`eval_loss`) and the task's scores (such as `eval_accuracy`).

    Each rank takes a contiguous share of the micro-batches; the result does not depend on which rank computed which.
    Runs on the unwrapped module, because DDP's forward is collective; a sharded one's is too, so ranks with less to do
    run idle passes.
    """
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    num_micro = -(-len(data) // micro_batch)

    def measure(micro: int) -> Sums:
        numbers = range(micro * micro_batch, min((micro + 1) * micro_batch, len(data)))
        batch = task.collate(data.take(numbers), [derive_seed(number) for number in numbers])
        seed_everything(micro)  # for models that draw random numbers in evaluation
        with world.autocast(precision):
            return task.measure(inner, {key: value.to(world.device) for key, value in batch.items()})

    mine = share(num_micro, world.rank, world.size)
    first = measure(mine[0] if mine else 0)
    totals = {name: _Total(like, num_micro) for name, like in sorted(first.items())}
    for micro in mine:
        for name, value in (first if micro == mine[0] else measure(micro)).items():
            totals[name].put(micro, value)
    for _ in range(world.num_idle(num_micro, inner) - (not mine)):
        measure(0)
    if isinstance(inner, FSDPModule):
        inner.reshard()  # the outermost module stays gathered after a forward pass, but the shards are saved
    inner.train(was_training)
    sums = {name: total.over(world) for name, total in totals.items()}
    scores = {"loss": sums["loss"].item() / sums["count"].item(), **task.scores(sums)}
    return {f"eval_{name}": value for name, value in scores.items()}


class _Total:
    """Sum over all micro-batches of all ranks, in float64.

    Integers are exact in any order. Floats get a row for each micro-batch, zero on every rank but one, and are
    then added in micro-batch order.
    """

    def __init__(self, like: torch.Tensor, num_micro: int) -> None:
        self._is_ordered = like.is_floating_point()
        self._table = torch.zeros(num_micro if self._is_ordered else 1, *like.shape, dtype=torch.float64)

    def put(self, micro: int, value: torch.Tensor) -> None:
        self._table[micro if self._is_ordered else 0] += value.double().cpu()

    def over(self, world: World) -> torch.Tensor:
        rows = world.add(self._table)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total
