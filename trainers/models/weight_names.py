"""Names of weights in files, where they differ from the names in the model.

transformers holds some architectures in another form than their files: `lm_head` for GPT-NeoX's `embed_out`, all
experts of a Mixtral layer in one tensor. It converts on loading, and back on saving. outlast writes slices of the
model's own memory, so this module runs the conversion once on element numbers and accepts renamings and slices only;
any other conversion is refused.
"""

from typing import Any

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import ALL, Cut, WeightNaming, named_weights
from outlast.trainers.models.transformers_internals import revert_weight_conversion


def file_naming(model: Any) -> WeightNaming:
    """Return the names of a transformers model's weights in its files.

    Raises:
        ConfigError: The files hold weights in a form that is not a slice of the model's tensors.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return ALL
    model.__dict__.pop("_weight_conversions", None)  # from the pretrained file, which may be of another form
    own = named_weights(model)
    if revert_weight_conversion(model, own) is own:
        return ALL
    cuts = {name: _cuts(model, name, tensor) for name, tensor in own.items()}
    file_names = [item for parts in cuts.values() for item in parts]
    if len(set(file_names)) != len(file_names):
        raise _refusal(model, next(item for item in file_names if file_names.count(item) > 1))
    changed = {name: parts for name, parts in cuts.items() if parts != {name: ()}}
    return WeightNaming(cuts=changed) if changed else ALL


def _cuts(model: Any, name: str, tensor: torch.Tensor) -> dict[str, Cut]:
    """Return the weights in the file that one weight is cut into, by name."""
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    try:
        parts = revert_weight_conversion(model, {name: numbers})
    except (ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise _refusal(model, name) from error
    cuts = {file_name: _cut(numbers, part) for file_name, part in parts.items()}
    if None in cuts.values() or sum(part.numel() for part in parts.values()) != tensor.numel():
        raise _refusal(model, name)
    return {file_name: cut for file_name, cut in cuts.items() if cut is not None}


def _cut(numbers: torch.Tensor, part: torch.Tensor) -> Cut | None:
    """Return the slice of `numbers` (0, 1, 2, … in its shape) that equals `part`; None if there is none."""
    if numbers.shape == part.shape and torch.equal(numbers, part):
        return ()
    if not part.numel():
        return None
    first, last = (torch.unravel_index(part.flatten()[place], numbers.shape) for place in (0, -1))
    ranges = [slice(int(begin), int(end) + 1) for begin, end in zip(first, last, strict=True)]
    # A dimension of which one index is taken may be absent in the file.
    num_absent = numbers.ndim - part.ndim
    cut: list[int | slice] = []
    for span in ranges:
        is_single = num_absent > 0 and span.stop - span.start == 1
        cut.append(span.start if is_single else span)
        num_absent -= is_single
    taken = numbers[tuple(cut)]
    return tuple(cut) if taken.shape == part.shape and torch.equal(taken, part) else None


def _refusal(model: Any, name: str) -> ConfigError:
    return ConfigError(
        f"files of {type(model).__name__} hold {name} in a form that is not a slice of the model's weights; "
        "outlast cannot write such checkpoints",
        hint="train another architecture, or use a class of your own: model.class",
    )
