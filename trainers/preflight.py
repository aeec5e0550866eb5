"""What can be known of a run's model before any worker is started: it is built once, without memory.

So a wrong name, a setting that does not fit or an adapter that finds nothing to adapt is one error within seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage import Storage
from outlast.trainers.adapters import attach_lora
from outlast.trainers.compute import check_recomputes
from outlast.trainers.config import TrainingConfig
from outlast.trainers.data import Prepared
from outlast.trainers.models import Tokenizer, build_model, check_names
from outlast.trainers.registry import find_task
from outlast.trainers.tasks import Task


def check_code(config: TrainingConfig) -> None:
    """Looks for everything that the settings name, data aside.

    Raises:
        ConfigError: A class, task, or architecture is not there, or has no such setting.
    """
    find_task(config.model.task)
    check_names(config.model)


def check_model(config: TrainingConfig, prepared: Prepared, storage: Storage) -> None:
    """Builds the model as the workers will, but without its weights.

    Raises:
        ConfigError: It cannot be built, adapted or trained as the settings say.
    """
    tokenizer = prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
    own = check_names(config.model)
    try:
        with torch.device("meta"):
            _build(config, task, tokenizer)
    except Exception:
        if own is None or issubclass(own, transformers.PreTrainedModel):
            raise  # transformers itself builds them so
        _build(config, task, tokenizer)


def _build(config: TrainingConfig, task: Task, tokenizer: Tokenizer) -> None:
    bare = config.model.model_copy(update={"lora": None})  # whose weights are then not read
    model, _ = build_model(bare, task, tokenizer, config.seed, fresh=False)
    if config.model.lora is not None:
        attach_lora(model, config.model.lora, task.auto_class)
    check_recomputes(model, config.train)


def check_metric(config: TrainingConfig, facts: Mapping[str, Any]) -> None:
    """Raises ConfigError if checkpoints or early stopping go by a metric that the task does not measure."""
    metric, scores = config.checkpoint.metric, find_task(config.model.task).score_names(facts)
    known = ["loss", "eval_loss", *(f"eval_{name}" for name in scores)]
    if config.checkpoint.keep_best and metric not in known:
        raise ConfigError(
            f"checkpoint.metric {metric!r} is not measured by task {config.model.task}; it measures {', '.join(known)}",
            hint=f"set checkpoint.metric, for example -s checkpoint.metric={known[-1]}",
        )
    stopping = config.train.early_stopping
    if stopping is not None and stopping.metric not in known[1:]:
        raise ConfigError(
            f"train.early_stopping.metric {stopping.metric!r} is not what an evaluation of task "
            f"{config.model.task} measures: {', '.join(known[1:])}",
            hint=f"set it, for example -s train.early_stopping.metric={known[-1]}",
        )
