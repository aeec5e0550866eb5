"""Adapters of peft in the layout of peft: the adapter's weights and configuration, nothing of the model beneath.

    checkpointer = Checkpointer(storage, "run", naming=adapter_naming(model), files=adapter_files(model))

Every checkpoint is then what `PeftModel.from_pretrained(base, checkpoint)` loads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.weights import Naming, plain_name, unwrap

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def adapter_naming(model: Any) -> Naming:
    """Which of a peft model's weights are its adapter, and what peft calls them in a file.

    To be asked before the model is sharded.

    Raises:
        ConfigError: It has several adapters, and a checkpoint holds one.
    """
    from peft import get_peft_model_state_dict

    inner: Any = unwrap(model)
    if list(inner.peft_config) != ["default"]:
        raise ConfigError(
            f"the model has the adapters {', '.join(inner.peft_config)}; a checkpoint holds one, called 'default'",
            hint="train one adapter at a time",
        )
    own = {id(tensor): plain_name(name) for name, tensor in inner.state_dict(keep_vars=True).items()}
    saved = get_peft_model_state_dict(inner, state_dict=inner.state_dict(keep_vars=True))
    return Naming(WEIGHTS, {own[id(tensor)]: name for name, tensor in saved.items()})


def adapter_files(model: Any) -> dict[str, bytes]:
    """The adapter's configuration as peft writes it, by file name."""
    inner: Any = unwrap(model)
    with tempfile.TemporaryDirectory() as folder:
        inner.peft_config["default"].save_pretrained(folder)
        return {CONFIG: (Path(folder) / CONFIG).read_bytes()}
