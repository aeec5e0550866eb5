"""Estimate of a run's state in bytes: model and optimizer are built on the meta device, which allocates no memory."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from outlast.checkpointing.format.layout import optimizer_shard
from outlast.checkpointing.format.safetensors import TensorSpec, encode
from outlast.checkpointing.memory_tier.snapshot_writer import NUM_PLACES
from outlast.checkpointing.save.writer import weight_files
from outlast.checkpointing.state.named_weights import WeightNaming, named_weights
from outlast.checkpointing.state.optimizer_groups import encode_optimizer
from outlast.checkpointing.state.optimizer_state import assign_to_ranks, optimizer_tensors
from outlast.checkpointing.storage.base import Storage
from outlast.trainers.checks.model_checks import check_model
from outlast.trainers.config.train import Exactness, Parallel
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.batch_plan import make_plan, share
from outlast.trainers.distributed.memory_snapshots import keeps_snapshots
from outlast.trainers.distributed.tree_allreduce import TreeSum
from outlast.trainers.loop.log_history import ENTRY_BYTES, LogHistory
from outlast.trainers.loop.optimizer import make_optimizer
from outlast.trainers.models.build import weight_naming
from outlast.trainers.preparation.prepare import Prepared

_COPY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of state in the memory of the worker that has most. Activations are not included.

    Attributes:
        weights: Weights in float32.
        gradients: Gradients, including the partial sums of `exactness: elastic`.
        optimizer: State of the optimizer.
        snapshot: Copy of the worker's share on the host, with `checkpoint.overlap`.
        shared: Snapshots in the node's shared memory, at most: two of its own share, and two of another node's.
    """

    weights: int
    gradients: int
    optimizer: int
    snapshot: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class StateSize:
    """Size of the state.

    Attributes:
        model: Name of the model's class.
        num_parameters: Number of parameters, tied ones counted once.
        num_trained: Number of trained parameters.
        memory: Memory of a worker.
        files: Bytes of each file of a checkpoint, as far as they are known before training.
        share_bytes: Bytes of each checkpoint that the worker with the largest share writes.
        history_bytes: Bytes that the history of the steps takes at the end, about.
    """

    model: str
    num_parameters: int
    num_trained: int
    memory: Memory
    files: Mapping[str, int]
    share_bytes: int
    history_bytes: int = 0

    @property
    def checkpoint_bytes(self) -> int:
        return sum(self.files.values()) + self.history_bytes


def estimate_state(config: TrainingConfig, prepared: Prepared, storage: Storage, size: int) -> StateSize:
    """Compute the size of a run's state on `size` workers.

    Raises:
        ConfigError: The model cannot be built, or the optimizer cannot make its state on the meta device.
    """
    model, small_files = check_model(config, prepared, storage)
    naming = weight_naming(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments, description = _optimizer(model, config)
    weights = named_weights(model, naming)
    weight_bytes, moment_bytes = _num_bytes(weights), _num_bytes(moments)
    assigned = assign_to_ranks(moments, size, weight_bytes)
    shares = [
        sum(moments[name].nbytes for name in names) + (0 if rank else weight_bytes)
        for rank, names in enumerate(assigned)
    ]
    is_sharded = config.scale.parallel is Parallel.FSDP
    num_shards = size if is_sharded else 1
    share_bytes = (weight_bytes + moment_bytes) // size if is_sharded else max(shares)
    gradients = sum(parameter.nbytes for parameter in trained)
    memory = Memory(
        weights=sum(parameter.nbytes for parameter in model.parameters()) // num_shards,
        gradients=gradients // num_shards * (1 + _num_partial_sums(config, prepared, size)),
        optimizer=moment_bytes // num_shards,
        snapshot=share_bytes if config.checkpoint.overlap else 0,
        shared=NUM_PLACES * share_bytes * (2 if size > 1 else 1) if keeps_snapshots(config) else 0,
    )
    files = {name: len(data) for name, data in small_files.items()}
    files |= _weight_files(weights, config, naming)
    for rank, names in enumerate(assigned):
        files[optimizer_shard(rank, size)] = _file_bytes(moments, names, None if rank else {"optimizer": description})
    plan = make_plan(config, prepared.num_samples, size)
    return StateSize(
        model=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trained=sum(parameter.numel() for parameter in trained),
        memory=memory,
        files=files,
        share_bytes=share_bytes,
        history_bytes=plan.num_steps // LogHistory(plan, config.train.log_every).every * ENTRY_BYTES,
    )


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _optimizer(model: nn.Module, config: TrainingConfig) -> tuple[dict[str, torch.Tensor], str]:
    """Return the optimizer's state after a step on the meta device, and its description.

    Plain kernels have the state of fused ones.
    """
    optimizer = make_optimizer(model, config.train)
    for group in optimizer.param_groups:
        group.update({name: False for name in ("fused", "foreach") if name in group})
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return optimizer_tensors(model, optimizer), encode_optimizer(model, optimizer)


def _weight_files(weights: Mapping[str, torch.Tensor], config: TrainingConfig, naming: WeightNaming) -> dict[str, int]:
    specs = {name: TensorSpec.of(tensor) for name, tensor in weights.items()}
    files = weight_files(specs, config.checkpoint.max_shard_bytes, naming.file)
    return {file: _file_bytes(weights, names) for file, names in files.items()}


def _file_bytes(
    tensors: Mapping[str, torch.Tensor], names: list[str], metadata: Mapping[str, str] | None = None
) -> int:
    """Return the size of a file with these tensors."""
    selected = {name: tensors[name] for name in names}
    return len(next(encode(selected, metadata))) + _num_bytes(selected)


def _num_partial_sums(config: TrainingConfig, prepared: Prepared, size: int) -> int:
    """Return the largest number of partial gradient sums that a worker holds for the tree of `elastic`."""
    if config.exactness is not Exactness.ELASTIC:
        return 0
    num_micro = make_plan(config, prepared.num_samples, size).num_micro_batches(0)
    most = 0
    for rank in range(size):
        tree = TreeSum(num_micro)
        for micro in share(num_micro, rank, size):
            tree.add(range(micro, micro + 1), torch.zeros(1))
            most = max(most, len(tree.parts))
    return most


def copy_speed() -> float:
    """Measure the speed of a memory copy on this machine, in bytes per second."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    start = time.perf_counter()
    target.copy_(source)
    return _COPY_BYTES / (time.perf_counter() - start)
