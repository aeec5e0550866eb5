"""Adapters loaded with their base model, or merged into it, by peft. The base model must match the run's digest."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import WEIGHTS
from outlast.checkpointing.state.named_weights import named_weights
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS, Content, export_directory
from outlast.trainers.config.adapter_directory import ADAPTER_CONFIG, read_adapter_config
from outlast.trainers.config.trust import NO_TRUST, Trust
from outlast.trainers.models.build import load_saved
from outlast.trainers.models.lora import base_digest, need_peft
from outlast.trainers.models.weight_names import file_naming
from outlast.trainers.tasks.base import find_task


def load_adapted(folder: Path, declaration: Mapping[str, Any], base: str | None = None, trust: Trust = NO_TRUST) -> Any:
    """Load the peft model of an adapter's checkpoint; the base model's digest is verified.

    Args:
        folder: Directory of the checkpoint's files.
        declaration: The run's declaration: its task, and the digest of the base model.
        base: Directory or hub id of the base model; by default that of training, if it is trusted.
        trust: Whether code that the declaration names, or that is among the files, may run.

    Raises:
        ConfigError: The base model does not exist, is not trusted, or has other weights; or code is not trusted.
    """
    peft, (task, own) = need_peft(), trust.declared_model(declaration)
    recorded = read_adapter_config(folder)
    base = base or trust.check_base(str(recorded.get("base_model_name_or_path")))
    model = load_saved(folder, find_task(task), own, base=base, trusted=trust.everything)
    adapted = peft.PeftModel.from_pretrained(model, folder)
    adapted.peft_config["default"].base_model_name_or_path = base  # peft reads the base model's configuration there
    if base_digest(adapted) != declaration.get("base"):
        raise ConfigError(
            f"{base} does not have the weights that the adapter was trained on", hint="name the right one with --base"
        )
    return adapted


def merge(
    content: Content, declaration: Mapping[str, Any] | None, base: str | None = None, trust: Trust = NO_TRUST
) -> Content:
    """Merge an adapter's checkpoint and its base model to plain Hugging Face files. Arguments as in `load_adapted`.

    Raises:
        ConfigError: This is not an adapter's checkpoint, or the base model does not exist or has other weights.
    """
    if content.weights_name != ADAPTER_WEIGHTS or declaration is None:
        raise ConfigError("--merge is for checkpoints of adapters; this is not one", hint="leave --merge out")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        export_directory(content, folder)
        merged = load_adapted(folder, declaration, base, trust).merge_and_unload()
    weights = {name: tensor.contiguous() for name, tensor in named_weights(merged, file_naming(merged)).items()}
    files = {name: data for name, data in content.files.items() if name != ADAPTER_CONFIG}
    return replace(content, weights=weights, files=files, weights_name=WEIGHTS)
