"""Buffers that no forward pass may change, because a mode of training could not bring back what changed them.

What is saved is parameters and persistent buffers, those of rank 0. So where ranks keep no common buffers a running
mean would depend on which rank saw what; and what a model keeps in buffers that are not saved, such as the frequencies
of a RoPE that grow with the longest sequence so far, would be lost by a restart.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import xxhash
from torch import nn
from torch.distributed.fsdp import FSDPModule

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.state.model_weights import carried_state
from outlast.trainers.config.train import Exactness


class BufferGuard:
    """Watches buffers of a model.

    Args:
        model: The model, unwrapped.
        why: What holds only while they keep their values.
        hint: What to do about one that does not.
        free: Names of buffers that may change.
        only: Names of those that are watched; by default all others, also new ones.
    """

    def __init__(
        self, model: nn.Module, why: str, hint: str, free: Collection[str] = (), only: Collection[str] | None = None
    ) -> None:
        self._model, self._why, self._hint, self._free, self._only = model, why, hint, free, only
        self._seen = {name: (buffer, buffer._version, _digest(buffer)) for name, buffer in self._watched()}

    def check(self) -> None:
        """Raises ConfigError when a buffer has another value. Written to with the same one, as DDP does, it may be."""
        for name, buffer in self._watched():
            before, version, digest = self._seen.get(name, (None, 0, ""))
            if buffer is before and buffer._version == version:
                continue
            if _digest(buffer) != digest:
                raise ConfigError(
                    f"buffer {name} changes in the forward pass; {self._why} holds for models without such state only",
                    hint=self._hint,
                )
            self._seen[name] = (buffer, buffer._version, digest)

    def _watched(self) -> list[tuple[str, torch.Tensor]]:
        found = [(name, buffer) for name, buffer in self._model.named_buffers() if name not in self._free]
        return [item for item in found if self._only is None or item[0] in self._only]


def _digest(buffer: torch.Tensor) -> str:
    return f"{buffer.dtype}{list(buffer.shape)}{xxhash.xxh3_128_hexdigest(tensor_bytes(buffer))}"


def watch_buffers(model: nn.Module, exactness: Exactness, *, recomputes: bool) -> list[BufferGuard]:
    """What the settings ask to be watched. To be called after resuming, which writes to buffers.

    Args:
        model: The model, unwrapped.
        exactness: What is promised.
        recomputes: Whether forward passes are done twice, so that what they add to a buffer is added twice.
    """
    is_sharded = isinstance(model, FSDPModule)
    if is_sharded or exactness is Exactness.ELASTIC:
        why = "scale.parallel: fsdp" if is_sharded else "exactness: elastic"
        hint = "use exactness: same-world and scale.parallel: ddp, which keep rank 0's buffers if they are persistent"
        return [BufferGuard(model, why, hint)]
    saved, found = carried_state(model), []
    if exactness is Exactness.SAME_WORLD:
        hint = (
            "no checkpoint holds it: register it as persistent, or keep data.max_length to what the model is made for"
        )
        found.append(BufferGuard(model, "exactness: same-world", hint, free=saved))
    if recomputes:
        hint = "set train.gradient_checkpointing: false"
        found.append(BufferGuard(model, "train.gradient_checkpointing", hint, only=saved))
    return found
