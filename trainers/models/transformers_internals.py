"""Parts of transformers that it does not document: imported here alone. Tried on transformers 5.23 and 5.24."""

from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping as get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion as revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save as custom_object_save
from transformers.initialization import no_init_weights as no_init_weights


def model_mapping(auto_class: Any) -> Any:
    """Return the table of model classes by configuration class of an Auto class; None for another class."""
    return getattr(auto_class, "_model_mapping", None)
