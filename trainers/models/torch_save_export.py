"""Export of weights as a `state_dict` written by torch.save. outlast never reads such a file: it is a pickle.

A checkpoint holds tied weights once, but a strict `load_state_dict` needs all of their names. Only the architecture
determines which names share a tensor, so the model is built on the meta device to find out.
"""

import json
from pathlib import Path

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.tools.export import CONFIG, Content

WEIGHTS_PYTORCH = "pytorch_model.bin"
CAVEAT = (
    "a state_dict holds neither configuration nor tokenizer: build the model before loading it, and use "
    "torch.load(…, weights_only=True), because the file is a pickle"
)


def write_state_dict(content: Content, path: Path) -> None:
    """Write the weights as a state_dict that loads strictly: tied weights under all their names, stored once.

    Raises:
        ConfigError: The model's class is not one of transformers, or has other weights.
    """
    model = _empty_model(content.file(CONFIG))
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    state = {}
    for tied in names.values():
        held = next((name for name in tied if name in content.weights), None)
        if held is None:
            raise ConfigError(f"the checkpoint has no {tied[0]}, which {type(model).__name__} needs")
        state.update(dict.fromkeys(tied, content.weights[held]))
    if extra := content.weights.keys() - state.keys():
        raise ConfigError(f"the checkpoint has {min(extra)}, which {type(model).__name__} does not have")
    torch.save(state, path)


def _empty_model(config: bytes) -> torch.nn.Module:
    body = json.loads(config)
    name = (body.get("architectures") or [None])[0]
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None or body.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"model class {name!r} is not one of transformers, so its tied weights are unknown",
            hint="export without --format pytorch",
        )
    with torch.device("meta"):
        model: torch.nn.Module = model_class(transformers.CONFIG_MAPPING[body["model_type"]].from_dict(body))
    return model
