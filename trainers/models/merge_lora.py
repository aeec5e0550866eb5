"""An adapter and the model beneath it, made one: what `checkpoints export --merge` writes. peft does the adding."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import WEIGHTS
from outlast.checkpointing.state.model_weights import named_weights
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS, Content, export_directory
from outlast.trainers.models.build import load_saved
from outlast.trainers.models.lora import CONFIG, base_digest, need_peft
from outlast.trainers.models.weight_names import file_naming
from outlast.trainers.tasks.registry import find_task


def load_adapted(
    folder: Path, declaration: Mapping[str, Any], base: str | None = None, *, trusted: bool = False
) -> Any:
    """The model of peft that an adapter's checkpoint makes of the model beneath, whose weights are proven by digest.

    Args:
        folder: The checkpoint's files.
        declaration: What the run declared: its task, and the digest of the model beneath.
        base: Where the model beneath lies; by default where it lay in training.
        trusted: Whether code that lies among the files may run.

    Raises:
        ConfigError: The model beneath is not there or is another one.
    """
    peft, settings = need_peft(), declaration["mathematics"]["model"]
    place = base or json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"]
    model = load_saved(folder, find_task(settings["task"]), settings.get("class_"), base=place, trusted=trusted)
    adapted = peft.PeftModel.from_pretrained(model, folder)
    adapted.peft_config["default"].base_model_name_or_path = str(place)  # peft looks there again
    if base_digest(adapted) != declaration["base"]:
        raise ConfigError(
            f"{place} does not hold the weights that the adapter was trained on", hint="name the right one with --base"
        )
    return adapted


def merge(
    content: Content, declaration: Mapping[str, Any] | None, base: str | None = None, *, trusted: bool = False
) -> Content:
    """The whole model of an adapter's checkpoint, as plain Hugging Face files. The arguments are `load_adapted`'s.

    Raises:
        ConfigError: It is no adapter's checkpoint, or the model beneath is not there or is another one.
    """
    if content.weights_name != ADAPTER_WEIGHTS or declaration is None:
        raise ConfigError("--merge is for checkpoints of adapters, and this is not one", hint="leave --merge out")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        export_directory(content, folder)
        whole = load_adapted(folder, declaration, base, trusted=trusted).merge_and_unload()
    weights = {name: tensor.contiguous() for name, tensor in named_weights(whole, file_naming(whole)).items()}
    files = {name: data for name, data in content.files.items() if name != CONFIG}
    return replace(content, weights=weights, files=files, weights_name=WEIGHTS)
