"""What a forward pass does to the parameters of a model that is tried in advance.

Only the optimizer may change a parameter: a forward pass changes it on each rank in another way, and no gradient tells
the other ranks. On one rank it is exact, since checkpoints hold all parameters.
"""

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import plain_name


class ParameterWatch:
    """The parameters as they are now, and as they were at first.

    Args:
        model: The model. Its parameters are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._objects = dict(model.named_parameters(remove_duplicate=False))
        self._values = {name: item.detach().clone() for name, item in model.named_parameters()}
        self._changed: dict[str, None] = {}

    def look(self) -> None:
        """Note which parameters have other bits than at first, whether or not their version counts that."""
        for name, before in self._values.items():
            if not _has_same_bits(self._objects[name], before):
                self._changed[name] = None

    def restore(self) -> None:
        """Restore those that `look` found changed."""
        with torch.no_grad():
            for name in self._changed:
                self._objects[name].copy_(self._values[name])

    def check_objects(self) -> None:
        """Raise ConfigError if a parameter was made, replaced or deleted: neither optimizer nor checkpoint knows it."""
        now = dict(self._model.named_parameters(remove_duplicate=False))
        for name in {**now, **self._objects}:
            if now.get(name) is not self._objects.get(name):
                raise ConfigError(
                    f"{type(self._model).__name__} makes, replaces or deletes the parameter {plain_name(name)} in its "
                    "forward pass; a resumed run could not repeat that",
                    hint="make it in the constructor, and change it there only",
                )

    def check_values(self) -> None:
        """Raise ConfigError if a forward pass changes a parameter, or may do so later."""
        normed = (
            f"{name}.weight".lstrip(".")
            for name, module in self._model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        )
        for name in [*self._changed, *normed]:
            raise ConfigError(
                f"the forward pass of {type(self._model).__name__} changes the parameter {plain_name(name)}; only on "
                "one worker, with exactness: same-world, would a resumed run repeat that",
                hint="keep what the forward pass changes in a persistent buffer; use no max_norm of nn.Embedding",
            )


def _has_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    one, other = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)
