"""Settings under `track:`: which experiment trackers receive the metrics. They must not hold credentials."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from outlast.trainers.config.base import Settings

Name = Literal["tensorboard", "mlflow", "wandb"]
_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


class TrackSettings(Settings):
    """Experiment trackers that receive the run's metrics, besides its own journal."""

    to: list[Name] | None = None
    """tensorboard, mlflow, wandb; [] for none. Default: tensorboard, if it is installed on the worker of rank 0."""
    project: str = "outlast"
    """The experiment in MLflow, the project in Weights & Biases."""
    options: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Further arguments of accelerate's trackers, by tracker, such as `wandb: {entity: my-team}`. Addresses and
    credentials come from the environment only (MLFLOW_TRACKING_URI, WANDB_API_KEY, …)."""

    @field_validator("options")
    @classmethod
    def _holds_no_secret(cls, value: dict[Name, dict[str, Any]]) -> dict[Name, dict[str, Any]]:
        for name, options in value.items():
            for key in options:
                if _SECRET.search(key):
                    raise ValueError(f"{name}.{key} looks like a credential: set it in the environment instead")
        return value
