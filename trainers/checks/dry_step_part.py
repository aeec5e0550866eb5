"""The part of a micro-batch that a dry step runs: all of it, or as much as the limits of time and memory allow.

All of this is an estimate from shapes. Nothing here may run the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.save.staging import free_bytes
from outlast.trainers.tasks.base import Batch, Task, TokenTask
from outlast.trainers.tasks.model_inputs import base_model

#: Floating-point operations that a dry step may take: about half a minute on two cores.
MAX_OPERATIONS = 1e12
#: Operations for each parameter and token: one pass forward, and two forward and backward.
_OPERATIONS = 2 + 2 * 6
#: Bytes for each parameter: the weight and its gradient, each twice for a moment; and a copy of the weight.
_WEIGHT_BYTES = 20
#: Texts are not made shorter than this number of tokens.
_SHORTEST = 16


def max_tokens(model: nn.Module, task: Task, width: int) -> int:
    """Return the number of tokens that a dry step may have, in texts of `width` tokens; 0 or less if not even one.

    It may take half of the free memory.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    by_time = int(MAX_OPERATIONS / (_OPERATIONS * max(1, num_parameters)))
    left = free_bytes() // 2 - _WEIGHT_BYTES * num_parameters
    return min(by_time, left // activation_bytes(model, task, width))


def activation_bytes(model: nn.Module, task: Task, width: int) -> int:
    """Estimate the memory for the activations of a token, in texts of `width` tokens, in float32.

    That is what each layer reads and returns; the scores, weights and masks of eager attention; and four of the largest
    tensor, which often is the logits: as they are, as log-probabilities, and the gradients of both.
    """
    has_logits_of_words = "LM" in task.auto_class
    layers, widest = 0, 1
    for module in model.modules():
        is_table = isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False):
            layers += sum(weight.shape[-1:] if is_table else weight.shape[-2:])
            if has_logits_of_words or not is_table:
                widest = max((widest, *weight.shape[-2:]))
    config: Any = getattr(base_model(model), "config", None)
    counts = [getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers")]
    heads, depth = (count if isinstance(count, int) else 0 for count in counts)
    return 4 * (layers + 4 * widest + 4 * heads * depth * width)


def parts(num_samples: int, width: int, limit: int) -> list[tuple[int, int]]:
    """Return which parts of a micro-batch to try, best first: numbers of samples, and of tokens in each.

    Texts are shortened before samples are left out, because a loss may compare samples, and a norm needs several. Some
    tasks cannot do with shorter texts, hence the second part: fewer samples.

    Args:
        num_samples: Samples of the micro-batch.
        width: Tokens of each, with padding.
        limit: Tokens that a part may have.
    """
    if num_samples * width <= limit:
        return [(num_samples, width)]
    short = min(width, max(_SHORTEST, limit // max(1, num_samples)))
    found = [(min(num_samples, limit // short), short), (min(num_samples, limit // width), width)]
    return list(dict.fromkeys(part for part in found if part[0] > 0))


def size(batch: Batch, longest: int) -> tuple[int, int]:
    """Return the number of samples of a batch, and of tokens in each, those of several texts together."""
    num_samples = len(next(iter(batch.values())))
    texts = {tuple(batch[name].shape) for name in ("input_ids", "labels") if name in batch and batch[name].ndim > 1}
    width = sum(torch.Size(shape).numel() for shape in texts) // max(1, num_samples)
    return num_samples, width or longest


def cut(batches: Sequence[Batch], task: Task, num_samples: int, share: float) -> list[Batch]:
    """Return the first samples of each batch, and the first `share` of the tokens of each text, right padding cut."""

    def cut_one(batch: Batch) -> Batch:
        ids = batch.get("input_ids")
        shape = None if ids is None else ids.shape
        found = {}
        for name, value in batch.items():
            is_text = value.shape == shape or (name == "labels" and isinstance(task, TokenTask))
            width = max(1, round(share * value.shape[-1])) if value.ndim > 1 and is_text else None
            found[name] = value[:num_samples, ..., :width] if width else value[:num_samples]
        return found

    return [cut_one(batch) for batch in batches]
