"""The ranks of an attempt: rank and size, device, sums over the ranks, and the choice of the gradient reducer."""

import keyword
import time
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, make_dataclass
from functools import lru_cache
from types import MappingProxyType, MemberDescriptorType, new_class
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import carried_state
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.torch_internals import find_tensors
from outlast.trainers.config.train import Exactness, Precision
from outlast.trainers.data.batch_plan import share
from outlast.trainers.distributed.ordered_allreduce import any_order_hook, rank_order_hook


class World(RankGroup):
    """This process as one of the ranks.

    Attributes:
        device: Device of this rank.
        node: Name of the machine in the cluster.
        log: Path of this rank's stderr, if it is kept.
        has_equal_weights: Whether all ranks are known to hold equal weights, so that DDP need not send them.
        marks: Start-up timings: when this process reached each stage before the first step, in seconds since the epoch.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        node: str = "",
        log: str = "",
        marks: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.node, self.log, self.has_equal_weights = node, log, False
        self.device = device or torch.device("cpu")
        self.marks = dict(marks)

    def mark(self, name: str) -> dict[str, float]:
        """Record that this process has reached stage `name`. Returns all timings; they are for display only."""
        self.marks[name] = round(time.time(), 3)
        return dict(self.marks)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a float64 tensor on the host over the ranks, element by element.

        Exact for counts, and for values that are zero on all ranks but one: then the order does not matter.
        """
        return self.add_meanwhile(values)()

    def add_meanwhile(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start an `add`. Returns a function that waits for the sum; call it before the next `add`."""
        assert values.dtype == torch.float64
        work: Any = None if self.group is None else dist.all_reduce(values, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            return values

        return wait

    def autocast(self, precision: Precision) -> torch.autocast:
        """Return the autocast context of a forward pass for bf16 or fp16; disabled for fp32."""
        dtype = torch.float16 if precision is Precision.FP16 else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=precision is not Precision.FP32)

    def num_idle(self, num_micro: int, model: nn.Module) -> int:
        """Count the idle passes of this rank besides its share of `num_micro`; without them the other ranks would hang.

        Each pass through a sharded model is collective, and each step through DDP. The result of an idle pass must not
        count.
        """
        mine = len(share(num_micro, self.rank, self.size))
        if isinstance(model, FSDPModule):
            return -(-num_micro // self.size) - mine
        return int(isinstance(model, DistributedDataParallel) and not mine)

    def parallelize(self, model: nn.Module, exactness: Exactness, *, static_graph: bool = False) -> nn.Module:
        """Wrap the model in DDP with the reducer for `exactness`.

        Unless `static_graph` says that each backward pass gives every trained parameter a gradient, DDP looks through
        the graph of each pass for those that get none. The bits are the same either way.

        Returns the model itself for a single rank, if it is sharded, and for `elastic`, whose reducer needs no wrapper.
        """
        if self.size == 1 or isinstance(model, FSDPModule) or exactness is Exactness.ELASTIC:
            return model
        if not static_graph:
            model.register_forward_hook(_show_tensors)
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=bool(carried_state(model)),  # checkpoints hold rank 0's buffers
            find_unused_parameters=not static_graph,
            gradient_as_bucket_view=True,  # avoids copying the sum back
            init_sync=not self.has_equal_weights,
        )
        is_ordered = exactness is Exactness.SAME_WORLD and self.size > 2
        hook = rank_order_hook if is_ordered else any_order_hook
        wrapped.register_comm_hook(None, lambda _, bucket: hook(bucket))  # DDP rejects hooks with string annotations
        return wrapped


def tensors_for_ddp(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors that DDP finds in outputs of a model whose graph it looks through."""
    return find_tensors(_show_tensors(None, None, outputs))


def _show_tensors(_module: nn.Module | None, _args: Any, outputs: Any) -> Any:
    """Return outputs in which DDP finds the tensors: it looks into no plain object, and would miss the whole graph.

    A plain object becomes a copy of a class derived from its own, which is also a dataclass.
    """
    if isinstance(outputs, (torch.Tensor, list, tuple, dict)) or is_dataclass(outputs):
        return outputs
    own: Any = type(outputs)
    slots, attributes = _slots(outputs), getattr(outputs, "__dict__", {})
    names = tuple(name for name in (*slots, *attributes) if name.isidentifier() and not keyword.iskeyword(name))
    if not names:
        return outputs
    try:
        derived, create = _derived(own, names)
        copied = create(derived)
    except TypeError as error:
        raise ConfigError(
            f"DDP cannot find the tensors in outputs of type {own.__name__}: {error}",
            hint="return a dict, a dataclass or a ModelOutput of transformers from the model",
        ) from error
    for name, value in slots.items():
        object.__setattr__(copied, name, value)  # also of a frozen class
    if attributes:
        copied.__dict__.update(attributes)
    return copied


def _slots(value: Any) -> dict[str, Any]:
    """Return the attributes in `__slots__` that are set."""
    found = (vars(base).items() for base in type(value).__mro__ if "__slots__" in vars(base))
    names = [name for items in found for name, item in items if isinstance(item, MemberDescriptorType)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


@lru_cache(maxsize=64)
def _derived(own: type, names: tuple[str, ...]) -> tuple[type, Callable[[type], Any]]:
    """Derive a class whose dataclass fields are `names`. Returns it, and what creates its objects without arguments."""
    made: Any = make_dataclass("Fields", names)
    derived = new_class(
        own.__name__, (own,), exec_body=lambda body: body.update(__dataclass_fields__=made.__dataclass_fields__)
    )
    constructors = (vars(base).get("__new__") for base in own.__mro__)
    create = next(item for item in constructors if item is not None and not isinstance(item, staticmethod))
    return derived, create  # the first that is not written in Python, so that it needs no arguments
