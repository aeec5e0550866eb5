"""What a user lets a stored run or checkpoint do, which may come from anywhere: import code, and lead to other models.

A run file that the user wrote may name both. What a claim, a manifest or an adapter names is not followed unless the
same is in that file, was given as an option, or `--trust-remote-code` allows all of it.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.task_table import TASKS
from outlast.trainers.config.train import OPTIMIZERS
from outlast.trainers.config.training_config import TrainingConfig


def named_code(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings by which code of other authors runs: names that are not outlast's, and trusted code."""
    model, optimizer = config.model, config.train.optimizer
    names: dict[str, Any] = {
        "model.class": model.class_,
        "model.task": None if model.task in TASKS else model.task,
        "train.optimizer": None if optimizer in OPTIMIZERS else optimizer,
        "model.trust_remote_code": model.trust_remote_code or None,
    }
    return {key: name for key, name in names.items() if name is not None}


@dataclass(frozen=True, slots=True)
class Trust:
    """What the user wrote or allowed."""

    everything: bool = False  #: `--trust-remote-code`
    settings: Mapping[str, Any] = field(default_factory=dict)  #: by dotted key, of the user's run file and options

    def check_code(self, names: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError if code that `where` names, by its settings, would be imported unasked."""
        foreign = {key: name for key, name in names.items() if self.settings.get(key) != name}
        if foreign and not self.everything:
            listing = ", ".join(f"{key} {name}" for key, name in foreign.items())[:300]
            raise ConfigError(
                f"{where} names code: {listing}; outlast imports none that a run names",
                hint="read that code; if you trust it, give --trust-remote-code, or name the run file that you wrote",
            )

    def declared_model(self, declaration: Mapping[str, Any]) -> tuple[str, str | None]:
        """Return task and class of the model in a checkpoint's declaration.

        Raises ConfigError if it has none, or names code that is not trusted.
        """
        model = declaration.get("mathematics")
        model = model.get("model") if isinstance(model, dict) else None
        task, own = (model.get("task"), model.get("class_")) if isinstance(model, dict) else (None, None)
        if not isinstance(task, str) or not isinstance(own, str | None):
            raise ConfigError("the checkpoint does not declare its task", hint="use one that outlast saved")
        # No settings were validated here: whatever is not the name of a task of outlast would be imported.
        names = {"model.task": None if task in TASKS else task, "model.class": own}
        self.check_code({key: name for key, name in names.items() if name is not None}, "the checkpoint")
        return task, own

    def check_base(self, base: str) -> str:
        """Return the base model that an adapter names. Raises ConfigError if the user names another one or none."""
        if not self.everything and self.settings.get("model.path") != base:
            raise ConfigError(
                f"the adapter names its base model, {base!r}; outlast follows no path that leads out of a run",
                hint=f"if that is the right one: --base {shlex.quote(base)}",
            )
        return base


NO_TRUST = Trust()  #: nothing that a run names is followed
