"""The old form of weights: a raw `state_dict` by torch.save. For export alone; outlast reads no such file.

A checkpoint holds tied weights once, and a strict `load_state_dict` wants each name of them. Which names are one tensor
is the architecture's knowledge, so the model is built once more, without memory, to ask it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.tools.export import CONFIG, Content

WEIGHTS_PYTORCH = "pytorch_model.bin"
CAVEAT = (
    "a state_dict holds neither configuration nor tokenizer: whoever loads it must build the model first, and "
    "torch.load unpickles it (use weights_only=True)"
)


def write_state_dict(content: Content, path: Path) -> None:
    """The weights as a state_dict that loads strictly, tied weights under each of their names but in memory once.

    Raises:
        ConfigError: The model's class is not one of transformers, or its weights are not these.
    """
    model = _empty_model(content.file(CONFIG))
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    state = {}
    for tied in names.values():
        held = next((name for name in tied if name in content.weights), None)
        if held is None:
            raise ConfigError(f"the checkpoint holds no {tied[0]}, which {type(model).__name__} has")
        state.update(dict.fromkeys(tied, content.weights[held]))
    if extra := content.weights.keys() - state.keys():
        raise ConfigError(f"the checkpoint holds {min(extra)}, which {type(model).__name__} has not")
    torch.save(state, path)


def _empty_model(config: bytes) -> torch.nn.Module:
    body = json.loads(config)
    name = (body.get("architectures") or [None])[0]
    kind = getattr(transformers, name, None) if name else None
    if kind is None or body.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"transformers knows no model class {name!r}, so its tied weights cannot be told",
            hint="export without --format pytorch",
        )
    with torch.device("meta"):
        model: torch.nn.Module = kind(transformers.CONFIG_MAPPING[body["model_type"]].from_dict(body))
    return model
