"""Addition of gradients under DDP: `.grad` is the sum in rank order, bit for bit, for any buckets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from outlast.trainers.config.train import Exactness
from outlast.trainers.distributed.world import World
from tests.support.groups.ranks import on_ranks

NUM_STEPS = 3
SHAPES = ((300_000,), (7, 3), (300_000,), (1,), (300_000,))


class Dot(nn.Module):
    """A model whose gradients are parts of its input, with several buckets, which DDP rebuilds after a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in SHAPES)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(weight * part).sum() for weight, part in zip(self.weights, gradients, strict=True)]).sum()


def gradients(rank: int, step: int) -> list[torch.Tensor]:
    """Numbers of all magnitudes, so that the order of a sum matters."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    exponents = [torch.randint(-4, 4, shape, generator=generator) for shape in SHAPES]
    return [torch.randn(item.shape, generator=generator) * 10.0**item for item in exponents]


def train() -> list[list[torch.Tensor]]:
    """Return `.grad` after each step. A step has two micro-batches; the first is added on the rank only."""
    world = World()
    wrapped = world.parallelize(Dot(), Exactness.SAME_WORLD)
    found = []
    for step in range(NUM_STEPS):
        for micro in range(2):
            wrapped.require_backward_grad_sync = micro == 1  # type: ignore[assignment]
            wrapped(gradients(world.rank, 2 * step + micro)).backward()
        found.append([weight.grad.clone() for weight in wrapped.parameters() if weight.grad is not None])
        wrapped.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_same_world_adds_in_rank_order(size: int) -> None:
    """Also with two ranks, which use the library's sum, because two terms have one sum only."""
    expected = []
    for step in range(NUM_STEPS):
        by_rank = []
        for rank in range(size):
            first, second = gradients(rank, 2 * step), gradients(rank, 2 * step + 1)
            by_rank.append([left + right for left, right in zip(first, second, strict=True)])
        expected.append([sum(parts[1:], parts[0]) for parts in zip(*by_rank, strict=True)])
    for found in on_ranks(size, train):
        for mine, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
