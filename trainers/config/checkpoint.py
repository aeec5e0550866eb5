"""Settings under `checkpoint:`. None of them may affect the numbers of training: a resumed run may change them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.run_store.retention_policy import KEEP_LAST_MIN, Retention
from outlast.checkpointing.save.save_schedule import SaveInterval
from outlast.checkpointing.storage.location import parse_location
from outlast.trainers.config.base import Interval, Settings
from outlast.trainers.config.train import with_default_mode


def _num_bytes(text: str | int) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?B)?", str(text).strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a size: write 5GB, 200MB, or a number of bytes")
    return int(match[1]) * {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[(match[2] or "").upper()]


class CheckpointSettings(Settings):
    """Where checkpoints are stored, when they are saved, and which are kept."""

    storage: str = "./runs"
    """A directory that every machine of the run sees at this path, or an object store: `s3://bucket/prefix`, or any
    other that `pyarrow.fs` supports. It holds checkpoints, prepared data and the run's journal."""
    every: Interval = SaveInterval.parse("10m")
    """Save interval: 200 (steps), 10m (or s, h), 1 epoch; or auto, from the cost of a save and the failures so far."""
    overlap: bool = True
    """Copy the state while the next step computes, and write it in the background. It takes memory for one copy of each
    worker's share; without it training waits for every commit."""
    memory: Literal["auto"] | bool | Annotated[int, Field(ge=1, strict=True)] = "auto"
    """With `scale.parallel: fsdp`, keep snapshots of each worker's share in the shared memory of its node, with copies
    on another one, and restart from them after a loss. auto: if they take at most half of the free memory, as often as
    costs at most 1 % of the time of the steps; true: fail if they do not fit; a number: every so many steps."""
    settle_s: float = Field(0.0, ge=0.0, le=600.0)
    """Seconds by which a listing of the storage may lag, as on NFS with its attribute cache. Each start waits twice as
    long."""
    max_shard_size: str | int = "50GB"
    """Largest size of a weights file: bytes, or a number with KB, MB or GB, as in transformers. Larger weights are
    split into several files."""
    keep_last: int = Field(3, ge=KEEP_LAST_MIN)
    """Number of newest checkpoints to keep; at least two, because one may be damaged."""
    keep_best: int = Field(0, ge=0)
    """Number of best checkpoints by `metric` to keep; each evaluation then saves."""
    keep_every: int = Field(0, ge=0)
    """Keep the last checkpoint of every interval of this many steps forever; 0 turns this rule off."""
    metric: str = "eval_loss"
    """Metric that defines the best checkpoint: one that an evaluation measures."""
    metric_mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better. Default: min for a loss or an error, max for other scores."""
    load_best: bool = False
    """Publish the best checkpoint as the run's model instead of the last."""

    @field_validator("every", mode="before")
    @classmethod
    def _is_not_zero(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError(
                "'0' is not an interval: write 200 (steps) or 10m; to save only at the end, more steps than the run has"
            )
        return value

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _is_size(cls, value: str | int) -> str | int:
        _num_bytes(value)
        return value

    @model_validator(mode="after")
    def _best_is_kept(self) -> CheckpointSettings:
        if self.load_best and not self.keep_best:
            raise ValueError("load_best needs keep_best: 1 or more")  # the best checkpoint must not be deleted
        return self

    @property
    def max_shard_bytes(self) -> int:
        return _num_bytes(self.max_shard_size)

    @model_validator(mode="before")
    @classmethod
    def _default_mode(cls, body: Any) -> Any:
        return with_default_mode(body, "metric_mode")

    @field_validator("storage")
    @classmethod
    def _is_location(cls, value: str) -> str:
        parse_location(value)
        return value

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_best, self.metric, self.metric_mode, self.keep_every)
