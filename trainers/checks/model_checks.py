"""Checks of a run's model before any worker is started: the model is built once on the meta device.

So a wrong name, an invalid setting or an adapter without target modules is one error within seconds. Nothing here may
allocate the model's memory or read its weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.error_hints import nearest
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.base import Storage
from outlast.trainers.config.adapter_directory import with_base
from outlast.trainers.config.model import is_hub_id
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.tokenizer import Tokenizer, load_tokenizer
from outlast.trainers.loop.compile_and_recompute import check_recomputes
from outlast.trainers.loop.optimizer import resolve_optimizer
from outlast.trainers.models.build import build_model, check_head, check_names, weight_naming
from outlast.trainers.models.lora import adapter_files, attach_lora
from outlast.trainers.models.tensor_checks import check_dtypes
from outlast.trainers.models.transformers_internals import model_mapping
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import Task, find_task

#: Names of the embedding of absolute positions in architectures of transformers.
_POSITIONS = ("wpe", "position_embedding", "position_embeddings", "embed_positions", "positions_embed", "pos_embed")


def check_code(config: TrainingConfig) -> None:
    """Check that everything that the settings name exists, except data.

    Raises:
        ConfigError: A class, task, architecture or optimizer does not exist, or has no such setting.
    """
    find_task(config.model.task)
    check_names(config.model)
    resolve_optimizer(config.train)


def check_architecture(config: TrainingConfig) -> None:
    """Check the model's configuration and the tokenizer of a directory. A hub id is not checked: no network access.

    Raises:
        ConfigError: The model does not exist, or its architecture does not support the task.
    """
    given, own = config.model.path or "", check_names(config.model)
    if is_hub_id(given):
        return
    settings = with_base(config.model)
    if given:
        load_tokenizer(settings.tokenizer.path if settings.tokenizer and settings.tokenizer.path else given)
    if own is None:
        check_head(settings, find_task(settings.task))


def check_model(config: TrainingConfig, prepared: Prepared, storage: Storage) -> tuple[nn.Module, dict[str, bytes]]:
    """Build the model as the workers will, but without weights. Returns it, and the small files of its checkpoints.

    Raises:
        ConfigError: The model cannot be built, adapted or trained with these settings.
    """
    tokenizer = prepared.tokenizer(storage)
    task = find_task(config.model.task)(config.data, tokenizer, prepared.facts)
    own, longest = check_names(config.model), max(prepared.longest.values(), default=0)
    try:
        with torch.device("meta"):
            model, files = _build(config, task, tokenizer, longest)
    except Exception:
        if own is None or issubclass(own, transformers.PreTrainedModel):
            raise  # all models of transformers can be built on the meta device
        model, files = _build(config, task, tokenizer, longest)
    check_dtypes(model, weight_naming(model))  # the latter refuses an architecture whose files outlast cannot write
    if own is None:
        _check_reloads(model, task)
    return model, files


def _check_reloads(model: nn.Module, task: Task) -> None:
    """Raise ConfigError if the task's Auto class builds a part of a composite model, and cannot load that part."""
    config: Any = getattr(model, "config", None)
    types = model_mapping(getattr(transformers, task.auto_class, None))
    if types and type(config).__module__.startswith("transformers.") and type(config) not in types:
        raise ConfigError(
            f"{type(model).__name__} is of type {config.model_type}, which no {task.auto_class} loads: what the run "
            "publishes could not be loaded",
            hint="use another architecture, or a class of your own: model.class",
        )


def _build(
    config: TrainingConfig, task: Task, tokenizer: Tokenizer, longest: int
) -> tuple[nn.Module, dict[str, bytes]]:
    settings = with_base(config.model)
    bare = settings.model_copy(update={"lora": None})  # with an adapter, it would read the base model's weights
    model, files = build_model(bare, task, tokenizer, config.seed, fresh=False)
    _check_positions(model, longest)
    if settings.lora is not None:
        model = attach_lora(model, settings.lora, task.auto_class, fresh=False)
        files |= adapter_files(model)
    check_recomputes(model, config.train)
    return model, files


def _check_positions(model: nn.Module, longest: int) -> None:
    """Raise ConfigError if a sample has more tokens than a transformers model has positions."""
    if not isinstance(model, transformers.PreTrainedModel):
        return
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            first = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
            limit = table.num_embeddings - first
            declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if isinstance(declared, int):  # Nystromformer's table has two rows more, which no padding index shows
                limit = min(limit, declared)
            if longest > limit:
                raise ConfigError(
                    f"the longest sample has {longest} tokens, but {type(model).__name__} has only {limit} positions "
                    f"({name})",
                    hint=f"-s data.max_length={limit}, or use a model with more positions",
                )


def check_metric(config: TrainingConfig, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError if checkpoints or early stopping use a metric that the task does not measure."""
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
            f"train.early_stopping.metric {stopping.metric!r} is not measured by task {config.model.task}; it measures "
            f"{', '.join(known[1:])}",
            hint=f"set it, for example -s train.early_stopping.metric={near}",
        )
