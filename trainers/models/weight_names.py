"""Which name a weight has in a file, where that is not the name that the model itself uses.

transformers holds some architectures in another form than their files: `lm_head` for GPT-NeoX's `embed_out`, all
experts of a Mixtral layer in one tensor. It converts while it loads, and back while it saves. outlast writes parts of
the model's own memory, so it asks what becomes of each element, once, and takes what are renamings and cuts; anything
else is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.model_weights import ALL, Cut, WeightNaming, named_weights


def file_naming(model: Any) -> WeightNaming:
    """What the weights of a model of transformers are called in its files.

    Raises:
        ConfigError: The files hold them in another form than parts of the model's tensors.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return ALL
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4: files hold what the model holds
        return ALL
    model.__dict__.pop("_weight_conversions", None)  # how a pretrained file was read; ours are all written one way
    own = named_weights(model)
    if revert_weight_conversion(model, own) is own:
        return ALL
    cuts = {name: _cuts(model, name, tensor, revert_weight_conversion) for name, tensor in own.items()}
    called = [item for parts in cuts.values() for item in parts]
    if len(set(called)) != len(called):
        raise _refusal(model, next(item for item in called if called.count(item) > 1))
    changed = {name: parts for name, parts in cuts.items() if parts != {name: ()}}
    return WeightNaming(cuts=changed) if changed else ALL


def _cuts(model: Any, name: str, tensor: torch.Tensor, revert: Any) -> dict[str, Cut]:
    """Where in the file the elements of one weight go."""
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    try:
        parts = revert(model, {name: numbers})
    except (ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise _refusal(model, name) from error
    found = {called: _cut(numbers, part) for called, part in parts.items()}
    if None in found.values() or sum(part.numel() for part in parts.values()) != tensor.numel():
        raise _refusal(model, name)
    return {called: cut for called, cut in found.items() if cut is not None}


def _cut(numbers: torch.Tensor, part: torch.Tensor) -> Cut | None:
    """The cut of `numbers` (0, 1, 2, … in its shape) that `part` is; None if it is none."""
    if numbers.shape == part.shape and torch.equal(numbers, part):
        return ()
    if not part.numel():
        return None
    first, last = (torch.unravel_index(part.flatten()[place], numbers.shape) for place in (0, -1))
    ranges = [slice(int(begin), int(end) + 1) for begin, end in zip(first, last, strict=True)]
    # A dimension that became one index may be gone in the file.
    gone = numbers.ndim - part.ndim
    cut: list[int | slice] = []
    for here in ranges:
        single = gone > 0 and here.stop - here.start == 1
        cut.append(here.start if single else here)
        gone -= single
    taken = numbers[tuple(cut)]
    return tuple(cut) if taken.shape == part.shape and torch.equal(taken, part) else None


def _refusal(model: Any, name: str) -> ConfigError:
    return ConfigError(
        f"the files of {type(model).__name__} hold {name} in another form than the model does; "
        "outlast cannot write such checkpoints",
        hint="train another architecture, or bring a class of your own: model.class",
    )
