"""Order of samples and seeds of their randomness: pure O(1) functions of the position in the run, without state.

Sample `i` of step `s` has the global position `g = s * batch + i`; its epoch is `g // N`, its position there is
`p = g % N`, and the sample is a pseudo-random permutation of `[0, N)` at `p`, keyed by (seed, epoch). The permutation
is a Feistel network over the next power of four, walked until the result is in range (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). So step 10^9 costs the same as step 0. The result must never depend on the world size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.training_config import TrainingConfig

_ROUNDS = 6
_BLOCK = 1024
_MASK64 = (1 << 64) - 1
U64 = npt.NDArray[np.uint64]


def derive_seed(*parts: int) -> int:
    """Hash integers to 64 bits (SplitMix64, Steele et al. 2014, chained). It is the run's only source of seeds."""
    state = 0x6F75746C61737400
    for part in parts:
        state = (state ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


def permute(seed: int, epoch: int, positions: npt.ArrayLike, size: int) -> npt.NDArray[np.int64]:
    """Return the samples at `positions` of an epoch: indices in [0, size), of the shape of `positions`.

    Epochs count from 0, positions are in [0, size), and the size is 1 to 2^62. Over all positions of an epoch, each
    sample occurs exactly once.
    """
    assert 1 <= size <= 1 << 62
    values = np.array(positions, dtype=np.uint64, ndmin=1)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive_seed(seed, epoch, number)) for number in range(_ROUNDS)]
    result = _feistel(values, keys, half)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], keys, half)
    return result.astype(np.int64).reshape(np.shape(positions))


def _feistel(values: U64, keys: list[np.uint64], half: int) -> U64:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return left << shift | right


def _scramble(x: U64) -> U64:
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@lru_cache(maxsize=4)
def _samples_of_block(seed: int, num_samples: int, block: int) -> npt.NDArray[np.int64]:
    """Return the sample indices of a block of positions: a run reads forward, and a block costs as much as a sample."""
    positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64)
    epochs = positions // num_samples
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = permute(seed, int(epoch), positions[in_epoch] % num_samples, num_samples)
    return indices


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Batches of a run: which samples each step and micro-batch has."""

    seed: int
    num_samples: int  #: in an epoch
    batch: int  #: samples in a global batch
    micro_batch: int  #: samples in a micro-batch; divides `batch`
    total_samples: int  #: over all epochs; the last step may be short

    @property
    def num_steps(self) -> int:
        return -(-self.total_samples // self.batch)

    def num_micro_batches(self, step: int) -> int:
        """Count the micro-batches of a step; a short last step has fewer."""
        return -(-self._num_in_step(step) // self.micro_batch)

    def _num_in_step(self, step: int) -> int:
        return min(self.batch, self.total_samples - step * self.batch)

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """Return the global positions of the samples of `step` (from 0), shape [at most batch]."""
        begin = step * self.batch
        return np.arange(begin, begin + self._num_in_step(step), dtype=np.int64)

    def cut(
        self, positions: npt.NDArray[np.int64], lengths: npt.ArrayLike | None = None
    ) -> list[npt.NDArray[np.int64]]:
        """Split the positions of a step into micro-batches; with `lengths`, samples of similar length go together.

        The samples of a step do not change. The micro-batches are not sorted by length but spread, so that every
        rank's contiguous share has long and short ones, for any number of ranks.
        """
        if lengths is None:
            return [positions[at : at + self.micro_batch] for at in range(0, len(positions), self.micro_batch)]
        by_length = self.cut(positions[np.argsort(lengths, kind="stable")])
        return [by_length[number] for number in spread(len(by_length))]

    def samples(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the sample indices at global positions."""
        blocks = positions // _BLOCK
        indices = np.empty_like(positions)
        for block in set(blocks.tolist()):
            in_block = blocks == block
            indices[in_block] = _samples_of_block(self.seed, self.num_samples, block)[positions[in_block] % _BLOCK]
        return indices

    def keys(self, positions: npt.NDArray[np.int64]) -> list[int]:
        """Return 64 bits for each position, a function of (seed, epoch, sample): seeds of masks and the like."""
        epochs, indices = positions // self.num_samples, self.samples(positions)
        return [
            derive_seed(self.seed, epoch, index) for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)
        ]

    def epoch(self, step: int) -> float:
        """Return the epochs done after `step` steps."""
        return min(step * self.batch, self.total_samples) / self.num_samples


def spread(count: int) -> list[int]:
    """Return `range(count)` in bit-reversed order: neighbours move apart, so every slice is a fair sample."""
    num_bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{num_bits}b}"[::-1], 2))


def share(count: int, rank: int, size: int) -> range:
    """Return the contiguous slice of `range(count)` for `rank` of `size`; slice lengths differ by at most one."""
    return range(count * rank // size, count * (rank + 1) // size)


def make_plan(config: TrainingConfig, num_samples: int, world_size: int) -> BatchPlan:
    """Make the plan of a run. Raises ConfigError if there are more ranks than micro-batches in a step."""
    train = config.train
    if train.batch // train.micro_batch < world_size:
        raise ConfigError(
            f"{world_size} workers, but a batch of {train.batch} has only {train.batch // train.micro_batch} "
            f"micro-batches of {train.micro_batch}: some workers would be idle",
            hint="use fewer workers, a larger train.batch or a smaller train.micro_batch",
        )
    total = train.steps * train.batch if train.steps else math.ceil((train.epochs or 0) * num_samples)
    return BatchPlan(config.seed, num_samples, train.batch, train.micro_batch, total)
