"""Which rank keeps a copy of which rank's snapshots: one on another node, if there is one."""

from collections.abc import Sequence


def buddy_shift(nodes: Sequence[str]) -> int:
    """Return the distance from each rank to its buddy, given each rank's node; 0 if all are on one.

    Rank r sends to rank (r + distance) % size: the smallest distance with the fewest pairs on one node.
    """
    if len({*nodes}) < 2:
        return 0
    size = len(nodes)
    return min(
        range(1, size),
        key=lambda shift: sum(nodes[rank] == nodes[(rank + shift) % size] for rank in range(size)),
    )
