"""Settings of a training run, validated when they are built, before any resources are allocated.

Every block refuses unknown keys. The docstring under a field gives its meaning, its unit and why its default is so.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import check_run_name
from outlast.trainers.config.base import Settings
from outlast.trainers.config.checkpoint import CheckpointSettings
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.config.train import (
    Exactness,
    Parallel,
    ParallelSettings,
    Precision,
    Schedule,
    TrainingFailureSettings,
    TrainSettings,
)


class TrainingConfig(Settings):
    """All settings of the training loop."""

    name: Annotated[str, AfterValidator(check_run_name)]
    """Name of the run, and of its directory in the storage."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The only source of randomness: order of samples, new weights, dropout, masks."""
    model: ModelSettings
    data: DataSettings
    train: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}))
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings.model_validate({}))
    exactness: Exactness = Exactness.SAME_WORLD
    """Guarantee for a resumed run: the same bits at the same world size (same-world) or at any world size (elastic), or
    no guarantee at the communication library's speed (fast)."""
    deterministic: bool = True
    """Use torch's deterministic algorithms. Some GPU kernels get slower; identical bits require it."""
    scale: ParallelSettings = Field(default_factory=ParallelSettings)
    failure: TrainingFailureSettings = Field(default_factory=lambda: TrainingFailureSettings.model_validate({}))

    @model_validator(mode="after")
    def _has_eval_data(self) -> TrainingConfig:
        needs_eval = self.train.eval_every or self.checkpoint.keep_best
        if needs_eval and not self.data.eval:
            raise ValueError("evaluation needs data.eval: a file, or a share such as 2%")
        if self.scale.parallel is Parallel.FSDP and self.exactness is Exactness.ELASTIC:
            raise ConfigError(
                "exactness: elastic needs scale.parallel: ddp; with fsdp, gradients are added rank by rank, so the "
                "order follows the number of workers",
                hint="use exactness: same-world with fsdp, or scale.parallel: ddp",
            )
        return self

    def numerics_settings(self) -> dict[str, Any]:
        """Return the settings that determine the run's numbers, except the data, which its fingerprint covers.

        Two runs with equal settings here, equal data and equal world size end with the same bits.
        """
        settings = self.model_dump(mode="json", include={"seed", "model", "train", "exactness", "deterministic"})
        has_no_effect = {
            "eval_every": self.train.early_stopping is None,
            "log_every": True,
            "gradient_checkpointing": not self.train.compile,  # recomputes the same bits with the same kernels
            "loss_scale": self.train.precision is not Precision.FP16,
            "loss_scale_window": self.train.precision is not Precision.FP16,
            "power": self.train.schedule is not Schedule.POLYNOMIAL,
            "decay": self.train.schedule is not Schedule.WSD,
        }
        for name in has_no_effect:
            if has_no_effect[name]:
                settings["train"].pop(name)
        settings["model"].pop("tokenizer")  # the data's fingerprint covers it
        settings["model"].pop("trust_remote_code")
        if self.model.path:
            settings["model"]["path"] = PurePath(self.model.path).name  # a directory may move
        if self.model.lora and self.model.lora.path:
            settings["model"]["lora"]["path"] = PurePath(self.model.lora.path).name
        return settings
