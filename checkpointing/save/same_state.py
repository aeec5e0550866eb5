"""The check of a second save of one step: it is not written, so it must be of the same weights."""

from collections.abc import Iterable
from typing import cast

from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.save.writer import RankPayload, write_payload
from outlast.checkpointing.state.named_weights import WeightNaming
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.base import Buffer, Storage


class _Discard:
    """A storage that keeps nothing: what is written to it is only digested."""

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        for _ in chunks:
            pass


def check_same_weights(
    saved: Manifest, model: nn.Module, naming: WeightNaming, ranks: RankGroup, max_shard_bytes: int
) -> None:
    """Raise ConfigError on every rank if the weights are not those of the checkpoint. Every rank calls it.

    Weights that were distributed over other files cannot be compared.
    """
    payload = RankPayload.of(saved.ref.step, TrainState(model, None, naming), ranks, {}, max_shard_bytes)
    files = {entry.path: entry for entry in saved.files}
    found = [(entry, files.get(entry.path)) for entry in write_payload(cast(Storage, _Discard()), "", ranks, payload)]
    is_comparable = all(old is not None for _, old in found)
    if any(ranks.gather(is_comparable and any(new != old for new, old in found))):
        raise ConfigError(
            f"step {saved.ref.step} is saved, with other weights: steps must rise",
            hint="count each optimizer step, from the step in the state that resume returned",
        )
