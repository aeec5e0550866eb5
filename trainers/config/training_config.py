"""The settings of a training run, checked when they are built, before anything is held.

Every model refuses keys that it does not know. The docstring under a field says what it means, in which unit, and why
its default is what it is.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import check_run_name
from outlast.trainers.config.base import Settings
from outlast.trainers.config.checkpoint import CheckpointSettings
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.config.train import (
    Exactness,
    NonFiniteSettings,
    Parallel,
    ParallelSettings,
    Precision,
    Schedule,
    TrainSettings,
)


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
    exactness: Exactness = Exactness.SAME_WORLD
    """What is promised of a resumed run: the same bits at the same world size (same-world) or at any (elastic), or the
    library's own speed (fast)."""
    deterministic: bool = True
    """torch's deterministic algorithms. Some GPU kernels get slower; the promise of the same bits rests on it."""
    scale: ParallelSettings = Field(default_factory=ParallelSettings)
    failure: NonFiniteSettings = Field(default_factory=NonFiniteSettings)

    @field_validator("name")
    @classmethod
    def _is_usable(cls, value: str) -> str:
        return check_run_name(value)

    @model_validator(mode="after")
    def _can_be_done(self) -> TrainingConfig:
        wants_eval = self.train.eval_every or self.checkpoint.keep_best
        if wants_eval and not self.data.eval:
            raise ValueError("evaluation needs data.eval: a file, or a share such as 2%")
        if self.scale.parallel is Parallel.FSDP and self.exactness is Exactness.ELASTIC:
            raise ConfigError(
                "exactness: elastic needs scale.parallel: ddp; with fsdp, gradients are added rank by rank, so the "
                "order follows the number of workers",
                hint="use exactness: same-world with fsdp, or scale.parallel: ddp",
            )
        return self

    def numerics_settings(self) -> dict[str, Any]:
        """The settings that decide which numbers come out, the data excepted (its fingerprint speaks for it).

        Two runs that agree in these, in the data and in the world size, end with the same bits.
        """
        whole = self.model_dump(mode="json", include={"seed", "model", "train", "exactness", "deterministic"})
        silent = {
            "eval_every": self.train.early_stopping is None,
            "gradient_checkpointing": not self.train.compile,  # computes the same bits twice, with the same kernels
            "loss_scale": self.train.precision is not Precision.FP16,
            "loss_scale_window": self.train.precision is not Precision.FP16,
            "power": self.train.schedule is not Schedule.POLYNOMIAL,
            "decay": self.train.schedule is not Schedule.WSD,
        }
        for name in silent:
            if silent[name]:
                whole["train"].pop(name)
        whole["model"].pop("tokenizer")  # the data's fingerprint covers it
        whole["model"].pop("trust_remote_code")
        if self.model.path:
            whole["model"]["path"] = PurePath(self.model.path).name  # a directory may move
        return whole
