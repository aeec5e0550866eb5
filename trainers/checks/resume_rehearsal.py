"""A resume, played with a model of the user: it must compute what the model computes that was used before.

A checkpoint holds weights and persistent buffers. So what else a model or task keeps, such as an attribute that its
first forward pass or its own `from_pretrained` sets, is lost.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.save.staging import free_bytes
from outlast.checkpointing.state.named_weights import named_weights
from outlast.trainers.checks.dry_step_part import max_tokens, size
from outlast.trainers.distributed.determinism import make_deterministic
from outlast.trainers.models.build import weight_naming
from outlast.trainers.tasks.base import Batch, Task

#: Bytes for each parameter: two models, each with a copy and a gradient, and what building takes for a moment.
_WEIGHT_BYTES = 32


def is_affordable(model: nn.Module, task: Task, batch: Batch) -> bool:
    """Return whether there is time for twice the passes of a dry step, and memory for a second model."""
    num_samples, width = size(batch, 1)
    has_time = 2 * num_samples * width <= max_tokens(model, task, width)
    return has_time and _WEIGHT_BYTES * sum(item.numel() for item in model.parameters()) <= free_bytes() // 2


def prepare_resume(used: nn.Module, again: nn.Module) -> None:
    """Change the weights of a used model a little, as an update does, and give them to one that was built again.

    Raises ConfigError if they have other weights.
    """
    with torch.no_grad():
        for parameter in used.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 2**-6).add_(2**-10)
        saved, weights = (named_weights(model, weight_naming(model)) for model in (used, again))
        for name in saved.keys() ^ weights.keys():
            raise _refusal(used, name)
        for name, tensor in weights.items():
            tensor.copy_(saved[name])


def check_resume(
    used: nn.Module, passes: tuple[Callable[[], Mapping[str, str]], Callable[[], Mapping[str, str]]]
) -> None:
    """Raise ConfigError if a pass of the used model and one of the model built again have different digests."""
    with _one_thread():
        first, second = (run() for run in passes)
    for name in {**first, **second}:
        if first.get(name) != second.get(name):
            raise _refusal(used, name)


def _refusal(model: nn.Module, name: str) -> ConfigError:
    return ConfigError(
        f"a resumed run would differ in {name}: {type(model).__name__}, or its task, keeps something besides weights "
        "and persistent buffers, such as an attribute that its first forward pass or its from_pretrained sets",
        hint="set it in the constructor, and in a persistent buffer if it changes; exactness: fast promises no bits",
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: with several, a library may add in another order each time."""
    was_deterministic, num_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    try:
        make_deterministic(True, 1)
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(was_deterministic)
