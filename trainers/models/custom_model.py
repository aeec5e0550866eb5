"""The user's model classes: `model.class: package.module:Class`.

A class like those of transformers (it has a `config_class`) is built from its configuration, or loaded by its own
`from_pretrained`. Any other `nn.Module` is called with the settings under `model.config` as keyword arguments, and
`config.json` holds exactly these: `Class(**json.load(open("config.json")))` rebuilds it. The forward of either takes
the arguments of a transformers model and returns an object with `.logits`.
"""

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
from outlast.checkpointing.state.named_weights import check_weights, named_weights
from outlast.checkpointing.tools.export import CONFIG
from outlast.trainers.user_code import describe_error, import_object


def load_class(path: str) -> Any:
    """Import the class at `package.module:Class`.

    Raises:
        ConfigError: The class cannot be imported, or is not a torch.nn.Module.
    """
    model_class = import_object(path, "model.class")
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise ConfigError(f"model.class {path!r} is not a torch.nn.Module", hint="derive the class from it")
    return model_class


def is_like_transformers(model_class: Any) -> bool:
    """Check whether a class has a configuration class and a `from_pretrained`."""
    return getattr(model_class, "config_class", None) is not None and hasattr(model_class, "from_pretrained")


def build_plain(
    model_class: Any, given: Mapping[str, Any], special: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, bytes]]:
    """Build a plain `nn.Module`. Returns it, and the `config.json` that rebuilds it.

    Args:
        model_class: The class.
        given: The settings under `model.config`, passed as keyword arguments.
        special: Vocabulary size and special tokens; those that are parameters of the class are passed.

    Raises:
        ConfigError: The constructor failed, such as for wrong arguments.
    """
    parameters = inspect.signature(model_class).parameters
    arguments = {**{key: value for key, value in special.items() if key in parameters}, **given}
    try:
        model = model_class(**arguments)
    except Exception as error:
        raise ConfigError(
            f"{model_class.__name__} cannot be built: {describe_error(error)}", hint="check model.config"
        ) from error
    return model, {"config.json": json.dumps(arguments, indent=2, sort_keys=True).encode() + b"\n"}


def load_plain(model_class: Any, folder: Path) -> nn.Module:
    """Load the plain `nn.Module` of a directory: built from its `config.json`, with its weights.

    Raises:
        ConfigError: The constructor failed, or the class has other weights than the file.
    """
    model, _ = build_plain(model_class, json.loads((folder / CONFIG).read_bytes()), {})
    weights = load_file(folder / WEIGHTS)
    check_weights(model, {name: TensorSpec.of(tensor) for name, tensor in weights.items()})
    with torch.no_grad():
        for name, tensor in named_weights(model).items():
            tensor.copy_(weights[name])
    return model
