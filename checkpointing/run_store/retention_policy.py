"""Retention policy: which checkpoints to keep, as a pure function. Deleting is the caller's part."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import CheckpointRef

KEEP_LAST_MIN = 2


@dataclass(frozen=True, slots=True)
class RetentionCandidate:
    """A checkpoint and its metrics."""

    ref: CheckpointRef
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Retention:
    """A policy. A checkpoint stays if any rule keeps it."""

    keep_last: int = 3  #: the newest N stay; at least two, because one may be damaged
    keep_best: int = 0  #: the best N by `metric` stay
    metric: str = "eval_loss"  #: name in the manifest's metrics; checkpoints without it are never best
    metric_mode: str = "min"  #: `min` or `max`
    keep_every: int = 0  #: the last checkpoint of every K steps (0, K], (K, 2K], … stays. Zero keeps none.

    def __post_init__(self) -> None:
        """Raise ConfigError for a policy that would delete the newest checkpoints, or that ranks them by chance."""
        if self.keep_last < KEEP_LAST_MIN:
            raise ConfigError(f"keep_last ({self.keep_last}) must be at least {KEEP_LAST_MIN}: one may be damaged")
        if self.metric_mode not in ("min", "max"):
            raise ConfigError(f"metric_mode must be 'min' or 'max', not {self.metric_mode!r}")
        if self.keep_every < 0 or self.keep_best < 0:
            raise ConfigError(
                f"keep_every is {self.keep_every} and keep_best {self.keep_best}, and neither may be negative"
            )

    def keep(
        self, checkpoints: Sequence[RetentionCandidate], pinned: Set[CheckpointRef] = frozenset()
    ) -> set[CheckpointRef]:
        """Return the checkpoints that stay, out of a run's accepted ones in any order."""
        newest = sorted((item.ref for item in checkpoints), reverse=True)
        best = {item.ref for item in self.best(checkpoints)[: self.keep_best]}
        spaced = {-(-ref.step // self.keep_every): ref for ref in reversed(newest)} if self.keep_every else {}
        return {*newest[: self.keep_last], *best, *spaced.values(), *(pinned & set(newest))}

    def best(self, checkpoints: Sequence[RetentionCandidate]) -> list[RetentionCandidate]:
        """Return those with the metric, best first; the older of equals first. A NaN is never best."""
        sign = 1.0 if self.metric_mode == "min" else -1.0
        rated = [item for item in checkpoints if not math.isnan(item.metrics.get(self.metric, math.nan))]
        return sorted(rated, key=lambda item: (sign * item.metrics[self.metric], item.ref))
