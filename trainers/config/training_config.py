"""The settings of a training run, checked when they are built, before anything is held.

Every model refuses keys that it does not know. The docstring under a field says what it means, in which unit, and why
its default is what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from math import gcd
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import check_run_name
from outlast.checkpointing.run_store.retention import KEEP_LAST_MIN, Retention
from outlast.checkpointing.save.save_interval import Every, Unit
from outlast.trainers.config.model import DataSettings, ModelSettings, Settings


class Exactness(Enum):
    """What is promised about the order in which gradients are added."""

    SAME_WORLD = "same-world"  #: the same bits at the same world size
    ELASTIC = "elastic"  #: the same bits at any world size
    FAST = "fast"  #: the library's own order; a resumed run may differ in the last bits


class Parallel(Enum):
    """How the model is spread over the workers."""

    DDP = "ddp"  #: every worker holds all of it
    FSDP = "fsdp"  #: every worker holds a share, and gathers the rest block by block while it computes


class NonFinite(Enum):
    """What becomes of a step whose loss or gradient is not finite."""

    STOP = "stop"  #: the run ends there, with a checkpoint of the step before
    SKIP = "skip"  #: the step changes nothing, and the data moves on
    ROLL_BACK = "roll-back"  #: everything is read again from the newest checkpoint, and then the step is left out


def check_parallel(parallel: Parallel, exactness: Exactness) -> None:
    """Refuses what does not go together.

    Raises:
        ConfigError: It does not.
    """
    if parallel is Parallel.FSDP and exactness is Exactness.ELASTIC:
        raise ConfigError(
            "exactness: elastic needs scale.parallel: ddp; with fsdp, gradients are added rank by rank, so the order "
            "follows the number of workers",
            hint="use exactness: same-world with fsdp, or scale.parallel: ddp",
        )


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
    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt", "wsd"] = "cosine"
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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
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
    eval_every: int | str | None = None
    """Evaluate every so many steps (200) or epochs ("1 epoch"), and at the end. Default: only at the end."""

    @property
    def eval_interval(self) -> Every | None:
        return None if self.eval_every is None else Every.parse(self.eval_every)

    @field_validator("eval_every", mode="before")
    @classmethod
    def _counts_steps(cls, value: int | str | None) -> int | str | None:
        if value == 0:
            raise ValueError("'0' is not an interval; leave it out to evaluate only at the end")
        if value is not None and Every.parse(value).unit is Unit.SECONDS:
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
        if self.min_lr and self.schedule in ("constant", "inverse_sqrt"):
            raise ValueError(f"min_lr: schedule {self.schedule} does not end anywhere")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) is more than lr ({self.lr:g})")
        if self.model_fields_set & {"optimizer", "optimizer_options", "betas", "eps"} and ":" not in self.optimizer:
            from outlast.trainers.loop.optimizer import resolve  # brings torch, which most settings do without

            resolve(self)  # a class of the user's own is looked at where the run starts
        return self


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
    every: str | int = "10m"
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
    def _is_interval(cls, value: str | int) -> str | int:
        if value == 0:
            raise ValueError(
                "'0' is not an interval: write 200 (steps) or 10m; to save only at the end, more steps than it has"
            )
        Every.parse(value)
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
    def interval(self) -> Every:
        return Every.parse(self.every)

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_best, self.metric, self.metric_mode, self.keep_every)


class TrainingConfig(Settings):
    """Everything that the step loop needs to know."""

    name: str
    """Name of the run; one run, one directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random follows from it."""
    model: ModelSettings
    data: DataSettings
    train: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}))
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings.model_validate({}))
    exactness: Literal["same-world", "elastic", "fast"] = "same-world"
    """What is promised of a resumed run: the same bits at the same world size (same-world) or at any (elastic), or the
    library's own speed (fast)."""
    deterministic: bool = True
    """torch's deterministic algorithms. Some GPU kernels get slower; the promise of the same bits rests on it."""

    @field_validator("name")
    @classmethod
    def _is_usable(cls, value: str) -> str:
        return check_run_name(value)

    @model_validator(mode="after")
    def _can_be_done(self) -> TrainingConfig:
        wants_eval = self.train.eval_every or self.checkpoint.keep_best
        if wants_eval and not self.data.eval:
            raise ValueError("evaluation needs data.eval: a file, or a share such as 2%")
        return self

    def mathematics(self) -> dict[str, Any]:
        """The settings that decide which numbers come out, the data excepted (its fingerprint speaks for it).

        Two runs that agree in these, in the data and in the world size, end with the same bits.
        """
        whole = self.model_dump(mode="json", include={"seed", "model", "train", "exactness", "deterministic"})
        silent = {
            "eval_every": self.train.early_stopping is None,
            "gradient_checkpointing": not self.train.compile,  # computes the same bits twice, with the same kernels
            "loss_scale": self.train.precision != "fp16",
            "loss_scale_window": self.train.precision != "fp16",
            "power": self.train.schedule != "polynomial",
            "decay": self.train.schedule != "wsd",
        }
        for name in silent:
            if silent[name]:
                whole["train"].pop(name)
        whole["model"].pop("tokenizer")  # the data's fingerprint covers it
        whole["model"].pop("trust_remote_code")
        if self.model.path:
            whole["model"]["path"] = PurePath(self.model.path).name  # a directory may move
        return whole
