"""Communication of the ranks of one attempt about checkpoints: small objects, through rank 0.

Uses a gloo group of its own, so that it never waits behind the collectives of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from outlast.checkpointing.errors import OutlastError

T = TypeVar("T")


class RankGroup:
    """The ranks of an attempt, as seen by this process. A single rank needs no torch.distributed.

    `rank` is below `size`, the world size; `group` is the gloo group, or None for a single rank.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.rank, self.size, self.group = 0, 1, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def duplicate(self) -> RankGroup:
        """Create a second group of the same ranks, for another thread. Every rank calls it.

        Its timeout is long, because a rank may wait for another's writing; a lost rank closes its connection.
        """
        return RankGroup(timedelta(hours=12))

    def gather(self, item: T) -> list[T]:
        """Return every rank's item in rank order, on every rank."""
        if self.group is None:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def broadcast(self, item: T | None) -> T:
        """Return rank 0's item, on every rank."""
        items: list[Any] = [item]
        if self.group is not None:
            dist.broadcast_object_list(items, src=0, group=self.group)
        result: T = items[0]
        return result

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results; every rank raises the first rank's error."""
        result, failure, foreign = _run(work)
        results = self.gather((result, failure))
        if foreign is not None:
            raise foreign
        for rank, (_, error) in enumerate(results):
            if error is not None:
                where = f"rank {rank}: " if self.size > 1 else ""
                raise type(error)(f"{where}{error.message}", hint=error.hint) from failure
        return [item for item, _ in results]  # type: ignore[misc]

    def run_on_rank_0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; every rank returns its result or raises its error."""
        result, failure, foreign = _run(work) if self.rank == 0 else (None, None, None)
        result, failure = self.broadcast((result, failure) if self.rank == 0 else None)
        if foreign is not None:
            raise foreign
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]


def _run(work: Callable[[], T]) -> tuple[T | None, OutlastError | None, Exception | None]:
    """Return the result, or the error as the other ranks see it, and as it is here if it is not one of outlast's."""
    try:
        return work(), None, None
    except OutlastError as error:
        return None, error, None
    except RuntimeError:  # of torch.distributed: the others cannot be reached, or get it too
        raise
    except Exception as error:  # noqa: BLE001 - raised again by the callers; the others would wait for hours
        return None, OutlastError(f"{type(error).__name__}: {error}"), error
