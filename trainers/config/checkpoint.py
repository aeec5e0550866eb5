"""Settings of checkpoints."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.run_store.retention import KEEP_LAST_MIN, Retention
from outlast.checkpointing.save.save_interval import SaveInterval
from outlast.trainers.config.base import Interval, Settings
from outlast.trainers.config.train import with_mode


def _num_bytes(text: str | int) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?B)?", str(text).strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a size: write 5GB, 200MB, or a number of bytes")
    return int(match[1]) * {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[(match[2] or "").upper()]


class CheckpointSettings(Settings):
    """Where checkpoints go, when, and which stay."""

    storage: str = "./runs"
    """A directory that every machine of the run sees under this name, or an object store: `s3://bucket/prefix`, or any
    other that `pyarrow.fs` knows. Checkpoints, prepared data and the run's journal lie there."""
    every: Interval = SaveInterval.parse("10m")
    """Interval: 200 (steps), 10m (or s, h), 1 epoch; or auto, from the cost of a save and the failures so far."""
    overlap: bool = True
    """Copy the state while the next step computes, and write it in the background. It takes memory for one copy of each
    worker's share; without it training waits for every commit."""
    settle_s: float = Field(0.0, ge=0.0, le=600.0)
    """Seconds by which a listing of the storage may lag behind, as on NFS with its attribute cache. Each start waits
    twice as long."""
    max_shard_size: str | int = "50GB"
    """Weights beyond so much go on in another file: bytes, or a number with KB, MB or GB, as transformers has it."""
    keep_last: int = Field(3, ge=KEEP_LAST_MIN)
    """The newest so many stay; two at least, because one may turn out damaged."""
    keep_best: int = Field(0, ge=0)
    """The best so many by `metric` stay; each evaluation then saves."""
    keep_every: int = Field(0, ge=0)
    """Of every so many steps the last checkpoint stays, for good; 0 keeps none but by the other rules."""
    metric: str = "eval_loss"
    """What best means: one of those that an evaluation measures."""
    metric_mode: Literal["min", "max"] = "min"
    """Whether less or more is better. Where it is not given: min for a loss or an error, max for other scores."""
    load_best: bool = False
    """Publish the best checkpoint as the run's model, not the last."""

    @field_validator("every", mode="before")
    @classmethod
    def _is_not_zero(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError(
                "'0' is not an interval: write 200 (steps) or 10m; to save only at the end, more steps than it has"
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
            raise ValueError("load_best needs keep_best: 1 or more")
        return self

    @property
    def max_shard_bytes(self) -> int:
        return _num_bytes(self.max_shard_size)

    @model_validator(mode="before")
    @classmethod
    def _knows_its_mode(cls, body: Any) -> Any:
        return with_mode(body, "metric_mode")

    @field_validator("storage")
    @classmethod
    def _has_both_slashes(cls, value: str) -> str:
        if found := re.match(r"(\w{2,}):/(?!/)", value):
            rest = value[found.end() - (found[1] == "file") :]  # whose path begins with the slash
            raise ValueError(f"{value} is neither a path nor a URI; did you mean {found[1]}://{rest}?")
        return value

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_best, self.metric, self.metric_mode, self.keep_every)
