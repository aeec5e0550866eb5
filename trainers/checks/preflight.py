"""What can be known of a run's model before any worker is started: it is built once, without memory.

So a wrong name, a setting that does not fit or an adapter that finds nothing to adapt is one error within seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.base import Storage
from outlast.trainers.config.model import is_hub_id
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.config.validation_errors import nearest
from outlast.trainers.data.tokenizer import Tokenizer, load_tokenizer
from outlast.trainers.loop.compilation import check_recomputes
from outlast.trainers.loop.optimizer import resolve
from outlast.trainers.models.build import build_model, check_head, check_names
from outlast.trainers.models.lora import adapter_files, attach_lora
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import Task
from outlast.trainers.tasks.registry import find_task

#: What architectures call the embedding of a token's absolute position.
_POSITIONS = ("wpe", "position_embeddings", "embed_positions")


def check_code(config: TrainingConfig) -> None:
    """Looks for everything that the settings name, data aside.

    Raises:
        ConfigError: A class, task, architecture or optimizer is not there, or has no such setting.
    """
    find_task(config.model.task)
    check_names(config.model)
    resolve(config.train)


def check_architecture(config: TrainingConfig) -> None:
    """Looks at the model's configuration, and at the tokenizer of a directory; nobody is asked over the network.

    Raises:
        ConfigError: There is no such model, or none of its architecture does the task.
    """
    settings, own = config.model, check_names(config.model)
    given = settings.path or ""
    if is_hub_id(given):
        return
    if given:
        load_tokenizer(settings.tokenizer.path if settings.tokenizer and settings.tokenizer.path else given)
    if own is None:
        check_head(settings, find_task(settings.task))


def check_model(config: TrainingConfig, prepared: Prepared, storage: Storage) -> tuple[nn.Module, dict[str, bytes]]:
    """Builds the model as the workers will, but without its weights. Returns it, and a checkpoint's small files.

    Raises:
        ConfigError: It cannot be built, adapted or trained as the settings say.
    """
    tokenizer = prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
    own, longest = check_names(config.model), max(prepared.longest.values(), default=0)
    try:
        with torch.device("meta"):
            return _build(config, task, tokenizer, longest)
    except Exception:
        if own is None or issubclass(own, transformers.PreTrainedModel):
            raise  # transformers itself builds them so
        return _build(config, task, tokenizer, longest)


def _build(
    config: TrainingConfig, task: Task, tokenizer: Tokenizer, longest: int
) -> tuple[nn.Module, dict[str, bytes]]:
    bare = config.model.model_copy(update={"lora": None})  # whose weights are then not read
    model, files = build_model(bare, task, tokenizer, config.seed, fresh=False)
    _check_places(model, longest)
    if config.model.lora is not None:
        model = attach_lora(model, config.model.lora, task.auto_class)
        files |= adapter_files(model)
    check_recomputes(model, config.train)
    return model, files


def _check_places(model: nn.Module, longest: int) -> None:
    """Raises ConfigError if a sample has more tokens than a model of transformers has learned positions for."""
    if not isinstance(model, transformers.PreTrainedModel):
        return
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            first = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
            if longest > table.num_embeddings - first:
                raise ConfigError(
                    f"the longest sample has {longest} tokens, and {type(model).__name__} has places for "
                    f"{table.num_embeddings - first} ({name})",
                    hint=f"-s data.max_length={table.num_embeddings - first}, or take a model with more places",
                )


def check_metric(config: TrainingConfig, facts: Mapping[str, Any]) -> None:
    """Raises ConfigError if checkpoints or early stopping go by a metric that the task does not measure."""
    metric, scores = config.checkpoint.metric, find_task(config.model.task).score_names(facts)
    known = ["loss", "eval_loss", *(f"eval_{name}" for name in scores)]
    near = nearest(metric, known) or known[-1]
    if config.checkpoint.keep_best and metric not in known:
        raise ConfigError(
            f"checkpoint.metric {metric!r} is not measured by task {config.model.task}; it measures {', '.join(known)}",
            hint=f"set checkpoint.metric, for example -s checkpoint.metric={near}",
        )
    stopping = config.train.early_stopping
    if stopping is not None and stopping.metric not in known[1:]:
        near = nearest(stopping.metric, known[1:]) or known[-1]
        raise ConfigError(
            f"train.early_stopping.metric {stopping.metric!r} is not what an evaluation of task "
            f"{config.model.task} measures: {', '.join(known[1:])}",
            hint=f"set it, for example -s train.early_stopping.metric={near}",
        )
