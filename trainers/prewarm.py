"""Prewarming of a standby process: the lazy imports and set-up of an attempt, done while other processes train.

Libraries import most of their code at first use: transformers when a class is looked up, torch when an optimizer is
constructed. Nothing here may change what is computed.
"""

import torch
import torch.nn.parallel
import transformers

from outlast.trainers.models.build import model_class
from outlast.trainers.models.transformers_internals import get_checkpoint_conversion_mapping, model_mapping
from outlast.trainers.tasks.base import find_task


def prewarm(task: str, model_type: str | None) -> None:
    """Import what a run of this task needs for a model type of transformers; other types are ignored."""
    for name in ("AutoTokenizer", "PreTrainedTokenizerFast", "AutoConfig"):
        getattr(transformers, name)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    task_class = find_task(task)
    if model_type in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(model_type)
        builder = model_class(task_class, config)
        if (mapping := model_mapping(builder)) is not None:
            mapping[type(config)]
    get_checkpoint_conversion_mapping(model_type)
