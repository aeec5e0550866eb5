"""Directories of adapters in peft's layout as `model.path`: they stand for their base model and `model.lora.path`."""

import json
from pathlib import Path

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.model import LoraSettings, ModelSettings

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter_directory(path: str | None) -> bool:
    """Check whether a `model.path` is the directory of an adapter."""
    return bool(path) and (Path(str(path)) / ADAPTER_CONFIG).is_file()


def base_of(path: str) -> str:
    """Return the base model that an adapter's configuration names.

    Raises:
        ConfigError: It names none, or a directory that does not exist.
    """
    try:
        base = json.loads((Path(path) / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}/{ADAPTER_CONFIG} cannot be read: {error}", hint="restore the file") from error
    hint = (
        "set model.path to the base model and model.lora.path to the adapter; or make one model of both: "
        "outlast checkpoints export RUN best DIR --merge --base BASE"
    )
    if not isinstance(base, str) or not base:
        raise ConfigError(f"the adapter {path} names no base model", hint=hint)
    if base.startswith(("/", ".", "~")) and not Path(base).is_dir():
        raise ConfigError(f"the base model {base} of the adapter {path} does not exist", hint=hint)
    return base


def with_base(settings: ModelSettings) -> ModelSettings:
    """Return the settings with base model and adapter, where `model.path` is an adapter; else the same.

    Raises:
        ConfigError: The base model does not exist, or `model.lora` has settings too.
    """
    path = settings.path
    if path is None or not is_adapter_directory(path):
        return settings
    if settings.lora is not None:
        raise ConfigError(
            f"model.path {path} is an adapter, which has its own settings",
            hint="leave model.lora out, or set model.path to the base model and model.lora.path to the adapter",
        )
    if settings.trust_remote_code:
        raise ConfigError(
            f"model.path {path} is an adapter, and model.trust_remote_code would run code of the model that it names",
            hint=f"set model.path to that model, and model.lora.path to {path}",
        )
    return settings.model_copy(update={"path": base_of(path), "lora": LoraSettings(path=path)})
