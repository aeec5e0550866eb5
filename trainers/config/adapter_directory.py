"""Directories of adapters in peft's layout as `model.path`: they stand for their base model and `model.lora.path`."""

import json
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.trainers.config.model import LoraSettings, ModelSettings, is_model_path

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter_directory(path: str | None) -> bool:
    """Check whether a `model.path` is the directory of an adapter."""
    return bool(path) and (Path(str(path)) / ADAPTER_CONFIG).is_file()


def base_of(path: str) -> str:
    """Return the base model that an adapter's configuration names.

    Raises:
        ConfigError: It is damaged, or names none, or a directory that does not exist.
    """
    base = _parse(path).get("base_model_name_or_path")
    hint = (
        "set model.path to the base model and model.lora.path to the adapter; or make one model of both: "
        "outlast checkpoints export RUN best DIR --merge --base BASE"
    )
    if not isinstance(base, str) or not base:
        raise ConfigError(f"the adapter {path} names no base model", hint=hint)
    if is_model_path(base) and not Path(base).is_dir():
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


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """Read the `adapter_config.json` of a directory.

    Raises ConfigError if it is damaged, of another type than LORA, or names a module that peft would import.
    """
    config = _parse(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise ConfigError(f"the adapter {path} is of type {kind!r}; only LORA is supported", hint="use a LoRA adapter")
    if config.get("megatron_config"):
        raise ConfigError(
            f"the adapter {path} has megatron_config, by which peft imports the module {config.get('megatron_core')!r}",
            hint="remove megatron_config and megatron_core from its adapter_config.json",
        )
    return config


def _parse(path: str | Path) -> dict[str, Any]:
    file = Path(path) / ADAPTER_CONFIG
    try:
        config = json.loads(read_small_file(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", hint="restore the file") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a JSON object", hint="restore the file")
    return config
