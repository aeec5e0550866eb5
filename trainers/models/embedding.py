"""The embedding of a pretrained model against the tokenizer: it may have more rows, never fewer than are used."""

import contextlib
from typing import Any

import torch
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.models.transformers_internals import quiet_transformers


def num_rows(model: Any) -> int | None:
    """Return how many token ids the input embedding of a transformers model has; None if it has no such table."""
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    with contextlib.suppress(NotImplementedError, AttributeError):
        weight = getattr(model.get_input_embeddings(), "weight", None)
        return None if weight is None else int(weight.shape[0])
    return None


def grow_embedding(model: Any, num_tokens: int, seed: int, *, has_weights: bool) -> tuple[str, ...]:
    """Resize the embeddings of a model with fewer rows than tokens. Returns the names of the weights that grew.

    Args:
        model: The pretrained model.
        num_tokens: Tokens of the tokenizer.
        seed: Seed of the new rows.
        has_weights: Whether the weights were loaded; else a checkpoint is about to replace them.

    Raises:
        ConfigError: transformers cannot resize the embedding of this architecture.
    """
    if (before := num_rows(model)) is None or before >= num_tokens:
        return ()
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    seed_everything(seed)
    try:
        with quiet_transformers(), torch.no_grad():
            model.resize_token_embeddings(num_tokens, mean_resizing=has_weights and not _is_on_meta(model))
    except (NotImplementedError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"transformers cannot resize the embedding of {type(model).__name__}, which has {before} rows, to "
            f"{num_tokens} tokens",
            hint="use a tokenizer with fewer tokens: model.tokenizer",
        ) from error
    return tuple(name for name, tensor in model.state_dict().items() if tensor.shape != sizes.get(name))


def _is_on_meta(model: Any) -> bool:
    return bool(next(model.parameters()).is_meta)
