"""What can be known of a run's model before any worker is started: it is built once, without memory.

So a wrong name, a setting that does not fit or an adapter that finds nothing to adapt is one error within seconds.
"""

from __future__ import annotations

import torch
import transformers

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
