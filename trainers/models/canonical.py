"""The canonical form of a built model: the same memory layout and the same flags, whatever the start was.

`from_pretrained` leaves weights at the addresses that the file gives them, and a resume allocates new memory. On a CPU,
a row times a matrix gives other bits at other addresses, so each tensor is moved to aligned, contiguous memory.
`from_pretrained` also loses `requires_grad=False` of tables that a constructor freezes, such as sinusoidal positions;
and it leaves buffers that no file holds uninitialized, unless the class sets them in `_init_weights`.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import nn

from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.state.named_weights import identity

#: Bytes; the alignment of torch's own allocations on a CPU, and the widest vector registers.
ALIGNMENT = 64


def align_memory(model: nn.Module) -> None:
    """Move each parameter and buffer that is not aligned or not contiguous to memory of its own.

    Tensors that share all their memory still do. Those that overlap in part keep their memory.
    """
    same: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
    for tensor in _tensors(model).values():
        if not tensor.is_meta and tensor.numel():
            same[tensor.data_ptr(), _end(tensor), *tensor.shape, *tensor.stride(), tensor.dtype].append(tensor)
    last_end, previous, overlapping = 0, (), set()
    for key in sorted(same, key=lambda item: item[:2]):
        if key[0] < last_end:
            overlapping |= {previous, key}
        last_end, previous = max(last_end, key[1]), key
    for key in same.keys() - overlapping:
        tensor = same[key][0]
        moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        # `is_contiguous` ignores the strides of dimensions of size 1.
        if tensor.stride() != moved.stride() or tensor.data_ptr() % ALIGNMENT:
            moved.copy_(tensor.detach())
            for tied in same[key]:
                tied.data = moved


def match_constructor(model: nn.Module, reference: nn.Module) -> None:
    """Set what `from_pretrained` loses to what the constructor of the class sets.

    Args:
        model: A model that was loaded.
        reference: A model of the same class that was only constructed. `requires_grad` of each parameter is taken from
            it, and the buffers that no file holds, unless it is on the meta device.
    """
    frozen = {name for name, parameter in reference.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    saved, buffers = model.state_dict(keep_vars=True).keys(), dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved and name in buffers and not buffers[name].is_meta:
            buffer.data = buffers[name].detach().clone()


def untied_pair(model: nn.Module, reference: nn.Module) -> tuple[str, str] | None:
    """Return the names of two parameters that another model of the class ties, and this one does not, if any."""
    mine, tied = _tied_names(model), _tied_names(reference)
    pairs = ((name, other) for name, others in tied.items() if name in mine for other in others)
    return next(((name, other) for name, other in pairs if other not in mine[name]), None)


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return for each parameter the names of all that are tied to it, itself included."""
    same: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[identity(parameter)].append(name)
    return {name: names for names in same.values() for name in names}


def describe_layout(model: nn.Module) -> dict[str, str]:
    """Describe all that may change a model's numbers besides its weights, by name of the tensor or class.

    For each parameter and buffer: type, shape, strides, alignment, whether it is trained, which tensor it shares memory
    with, and the digest of a buffer that no checkpoint holds: `float32, [8, 4], strides (4, 1), trained`. For each
    class of modules of torch or transformers: the values of each plain attribute, such as `p` of `Dropout`. Attributes
    of other classes may hold what differs between two starts: paths, times, names of hosts.
    """
    first: dict[tuple[Any, ...], str] = {}
    saved = model.state_dict(keep_vars=True).keys()
    layout = {}
    for name, tensor in _tensors(model).items():
        place = (tensor.data_ptr(), *tensor.shape, *tensor.stride()) if tensor.numel() else (name,)
        tie = first.setdefault(place, name)
        words = [str(tensor.dtype).removeprefix("torch."), f"{list(tensor.shape)}", f"strides {tensor.stride()}"]
        words.append("trained" if tensor.requires_grad else "not trained")
        words += [f"tied to {tie}"] if tie != name else []
        words += [] if tensor.data_ptr() % ALIGNMENT == 0 else ["not aligned"]
        words += [] if name in saved else [f"not saved, digest {xxhash.xxh3_64_hexdigest(tensor_bytes(tensor))}"]
        layout[name] = ", ".join(words)
    layout["parameters"] = f"in the order {_digest(str([name for name, _ in model.named_parameters()]))}"
    attributes: dict[str, dict[str, Any]] = defaultdict(dict)
    for module_name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.", "transformers.")):
            for name, value in _plain_attributes(module).items():
                attributes[f"{name} of {type(module).__qualname__}"][module_name] = value
    for name, values in attributes.items():
        [value, *others] = set(map(repr, values.values()))
        layout[name] = f"{value if not others else 'not everywhere the same'}, {_digest(str(values))}"
    return layout


def layout_fingerprint(layout: Mapping[str, str]) -> str:
    """Return the digest of each line of `describe_layout`, 16 hexadecimal digits."""
    return "".join(_digest(f"{name} {text}") for name, text in layout.items())


def layout_differences(layout: Mapping[str, str], fingerprint: str) -> list[str]:
    """Return the lines of a layout that a fingerprint lacks, and how many lines more the fingerprint has."""
    before = {fingerprint[start : start + 16] for start in range(0, len(fingerprint), 16)}
    changed = [f"{name} is {text}" for name, text in layout.items() if _digest(f"{name} {text}") not in before]
    num_gone = len(before) - len(layout)
    return changed + ([f"{num_gone} tensors or attributes are gone"] if num_gone > 0 else [])


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _end(tensor: torch.Tensor) -> int:
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and not name.startswith("_") and name not in ("training", "name_or_path")
    }
