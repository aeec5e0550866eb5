"""An adapter and the model beneath it, made one: what `checkpoints export --merge` writes. peft does the adding."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.export import ADAPTER_WEIGHTS, Content, write_safetensors
from outlast.checkpointing.layout import WEIGHTS
from outlast.checkpointing.weights import named_weights
from outlast.trainers.adapters import CONFIG, base_digest, need_peft
from outlast.trainers.custom import load_class
from outlast.trainers.models import model_class
from outlast.trainers.naming import file_naming
from outlast.trainers.registry import find_task


def merge(content: Content, declaration: Mapping[str, Any] | None, base: str | None = None) -> Content:
    """The whole model of an adapter's checkpoint, as plain Hugging Face files.

    Args:
        content: The checkpoint.
        declaration: What the run declared: its task, and the digest of the model beneath.
        base: Where the model beneath lies; by default where it lay in training.

    Raises:
        ConfigError: It is no adapter's checkpoint, or the model beneath is not there or is another one.
    """
    if content.weights_name != ADAPTER_WEIGHTS or declaration is None:
        raise ConfigError("--merge is for checkpoints of adapters, and this is not one", hint="leave --merge out")
    peft, settings = need_peft(), declaration["mathematics"]["model"]
    place = base or json.loads(content.file(CONFIG))["base_model_name_or_path"]
    with tempfile.TemporaryDirectory() as folder:
        for name, data in content.files.items():
            (Path(folder) / name).write_bytes(data)
        write_safetensors(content, Path(folder) / ADAPTER_WEIGHTS)
        model = _load_base(settings, place, folder)
        adapted = peft.PeftModel.from_pretrained(model, folder)
    if base_digest(adapted) != declaration["base"]:
        raise ConfigError(
            f"{place} does not hold the weights that the adapter was trained on", hint="name the right one with --base"
        )
    whole = adapted.merge_and_unload()
    weights = {name: tensor.contiguous() for name, tensor in named_weights(whole, file_naming(whole)).items()}
    files = {name: data for name, data in content.files.items() if name != CONFIG}
    return replace(content, weights=weights, files=files, weights_name=WEIGHTS)


def _load_base(settings: Mapping[str, Any], place: str, folder: str) -> Any:
    """The model beneath, with the configuration of the checkpoint in `folder`: its head has the run's classes."""
    own = load_class(settings["class_"]) if settings.get("class_") else None
    try:
        config = (own.config_class if own else transformers.AutoConfig).from_pretrained(folder)
        builder = own or model_class(find_task(settings["task"]), config)
        return builder.from_pretrained(place, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError(
            f"the model beneath the adapter cannot be loaded from {place!r}: {said}",
            hint="name its directory or hub id with --base",
        ) from error
