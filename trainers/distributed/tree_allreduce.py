"""Gradients added in the order of one binary tree over a step's micro-batches, for any assignment to ranks.

Floating-point sums depend on their order, so the order must not depend on the number of ranks. The leaves of the tree
are the micro-batches; a node is the sum of its left and its right child, or its left child where the step ends before
the right one begins. Each rank adds the largest aligned subtrees of its contiguous share as it computes, like a binary
counter, so it holds at most about twice log2(micro-batches) partial sums. Then, piece by piece, each rank owns a chunk,
receives every subtree's part of it (all-to-all), finishes the tree, and distributes the sum (all-gather). A single rank
adds in the same order without communication.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from outlast.trainers.data.batch_plan import share

#: Elements summed over the ranks at a time. It bounds the memory, and does not affect the result.
_PIECE = 2**23


def subtrees(leaves: range, num_leaves: int) -> list[range]:
    """Return the largest aligned subtrees within `leaves` of a tree of `num_leaves`, from left to right."""
    ranges, begin = [], leaves.start
    while begin < leaves.stop:
        length = 1
        while (
            begin + length < num_leaves
            and begin % (2 * length) == 0
            and min(begin + 2 * length, num_leaves) <= leaves.stop
        ):
            length *= 2
        ranges.append(range(begin, min(begin + length, num_leaves)))
        begin += length
    return ranges


class TreeSum:
    """Accumulator of subtrees that arrive from left to right. Sums are computed in the memory of the left operand.

    Attributes:
        parts: Subtrees without their sibling yet, with their sums, from left to right.
    """

    def __init__(self, num_leaves: int) -> None:
        self.parts: list[tuple[range, torch.Tensor]] = []
        self._num_leaves = num_leaves

    def add(self, leaves: range, value: torch.Tensor) -> list[torch.Tensor]:
        """Add the next subtree. Returns the tensors that are no longer needed."""
        spent = []
        while self.parts and self._are_siblings(self.parts[-1][0], leaves):
            left, total = self.parts.pop()
            total += value
            spent.append(value)
            leaves, value = range(left.start, leaves.stop), total
        self.parts.append((leaves, value))
        return spent

    def _are_siblings(self, left: range, right: range) -> bool:
        parent = 2 * len(left)
        return left.start % parent == 0 and right.stop == min(left.start + parent, self._num_leaves)


class TreeReducer:
    """Moves each micro-batch's gradient out of `.grad`, and stores the sum over all of them there at the step's end.

    Args:
        parameters: The model's parameters, in the same order on every rank.
        rank: This rank.
        size: World size.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rank: int, size: int) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._rank, self._size = rank, size
        # One more element per parameter: whether any micro-batch gave it a gradient.
        num_elements = sum(parameter.numel() for parameter in self._parameters) + len(self._parameters)
        self._num_padded = -(-num_elements // size) * size
        self._spare: list[torch.Tensor] = []
        self._sum: TreeSum | None = None

    def take(self, micro: int, num_micro: int) -> None:
        """Take the gradient of micro-batch `micro` of `num_micro` out of `.grad`. Micro-batches come in order."""
        if self._sum is None:
            self._sum = TreeSum(num_micro)
        flat = self._buffer()
        *gradients, given = self._views(flat)
        given.copy_(torch.tensor([parameter.grad is not None for parameter in self._parameters]))
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
            parameter.grad = None
        self._spare += self._sum.add(range(micro, micro + 1), flat)

    def finish(self, num_micro: int) -> None:
        """Store the sum over all micro-batches of all ranks in `.grad`, valid until the next step's first `take`."""
        parts = self._sum.parts if self._sum else []
        self._sum = None
        assert [leaves for leaves, _ in parts] == subtrees(share(num_micro, self._rank, self._size), num_micro)
        flats = [flat for _, flat in parts] or [self._buffer()]
        if self._size > 1:
            self._add_over_ranks(flats[0], flats if parts else [], num_micro)
        *gradients, given = self._views(flats[0])
        for parameter, gradient, is_given in zip(self._parameters, gradients, given.tolist(), strict=True):
            parameter.grad = gradient.to(parameter.dtype) if is_given else None
        self._spare += flats

    def _add_over_ranks(self, target: torch.Tensor, mine: list[torch.Tensor], num_micro: int) -> None:
        """Finish the tree over all ranks' subtrees, and store the sum in `target`, which may be one of `mine`."""
        size = self._size
        held = [subtrees(share(num_micro, rank, size), num_micro) for rank in range(size)]
        piece = -(-_PIECE // size) * size
        for begin in range(0, self._num_padded, piece):
            width = min(piece, self._num_padded - begin) // size
            parts = [flat[begin : begin + width * size].view(size, 1, width) for flat in mine]
            sent = torch.cat(parts, dim=1).flatten() if parts else target.new_empty(0)
            counts = [width * len(subs) for subs in held]
            received = target.new_empty(sum(counts))
            dist.all_to_all_single(received, sent, counts, [width * len(mine)] * size)
            tree = TreeSum(num_micro)
            for leaves, part in zip(
                [leaves for subs in held for leaves in subs], received.view(-1, width), strict=True
            ):
                tree.add(leaves, part)
            [(_, total)] = tree.parts
            dist.all_gather_into_tensor(target[begin : begin + width * size], total)

    def _buffer(self) -> torch.Tensor:
        if self._spare:
            return self._spare.pop()
        dtype, device = torch.float32, torch.device("cpu")
        for parameter in self._parameters:
            dtype, device = torch.promote_types(dtype, parameter.dtype), parameter.device
        return torch.zeros(self._num_padded, dtype=dtype, device=device)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return views of the gradients in `flat`, in their shapes; the last one has the flags of its gradients."""
        sizes = [parameter.numel() for parameter in self._parameters]
        *parts, given, _ = torch.split(flat, [*sizes, len(sizes), flat.numel() - sum(sizes) - len(sizes)])
        return [*(part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)), given]
