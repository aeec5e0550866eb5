"""Settings of trackers."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from outlast.trainers.config.base import Settings

Name = Literal["tensorboard", "mlflow", "wandb"]

_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


class TrackSettings(Settings):
    """Which tools get the run's metrics, beside its own journal."""

    to: list[Name] | None = None
    """tensorboard, mlflow, wandb; [] for none. Default: tensorboard, where a worker has it."""
    project: str = "outlast"
    """The experiment in MLflow, the project in Weights & Biases."""
    options: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """What else a tracker is to know, by its name, such as `wandb: {entity: my-team}`: arguments of accelerate's
    trackers. Places and credentials come from the environment alone (MLFLOW_TRACKING_URI, WANDB_API_KEY, …)."""

    @field_validator("options")
    @classmethod
    def _holds_no_secret(cls, value: dict[Name, dict[str, Any]]) -> dict[Name, dict[str, Any]]:
        for name, options in value.items():
            for key in options:
                if _SECRET.search(key):
                    raise ValueError(f"{name}.{key} looks like a credential, which belongs into the environment")
        return value
