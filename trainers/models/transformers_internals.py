"""Parts of transformers that it does not document: imported here alone. Tried on transformers 5.23 and 5.24."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import no_init_weights

__all__ = [
    "custom_object_save",
    "get_checkpoint_conversion_mapping",
    "model_mapping",
    "no_init_weights",
    "revert_weight_conversion",
]


def model_mapping(auto_class: Any) -> Any:
    """The model class of each configuration class, of an Auto class; None for another class."""
    return getattr(auto_class, "_model_mapping", None)
