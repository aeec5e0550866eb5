"""`TrainState`: model and optimizer as named tensors, which a save writes and a restore fills.

Names, types and shards are computed once per save or restore. Nothing here communicates or copies.
"""

from collections.abc import Collection, Mapping

import torch
import xxhash
from torch import nn

from outlast.checkpointing.format.safetensors import TensorSpec
from outlast.checkpointing.state.named_weights import ALL, WeightNaming, parameter_names, weight_slices
from outlast.checkpointing.state.optimizer_groups import check_optimizer, encode_optimizer, load_groups
from outlast.checkpointing.state.optimizer_state import (
    assign_to_ranks,
    check_moments,
    devices_of_state,
    load_optimizer,
    optimizer_tensors,
    regions_of_state,
)
from outlast.checkpointing.state.shards import LocalShard, Region, local_shard

Targets = dict[str, tuple[Region, torch.Tensor]]


class TrainState:
    """A model's weights and its optimizer's state, as this rank holds them.

    Attributes:
        naming: The names of the weights.
        specs: Type and full shape of every weight, in the model's order; the same on every rank.
        weights: This rank's shard of every weight; shares the model's memory.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, naming: WeightNaming = ALL) -> None:
        self._model, self.optimizer = model, optimizer
        self._regions: Mapping[str, Region] = {}
        self._use(naming)

    def _use(self, naming: WeightNaming) -> None:
        self.naming, slices = naming, weight_slices(self._model, naming)
        self.weights = {name: local_shard(tensor).cut(cut) for name, (tensor, cut) in slices.items()}
        self.specs = {name: TensorSpec(part.tensor.dtype, part.shape) for name, part in self.weights.items()}

    def use_naming_of(self, saved: Collection[str]) -> None:
        """Change to the naming of a checkpoint with the weights `saved`, if it is one of `naming.older`."""
        first = self.naming
        for naming in first.older:
            if self.specs.keys() == set(saved):
                return
            self._use(naming)
        if self.specs.keys() != set(saved) and first.older:
            self._use(first)

    @property
    def is_on_device(self) -> bool:
        """Whether weights lie in the memory of a CUDA device."""
        return any(part.tensor.is_cuda for part in self.weights.values())

    def weights_to_write(self, rank: int) -> dict[str, LocalShard]:
        """Return the weights that a rank writes: its part of sharded ones, and on rank 0 all others."""
        return {name: part for name, part in self.weights.items() if rank == 0 or part.is_sharded}

    def moments_to_write(self, rank: int, size: int) -> dict[str, LocalShard] | None:
        """Return the optimizer state that a rank writes; None without an optimizer. Raises ConfigError."""
        if self.optimizer is None:
            return None
        shards = self.moments()
        unsharded = {name: part.tensor for name, part in shards.items() if not part.is_sharded}
        rank_0_bytes = sum(self.specs[name].num_bytes for name, part in self.weights.items() if not part.is_sharded)
        mine = set(assign_to_ranks(unsharded, size, rank_0_bytes)[rank])
        return {name: part for name, part in shards.items() if name in mine or (part.is_sharded and not part.is_copy)}

    def moments(self) -> dict[str, LocalShard]:
        """Return this rank's shard of the optimizer state; shares the optimizer's memory. Raises ConfigError."""
        tensors = optimizer_tensors(self._model, self.optimizer) if self.optimizer is not None else {}
        return {name: local_shard(item) for name, item in tensors.items()}

    def moments_digest(self) -> str:
        """Return a digest of the names, types and full shapes of the optimizer state; equal on ranks that agree."""
        tensors = optimizer_tensors(self._model, self.optimizer) if self.optimizer is not None else {}
        specs = sorted(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
        return xxhash.xxh3_64("\n".join(specs).encode()).hexdigest()

    def changed_by_forward(self, names: Collection[str]) -> set[str]:
        """Return those of these weights that a forward pass may change."""
        return set(names) - parameter_names(self._model, self.naming)

    def describe_optimizer(self) -> str | None:
        """Return the optimizer's class, groups and numbers as text. Raises ConfigError."""
        return None if self.optimizer is None else encode_optimizer(self._model, self.optimizer)

    def check_optimizer(self, text: str, path: str) -> None:
        """Raise ConfigError if a checkpoint is of another optimizer, and DamagedError if `text` is no description."""
        if self.optimizer is not None:
            check_optimizer(self._model, self.optimizer, text, path)

    def check_moments(self, names: Collection[str]) -> None:
        """Raise ConfigError for optimizer state of parameters that the model does not have."""
        if self.optimizer is not None:
            check_moments(self._model, names)

    def load_groups(self, text: str, path: str) -> None:
        """Load the numbers of the parameter groups."""
        if self.optimizer is not None:
            load_groups(self.optimizer, text, path)

    def targets(self, moments: Mapping[str, TensorSpec]) -> Targets:
        """Return the regions that this rank reads, and their memory: the model's own for weights, new for moments."""
        targets = {name: (part.region, part.tensor) for name, part in self.weights.items()}
        devices = devices_of_state(self._model, self.optimizer, moments) if self.optimizer is not None else {}
        self._regions = regions_of_state(self._model, {name: spec.shape for name, spec in moments.items()})
        for name, spec in moments.items():
            region = self._regions.get(name, Region.whole(spec.shape))
            targets[name] = (region, torch.empty(region.shape, dtype=spec.dtype, device=devices.get(name)))
        return targets

    def load_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Load the optimizer state from the memory of `targets`, once it is filled."""
        if self.optimizer is not None:
            load_optimizer(self._model, self.optimizer, moments, sharded=self._regions.keys())
