"""Names of weights in files, where they differ from the names in the model.

transformers holds some architectures in another form than their files: `lm_head` for GPT-NeoX's `embed_out`, all
experts of a Mixtral layer in one tensor. It converts on loading, and back on saving. outlast writes slices of the
model's own memory, so this module runs the conversion once on element numbers and accepts renamings and slices only;
any other conversion is refused. Of tied weights it chooses the name that `save_pretrained` keeps; and weights that
`save_pretrained` leaves out are left out where the constructor computes the same bits.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import ALL, WeightNaming, identity, named_weights
from outlast.checkpointing.state.shards import Cut
from outlast.trainers.models.transformers_internals import initialize_weights, revert_weight_conversion

_CONVERSION_ERRORS = (ValueError, KeyError, AttributeError, RuntimeError, IndexError)


def file_naming(model: Any) -> WeightNaming:
    """Return the names of a transformers model's weights in its files: those that `save_pretrained` gives them.

    Raises:
        ConfigError: The files hold weights in a form that is not a slice of the model's tensors.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return ALL
    model.__dict__.pop("_weight_conversions", None)  # from the pretrained file, which may be of another form
    all_names, extra = named_weights(model), names_not_saved(model)
    first = all_names.keys()  # the name of a tied weight that outlast 0.1.0 chose
    tied = _without_tied(model)
    recomputed = {name for name in extra if _is_recomputed(model, name)}
    choices = dict.fromkeys(frozenset(names) for names in (tied - recomputed, tied, tied - extra, first))
    tensors = model.state_dict(keep_vars=True)
    cuts: dict[str, Mapping[str, Cut]] = {}
    if _is_converted(model, all_names):
        cuts = {name: _cuts(model, name, tensors[name].detach()) for name in sorted(frozenset().union(*choices))}
    naming, *others = [_naming(model, names, names == first, cuts) for names in choices]
    return replace(naming, older=tuple(others)) if others else naming


def names_not_saved(model: Any) -> set[str]:
    """Return the weights that `save_pretrained` leaves out, such as Marian's sinusoidal positions."""
    names: set[str] = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return names & set(model.state_dict())


def initialize_not_saved(model: Any) -> None:
    """Initialize the weights that no file holds, of a model that was built without initialization."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name in sorted(names_not_saved(model)):
            initialize_weights(model, model.get_submodule(name.rpartition(".")[0]))


def _is_converted(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    try:
        return revert_weight_conversion(model, weights) is not weights
    except _CONVERSION_ERRORS as error:
        raise _refusal(model, "weights") from error


def _naming(model: Any, names: frozenset[str], is_all: bool, cuts: Mapping[str, Mapping[str, Cut]]) -> WeightNaming:
    file_names = [item for name in sorted(names) for item in cuts.get(name, (name,))]
    if len(set(file_names)) != len(file_names):
        raise _refusal(model, min(item for item in file_names if file_names.count(item) > 1))
    changed = {name: parts for name, parts in cuts.items() if name in names and parts != {name: ()}}
    if is_all:
        return WeightNaming(cuts=changed) if changed else ALL
    return WeightNaming(names={name: name for name in sorted(names)}, cuts=changed)


def _without_tied(model: Any) -> set[str]:
    """Return the names of all weights, tied ones by the name that `save_pretrained` keeps."""
    patterns = [
        f"{name}.{pattern}" if name else pattern
        for name, module in model.named_modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(identity(tensor), []).append(name)
    kept = set()
    for names in groups.values():
        others = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
        kept.add(others[0] if others else max(names))  # where all match, it keeps the last in alphabetical order
    return kept


def _is_recomputed(model: Any, name: str) -> bool:
    """Return whether a weight is not trained, and the constructor of the model gives it the value that it has."""
    module_name, _, own_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor = getattr(module, own_name)
    if tensor.requires_grad or tensor.is_meta:
        return not tensor.requires_grad
    again = deepcopy(module)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        initialize_weights(model, again)
    return torch.equal(getattr(again, own_name), tensor)


def _cuts(model: Any, name: str, tensor: torch.Tensor) -> dict[str, Cut]:
    """Return the weights in the file that one weight is cut into, by name."""
    try:
        if revert_weight_conversion(model, {name: tensor}).get(name) is tensor:
            return {name: ()}  # most weights; the numbers of a large one would take its memory twice over
        numbers = torch.arange(tensor.numel()).view(tensor.shape)
        parts = revert_weight_conversion(model, {name: numbers})
    except _CONVERSION_ERRORS as error:
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
