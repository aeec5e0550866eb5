"""Guard for tensors that no forward pass may change, because the mode of training could not restore the change.

A checkpoint holds parameters and rank 0's persistent buffers. So where ranks do not share buffers, a running mean would
depend on which rank saw which samples; and buffers that are not saved, such as the frequencies of a RoPE that grow with
the longest sequence so far, would be lost by a restart. Parameters that are not trained, such as those of a teacher
that follows its student, would differ between ranks for the rest of the run.
"""

from collections.abc import Callable, Collection

import torch
import xxhash
from torch import nn
from torch.distributed.fsdp import FSDPModule

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.state.named_weights import carried_state, plain_buffers
from outlast.trainers.config.train import Exactness


class BufferGuard:
    """Checks that buffers of a model keep their values.

    Args:
        model: The model, unwrapped.
        why: The setting that holds only while they do.
        hint: Advice for a buffer that changes.
        free: Names of buffers that may change.
        only: Names of the guarded ones; by default all others, also new ones.
        tensors: What to guard instead of the buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        why: str,
        hint: str,
        free: Collection[str] = (),
        only: Collection[str] | None = None,
        tensors: Callable[[nn.Module], list[tuple[str, torch.Tensor]]] = plain_buffers,
    ) -> None:
        self._model, self._why, self._hint, self._free, self._only = model, why, hint, free, only
        self._tensors, self._kind = tensors, "buffer" if tensors is plain_buffers else "parameter"
        self._seen = {name: (buffer, buffer._version, tensor_digest(buffer)) for name, buffer in self._guarded()}

    def check(self) -> None:
        """Raise ConfigError if a buffer has another value. Writing the same value, as DDP does, is allowed."""
        for name, buffer in self._guarded():
            if name not in self._seen:
                raise ConfigError(
                    f"{self._kind} {name} appears in the forward pass; {self._why} holds for models only that have "
                    "all of theirs from the start",
                    hint="register it in the constructor",
                )
            before, version, digest = self._seen[name]
            if buffer is before and buffer._version == version:
                continue
            if tensor_digest(buffer) != digest:
                raise ConfigError(
                    f"{self._kind} {name} changes in the forward pass; {self._why} holds for models without such state "
                    "only",
                    hint=self._hint,
                )
            self._seen[name] = (buffer, buffer._version, digest)

    def _guarded(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (name, buffer)
            for name, buffer in self._tensors(self._model)
            if name not in self._free and (self._only is None or name in self._only)
        ]


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest type, shape and elements."""
    return f"{tensor.dtype}{list(tensor.shape)}{xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))}"


def watch_buffers(
    model: nn.Module, exactness: Exactness, *, recomputes: bool, will_shard: bool = False
) -> list[BufferGuard]:
    """Return the guards that the settings require. Call it after resuming, which writes to buffers.

    Args:
        model: The model, unwrapped.
        exactness: The promised exactness.
        will_shard: Whether the model stands for one that is sharded.
        recomputes: Whether forward passes run twice, so that they would update a buffer twice.
    """
    is_sharded = will_shard or isinstance(model, FSDPModule)
    if is_sharded or exactness is Exactness.ELASTIC:
        why = "scale.parallel: fsdp" if is_sharded else "exactness: elastic"
        hint = "use exactness: same-world and scale.parallel: ddp, which keep rank 0's buffers if they are persistent"
        return [BufferGuard(model, why, hint)]
    saved, guards = carried_state(model), []
    if exactness is Exactness.SAME_WORLD:
        hint = "it is not saved: register it as persistent, or keep data.max_length within what the model supports"
        guards.append(BufferGuard(model, "exactness: same-world", hint, free=saved))
    if recomputes:
        hint = "set train.gradient_checkpointing: false"
        guards.append(BufferGuard(model, "train.gradient_checkpointing", hint, only=saved))
    return guards


def watch_frozen(model: nn.Module) -> BufferGuard:
    """Return the guard for parameters that are not trained, where ranks do not share what a forward pass changes."""
    hint = "keep it in a persistent buffer, with exactness: same-world and scale.parallel: ddp"
    names = {name for name, _ in _frozen(model)}
    return BufferGuard(model, "training on several workers", hint, only=names, tensors=_frozen)


def _frozen(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, item) for name, item in model.named_parameters() if not item.requires_grad]
