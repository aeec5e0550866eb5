"""What an attempt imports and sets up late, done early: in a process that waits, while others train.

Libraries import most of themselves at their first use: transformers when it is asked for a class, torch when it makes
an optimizer. Nothing here may change what is computed.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch._dynamo
import torch.nn.parallel
import transformers

from outlast.trainers.models.build import model_class
from outlast.trainers.tasks.registry import find_task


def prewarm(task: str, model_type: str | None) -> None:
    """Imports what a run of this task needs for a model of this type, if the type is one of transformers'."""
    for name in ("AutoTokenizer", "PreTrainedTokenizerFast", "AutoConfig"):
        getattr(transformers, name)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    kind = find_task(task)
    if model_type in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(model_type)
        builder = model_class(kind, config)
        if hasattr(builder, "_model_mapping"):
            builder._model_mapping[type(config)]
    with suppress(ImportError):  # releases of transformers whose files hold what the model holds
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping(model_type)
