"""Settings under `train:` and enums. A resumed run may not change settings that determine its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from math import gcd
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.error_hints import did_you_mean
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.save.save_schedule import IntervalUnit, SaveInterval
from outlast.trainers.config.base import Duration, Interval, Settings

#: Optimizers by name; `loop.optimizer` has their classes.
OPTIMIZERS = ("adamw", "adam", "nadam", "sgd", "rmsprop", "adafactor")


class Exactness(Enum):
    """Guarantee about the order in which gradients are added."""

    SAME_WORLD = "same-world"  #: the same bits at the same world size
    ELASTIC = "elastic"  #: the same bits at any world size
    FAST = "fast"  #: the communication library's order; a resumed run may differ in the last bits


class Parallel(Enum):
    """How the model is distributed over the workers."""

    DDP = "ddp"  #: every worker holds the full model
    FSDP = "fsdp"  #: every worker holds a shard, and gathers the others block by block while it computes


class Precision(Enum):
    """Precision of operations in forward and backward. The weights are fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Schedule(Enum):
    """Learning-rate schedule after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    WSD = "wsd"


class NonFinite(Enum):
    """Handling of a step whose loss or gradient is not finite."""

    STOP = "stop"  #: end the run, with a checkpoint of the step before
    SKIP = "skip"  #: change nothing in this step, and continue with the next batch
    ROLL_BACK = "roll-back"  #: restore the newest checkpoint, and leave this step out when it is reached again


class OnSaveError(Enum):
    """Handling of a save that the storage refuses."""

    STOP = "stop"  #: end the attempt with the storage's error
    GO_ON = "go-on"  #: go on with training, and save again when the next save is due


class ParallelSettings(Settings):
    """How the model is distributed over the workers."""

    parallel: Parallel = Parallel.DDP
    """How the model is distributed. ddp: every worker holds the full model. fsdp: every worker holds a shard, and
    gathers the others block by block while it computes, which takes less memory and more communication."""


class TrainingFailureSettings(Settings):
    """Handling of failures within the training loop."""

    non_finite: NonFinite = NonFinite.STOP
    """Handling of a step whose loss or gradient is not finite: end the run with a checkpoint (stop), skip the step
    (skip), or restore the newest checkpoint and skip the step when it is reached again (roll-back)."""
    on_save_error: OnSaveError = OnSaveError.STOP
    """Handling of a save that the storage refuses or fails: end the attempt (stop), or go on with training and save
    again when the next save is due (go-on). The last save, of a finished or a stopped run, must succeed in any case."""
    max_unsaved: Duration | None = SaveInterval.parse("1h")
    """With on_save_error: go-on, the longest time without a save that succeeded: a save that fails later ends the
    attempt, so it must be longer than checkpoint.every. null: no limit."""


def with_default_mode(body: Any, key: str) -> Any:
    """Fill in `key`, whether a smaller or larger metric is better, from the metric's name. For "before" validators."""
    if not isinstance(body, Mapping) or key in body or not isinstance(body.get("metric"), str):
        return body
    is_less_better = any(word in body["metric"] for word in ("loss", "error", "mse", "mae", "perplexity"))
    return {**body, key: "min" if is_less_better else "max"}


class EarlyStoppingSettings(Settings):
    """Early stopping after `patience` evaluations without a better `metric`."""

    metric: str = "eval_loss"
    """Metric to watch: one that an evaluation measures."""
    patience: int = Field(3, ge=1)
    """Number of consecutive evaluations without improvement after which the run ends."""
    min_delta: float = Field(0.0, ge=0)
    """Smallest change that counts as an improvement; it must be exceeded."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better. Default: min for a loss or an error, max for other scores."""

    @model_validator(mode="before")
    @classmethod
    def _default_mode(cls, body: Any) -> Any:
        return with_default_mode(body, "mode")


