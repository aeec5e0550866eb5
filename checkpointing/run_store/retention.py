"""Which checkpoints to keep: a pure function of what there is. Nothing here touches a disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from outlast.checkpointing.format.layout import CheckpointRef

KEEP_LAST_MIN = 2


@dataclass(frozen=True, slots=True)
class RetentionCandidate:
    """What retention needs to know of one checkpoint."""

    ref: CheckpointRef
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Retention:
    """The policy. A checkpoint stays if any rule keeps it.

    Attributes:
        keep_last: The newest N stay. Two at least, because one of them may turn out damaged.
        keep_best: The best N by `metric` stay.
        metric: Name in the manifest's metrics; checkpoints without it are never best.
        metric_mode: `min` or `max`.
        keep_every: Of every K steps (0, K], (K, 2K], … the last checkpoint stays, which is the one at a multiple of K
            where there is one. Zero keeps none.
    """

    keep_last: int = 3
    keep_best: int = 0
    metric: str = "eval_loss"
    metric_mode: str = "min"
    keep_every: int = 0

    def __post_init__(self) -> None:
        assert self.keep_last >= KEEP_LAST_MIN
        assert self.metric_mode in ("min", "max")
        assert self.keep_every >= 0

    def keep(
        self, checkpoints: Sequence[RetentionCandidate], pinned: Set[CheckpointRef] = frozenset()
    ) -> set[CheckpointRef]:
        """The checkpoints that stay, out of one run's accepted ones in any order."""
        newest = sorted((item.ref for item in checkpoints), reverse=True)
        best = {item.ref for item in self.best(checkpoints)[: self.keep_best]}
        return {*newest[: self.keep_last], *best, *self._spaced(newest), *(pinned & set(newest))}

    def _spaced(self, newest_first: Sequence[CheckpointRef]) -> set[CheckpointRef]:
        if not self.keep_every:
            return set()
        return set({-(-ref.step // self.keep_every): ref for ref in reversed(newest_first)}.values())

    def best(self, checkpoints: Sequence[RetentionCandidate]) -> list[RetentionCandidate]:
        """Those that carry the metric, best first; of equals the older. A NaN is never best."""
        sign = 1.0 if self.metric_mode == "min" else -1.0
        rated = [item for item in checkpoints if not math.isnan(item.metrics.get(self.metric, math.nan))]
        return sorted(rated, key=lambda item: (sign * item.metrics[self.metric], item.ref))
