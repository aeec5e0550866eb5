"""Parts of transformers that it does not document: imported here alone. Tried on transformers 5.23 and 5.24."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping as get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion as revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save as custom_object_save
from transformers.initialization import no_init_weights as no_init_weights


def model_mapping(auto_class: Any) -> Any:
    """Return the table of model classes by configuration class of an Auto class; None for another class."""
    return getattr(auto_class, "_model_mapping", None)


def initialize_weights(model: Any, module: Any) -> None:
    """Initialize the weights of a module as `from_pretrained` initializes those that the files lack."""
    model._init_weights(module)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers."""
    level, has_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if has_bars:
            transformers.logging.enable_progress_bar()