class TrainSettings(Settings):
    """Length, batches, optimizer and learning rate of the run."""

    steps: int | None = Field(None, ge=1)
    """Optimizer updates in the run. Set steps or epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data in the run. Default 3 when steps is not set."""
    batch: int = Field(8, ge=1)
    """Samples in one step, over all workers and micro-batches. The world size never changes it."""
    micro_batch: int = Field(0, ge=0)
    """Samples in one forward and backward; divides batch. Default: the greatest common divisor of batch and 4."""
    group_by_length: bool = True
    """Group samples of similar length within a step into micro-batches, to reduce padding. The samples of a step do not
    change."""
    lr: float = Field(5e-5, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule; must be 0 for constant and inverse_sqrt, which have no end."""
    schedule: Schedule = Schedule.COSINE
    """Learning-rate schedule after the warm-up. All but constant and inverse_sqrt end at min_lr at the last step; wsd
    (warm-up, stable, decay) stays at the peak until the last `decay` steps."""
    warmup: float = Field(0.0, ge=0)
    """Steps of linear warm-up; below 1, a share of all steps."""
    decay: float = Field(0.1, gt=0)
    """For wsd: steps of the decay, along a cosine, at the end; below 1, a share of all steps."""
    power: float = Field(1.0, gt=0)
    """For polynomial: the exponent."""
    optimizer: str = "adamw"
    """adamw, adam, nadam, sgd, rmsprop, adafactor (torch's), or a class of your own as package.module:Class."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer's constructor, such as momentum: 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay as the optimizer defines it (AdamW decouples it); biases and norms are exempt. Default 0.01 for
    adamw, 0 for others."""
    betas: tuple[float, float] | None = None
    """Averaging coefficients of optimizers that have them. Default: the optimizer's own."""
    eps: float | None = Field(None, gt=0)
    """The optimizer's epsilon. Default: its own."""
    clip: float = Field(1.0, ge=0)
    """Maximum norm of the gradient; 0 turns clipping off."""
    precision: Precision = Precision.FP32
    """fp32, or bf16 or fp16 by autocast. Weights are trained and saved in fp32 in each case."""
    loss_scale: float = Field(65536.0, gt=0)
    """For fp16: initial factor on the loss, so that small gradients do not underflow. A step whose gradients overflow
    only halves the scale."""
    loss_scale_window: int = Field(2000, ge=1)
    """For fp16: number of steps without overflow after which the scale doubles."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time."""
    compile: bool = False
    """torch.compile, one set of kernels for each batch shape. The first steps are slow; it needs a compiler."""
    early_stopping: EarlyStoppingSettings | None = None
    """End the run before the last step when evaluations stop improving. Needs eval_every."""
    eval_every: Interval | None = None
    """Evaluation interval in steps (200) or epochs ("1 epoch"); the end is always evaluated. Default: only the end."""

    log_every: int | None = Field(None, ge=1)
    """Steps between two entries of `log_history` in a checkpoint's trainer_state.json: mean loss, gradient norm and
    learning rate. Default: so many that a run has at most 500 entries; there are never more than 2,000, and the steps
    between two grow instead. Journal and trackers have every step."""

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
            raise ValueError(
                "evaluation needs an interval in steps or epochs: all workers must evaluate at the same step"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if data.get("steps") is None and data.get("epochs") is None:
                data["epochs"] = 3
            if not data.get("micro_batch"):
                with suppress(TypeError, ValueError):  # a batch that is not a number is reported by its own field
                    data["micro_batch"] = gcd(int(data.get("batch", 8)), 4) or 1
            if data.get("weight_decay") is None:
                data["weight_decay"] = 0.01 if data.get("optimizer", "adamw") == "adamw" else 0.0
        return data

    @model_validator(mode="after")
    def _is_consistent(self) -> TrainSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch ({self.micro_batch}) must divide batch ({self.batch})")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every")
        if self.min_lr and self.schedule in (Schedule.CONSTANT, Schedule.INVERSE_SQRT):
            raise ValueError(f"min_lr must be 0 with schedule {self.schedule.value}, which has no end")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) must not exceed lr ({self.lr:g})")
        if ":" not in self.optimizer and self.optimizer not in OPTIMIZERS:  # or a user's class
            raise ConfigError(
                f"unknown optimizer {self.optimizer!r}{did_you_mean(self.optimizer, OPTIMIZERS)}",
                hint=f"one of {', '.join(OPTIMIZERS)}, or a class of your own as package.module:Class",
            )
        return self
