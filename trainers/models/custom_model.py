"""Model classes that the user brings: `model.class: package.module:Class`.

A class like those of transformers (it has a `config_class`) is built from its configuration, or loaded by its own
`from_pretrained`. Any other `nn.Module` is called with the settings under `model.config` as keyword arguments, and
`config.json` holds just these: `Class(**json.load(open("config.json")))` builds it again. Either is called as the task
calls a model of transformers, and answers with something that has `.logits`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import WEIGHTS
from outlast.checkpointing.format.safetensors import TensorSpec
from outlast.checkpointing.state.model_weights import check_weights, named_weights
from outlast.checkpointing.tools.export import CONFIG
from outlast.trainers.user_code import describe_error, import_object


def load_class(place: str) -> Any:
    """The class that `package.module:Class` names.

    Raises:
        ConfigError: It cannot be found, or it is no model.
    """
    found = import_object(place, "model.class")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"model.class {place!r} is not a torch.nn.Module", hint="derive the class from it")
    return found


def is_like_transformers(model_class: Any) -> bool:
    """Whether it has a configuration class and loads itself."""
    return getattr(model_class, "config_class", None) is not None and hasattr(model_class, "from_pretrained")


def build_plain(
    model_class: Any, given: Mapping[str, Any], special: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, bytes]]:
    """A module that knows nothing of transformers, and the `config.json` that builds it again.

    Args:
        model_class: The class.
        given: What the user set, as keyword arguments.
        special: Vocabulary size and special tokens; those that are parameters of the class are passed.

    Raises:
        ConfigError: The class wants other arguments.
    """
    wanted = inspect.signature(model_class).parameters
    arguments = {**{key: value for key, value in special.items() if key in wanted}, **given}
    try:
        model = model_class(**arguments)
    except Exception as error:
        raise ConfigError(
            f"{model_class.__name__} cannot be built: {describe_error(error)}", hint="check model.config"
        ) from error
    return model, {"config.json": json.dumps(arguments, indent=2, sort_keys=True).encode() + b"\n"}


def load_plain(model_class: Any, folder: Path) -> nn.Module:
    """The module that a directory holds, built again as its `config.json` says.

    Raises:
        ConfigError: The class wants other arguments, or has other weights than it had.
    """
    model, _ = build_plain(model_class, json.loads((folder / CONFIG).read_bytes()), {})
    found = load_file(folder / WEIGHTS)
    check_weights(model, {name: TensorSpec.of(tensor) for name, tensor in found.items()})
    with torch.no_grad():
        for name, tensor in named_weights(model).items():
            tensor.copy_(found[name])
    return model
