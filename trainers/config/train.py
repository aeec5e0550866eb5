"""Settings of training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from math import gcd
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.save.save_interval import IntervalUnit, SaveInterval
from outlast.trainers.config.base import Interval, Settings

#: Optimizers by name; `loop.optimizer` has their classes.
OPTIMIZERS = ("adamw", "adam", "nadam", "sgd", "rmsprop", "adafactor")


class Exactness(Enum):
    """What is promised about the order in which gradients are added."""

    SAME_WORLD = "same-world"  #: the same bits at the same world size
    ELASTIC = "elastic"  #: the same bits at any world size
    FAST = "fast"  #: the library's own order; a resumed run may differ in the last bits


class Parallel(Enum):
    """How the model is spread over the workers."""

    DDP = "ddp"  #: every worker holds all of it
    FSDP = "fsdp"  #: every worker holds a share, and gathers the rest block by block while it computes


class Precision(Enum):
    """In which precision operations compute. The weights are fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Schedule(Enum):
    """How the learning rate goes on after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    WSD = "wsd"


class NonFinite(Enum):
    """What becomes of a step whose loss or gradient is not finite."""

    STOP = "stop"  #: the run ends there, with a checkpoint of the step before
    SKIP = "skip"  #: the step changes nothing, and the data moves on
    ROLL_BACK = "roll-back"  #: everything is read again from the newest checkpoint, and then the step is left out


class ParallelSettings(Settings):
    """How the model is spread over the workers."""

    parallel: Parallel = Parallel.DDP
    """How the model is spread: every worker holds all of it (ddp), or a share, and gathers the rest block by block
    while it computes (fsdp): less memory, more traffic."""


class NonFiniteSettings(Settings):
    """What becomes of a step that cannot be used."""

    non_finite: NonFinite = NonFinite.STOP
    """What becomes of a step whose loss or gradient is not finite: the run ends there, with a checkpoint (stop); it is
    left out (skip); or all is read again from the newest checkpoint, and then it is left out (roll-back)."""


def with_mode(body: Any, key: str) -> Any:
    """A block that names a metric, but not by `key` whether less or more of it is better, with what its name says."""
    if not isinstance(body, Mapping) or key in body or not isinstance(body.get("metric"), str):
        return body
    is_less_better = any(word in body["metric"] for word in ("loss", "error", "mse", "mae", "perplexity"))
    return {**body, key: "min" if is_less_better else "max"}


class EarlyStoppingSettings(Settings):
    """When to end before the last step: after `patience` evaluations without a better `metric`."""

    metric: str = "eval_loss"
    """What is watched, one of those that an evaluation measures."""
    patience: int = Field(3, ge=1)
    """Evaluations in a row that may bring nothing better; after so many the run ends."""
    min_delta: float = Field(0.0, ge=0)
    """Better means better by more than this."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better. Where it is not given: min for a loss or an error, max for other scores."""

    @model_validator(mode="before")
    @classmethod
    def _knows_its_mode(cls, body: Any) -> Any:
        return with_mode(body, "mode")


class TrainSettings(Settings):
    """How long, in which batches, and by which rule the weights change."""

    steps: int | None = Field(None, ge=1)
    """Optimizer updates in the run. Give steps or epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data in the run. Default 3 when steps is not given."""
    batch: int = Field(8, ge=1)
    """Samples in one step, over all workers and micro-batches. The world size never changes it."""
    micro_batch: int = Field(0, ge=0)
    """Samples in one forward and backward; divides batch. Default: the greatest common divisor of batch and 4."""
    group_by_length: bool = True
    """Put samples of about one length of a step into one micro-batch, so that less is padding. Which samples a step has
    does not change."""
    lr: float = Field(5e-5, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Where the schedule ends; of constant and inverse_sqrt, which have no end, 0."""
    schedule: Schedule = Schedule.COSINE
    """How the learning rate goes on after the warm-up: down to min_lr at the last step, or not. wsd
    (warm-up, stable, decay) stays at the peak until the last `decay` steps."""
    warmup: float = Field(0.0, ge=0)
    """Steps of linear warm-up; below 1, a share of all steps."""
    decay: float = Field(0.1, gt=0)
    """For wsd: steps of the decay, along a cosine, at the end; below 1, a share of all steps."""
    power: float = Field(1.0, gt=0)
    """For polynomial: its power."""
    optimizer: str = "adamw"
    """adamw, adam, nadam, sgd, rmsprop, adafactor (torch's), or a class of your own as package.module:Class."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """What else the optimizer's constructor takes, such as momentum: 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay as the optimizer understands it (AdamW decouples it); biases and norms are exempt. Default 0.01 for
    adamw, 0 for others."""
    betas: tuple[float, float] | None = None
    """Averaging coefficients of optimizers that have them. Default: the optimizer's own."""
    eps: float | None = Field(None, gt=0)
    """The optimizer's epsilon. Default: its own."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    precision: Precision = Precision.FP32
    """fp32, or bf16 or fp16 by autocast. The weights are fp32 either way: what is saved is what is trained."""
    loss_scale: float = Field(65536.0, gt=0)
    """For fp16: what the loss is multiplied by at first, so that small gradients do not vanish. A step whose gradients
    overflow changes nothing but the scale, which halves."""
    loss_scale_window: int = Field(2000, ge=1)
    """For fp16: after so many steps without overflow the scale doubles."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    compile: bool = False
    """torch.compile, one kernel set for each shape of batch. The first steps take long; it needs a compiler."""
    early_stopping: EarlyStoppingSettings | None = None
    """End before the last step when evaluations bring nothing better. Needs eval_every."""
    eval_every: Interval | None = None
    """Evaluate every so many steps (200) or epochs ("1 epoch"), and at the end. Default: only at the end."""

    @field_validator("eval_every", mode="before")
    @classmethod
    def _is_not_zero(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError("'0' is not an interval; leave it out to evaluate only at the end")
        return value

    @field_validator("eval_every")
    @classmethod
    def _counts_steps(cls, value: SaveInterval | None) -> SaveInterval | None:
        if value is not None and value.unit is IntervalUnit.SECONDS:
            raise ValueError("evaluation goes by steps or epochs, because every worker must know when")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if data.get("steps") is None and data.get("epochs") is None:
                data["epochs"] = 3
            if not data.get("micro_batch"):
                with suppress(TypeError, ValueError):  # a batch that is no number is reported as such
                    data["micro_batch"] = gcd(int(data.get("batch", 8)), 4) or 1
            if data.get("weight_decay") is None:
                data["weight_decay"] = 0.01 if data.get("optimizer", "adamw") == "adamw" else 0.0
        return data

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch ({self.micro_batch}) must divide batch ({self.batch})")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every")
        return self

    @model_validator(mode="after")
    def _is_known(self) -> TrainSettings:
        if self.min_lr and self.schedule in (Schedule.CONSTANT, Schedule.INVERSE_SQRT):
            raise ValueError(f"min_lr: schedule {self.schedule.value} does not end anywhere")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) is more than lr ({self.lr:g})")
        if ":" not in self.optimizer and self.optimizer not in OPTIMIZERS:  # or a user's class
            near = difflib.get_close_matches(self.optimizer, OPTIMIZERS, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"optimizer {self.optimizer!r} is not known{guess}",
                hint=f"one of {', '.join(OPTIMIZERS)}, or a class of your own as package.module:Class",
            )
        return self
