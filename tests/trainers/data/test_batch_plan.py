"""Order of samples: every sample once per epoch, for any world size and any batches."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.trainers.data.batch_plan import BatchPlan, derive_seed, permute, share

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**31)


@given(seed=SEEDS, epoch=EPOCHS, size=st.integers(1, 3000))
def test_permute_is_a_bijection(seed: int, epoch: int, size: int) -> None:
    assert sorted(permute(seed, epoch, np.arange(size), size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025])
def test_permute_is_a_bijection_at_the_borders_of_its_domain(size: int) -> None:
    """Sizes around powers of two and four, where the domain of the Feistel network changes."""
    assert sorted(permute(1, 2, np.arange(size), size)) == list(range(size))


@given(seed=SEEDS, epoch=EPOCHS, size=st.integers(1, 10**12), data=st.data())
def test_permute_of_huge_sizes_stays_in_range_and_repeats_nothing(
    seed: int, epoch: int, size: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=200))
    samples = permute(seed, epoch, positions, size)
    assert samples.min() >= 0
    assert samples.max() < size
    assert len(set(samples.tolist())) == len(positions)


@given(seed=SEEDS, epoch=EPOCHS, size=st.integers(1, 10**12), data=st.data())
def test_permute_does_not_depend_on_the_other_positions(seed: int, epoch: int, size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    together = permute(seed, epoch, positions, size).tolist()
    assert together == [int(permute(seed, epoch, position, size)) for position in positions]


def test_permute_keeps_the_shape() -> None:
    assert permute(0, 0, np.arange(6).reshape(2, 3), 10).shape == (2, 3)
    assert permute(0, 0, 4, 10).shape == ()


def test_permute_is_frozen() -> None:
    """These numbers must never change: a run that started with them resumes with them."""
    assert permute(7, 0, np.arange(10), 10).tolist() == [6, 2, 1, 8, 3, 7, 9, 5, 0, 4]
    assert permute(7, 1, np.arange(10), 10).tolist() == [1, 3, 8, 5, 0, 7, 6, 9, 4, 2]
    assert derive_seed(7, 1) == 0x59D93D537B5FA822


@given(seed=SEEDS, other=SEEDS, epoch=st.integers(0, 100))
def test_seeds_and_epochs_differ(seed: int, other: int, epoch: int) -> None:
    """Two of 200! orders are never equal by chance."""
    size = 200
    here = permute(seed, epoch, np.arange(size), size).tolist()
    assert here != permute(seed, epoch + 1, np.arange(size), size).tolist()
    assert here != list(range(size))
    if seed != other:
        assert here != permute(other, epoch, np.arange(size), size).tolist()


def test_permute_looks_random() -> None:
    """Each position gets every sample about equally often over many epochs (chi-square, well within 6 sigma)."""
    size, epochs = 10, 4000
    table = np.zeros((size, size))
    for epoch in range(epochs):
        table[np.arange(size), permute(3, epoch, np.arange(size), size)] += 1
    expected = epochs / size
    chi_square = float(((table - expected) ** 2 / expected).sum())
    degrees = (size - 1) ** 2
    assert abs(chi_square - degrees) < 6 * (2 * degrees) ** 0.5


@given(parts=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), bit=st.integers(0, 63))
def test_mix_depends_on_every_bit(parts: list[int], bit: int) -> None:
    changed = [parts[0] ^ (1 << bit), *parts[1:]]
    assert 0 <= derive_seed(*parts) < 2**64
    assert derive_seed(*parts) != derive_seed(*changed)
    assert derive_seed(*parts) != derive_seed(*parts, 0)


# -- the plan ----------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    micro = draw(st.integers(1, 4))
    batch = micro * draw(st.integers(1, 8))
    num_samples = draw(st.integers(1, 60))
    epochs = draw(st.integers(1, 4))
    return BatchPlan(draw(SEEDS), num_samples, batch, micro, num_samples * epochs)


def consumed(plan: BatchPlan, size: int) -> list[int]:
    """The samples of all ranks, in the order of the run."""
    taken: list[int] = []
    for step in range(plan.num_steps):
        cut = plan.cut(plan.positions(step))
        for rank in range(size):
            for micro in share(plan.num_micro_batches(step), rank, size):
                taken += plan.samples(cut[micro]).tolist()
    return taken


@given(plan=plans(), size=st.integers(1, 8))
def test_every_sample_exactly_once_an_epoch_at_any_world_size(plan: BatchPlan, size: int) -> None:
    taken = consumed(plan, size)
    assert len(taken) == plan.total_samples
    for begin in range(0, len(taken), plan.num_samples):
        assert sorted(taken[begin : begin + plan.num_samples]) == list(range(plan.num_samples))
    assert taken == consumed(plan, 1), "the world size must not change the samples"


@given(plan=plans())
def test_batches_are_full_but_for_the_last(plan: BatchPlan) -> None:
    assert plan.num_steps == ceil(plan.total_samples / plan.batch)
    for step in range(plan.num_steps):
        sizes = [part.size for part in plan.cut(plan.positions(step))]
        assert len(sizes) == plan.num_micro_batches(step)
        is_full = step < plan.num_steps - 1 or plan.total_samples % plan.batch == 0
        assert sum(sizes) == (plan.batch if is_full else plan.total_samples % plan.batch)
        assert all(item == plan.micro_batch for item in sizes[:-1])
        assert 0 < sizes[-1] <= plan.micro_batch


def test_a_batch_crosses_the_border_of_an_epoch() -> None:
    plan = BatchPlan(seed=5, num_samples=10, batch=4, micro_batch=4, total_samples=20)
    first, second = (permute(5, epoch, np.arange(10), 10).tolist() for epoch in (0, 1))
    assert plan.samples(plan.positions(2)).tolist() == first[8:] + second[:2]
    assert plan.epoch(2) == 0.8
    assert plan.epoch(5) == 2.0


def test_a_fraction_of_an_epoch_ends_in_a_short_step() -> None:
    plan = BatchPlan(seed=5, num_samples=10, batch=4, micro_batch=2, total_samples=15)
    assert plan.num_steps == 4
    assert [plan.num_micro_batches(step) for step in range(4)] == [2, 2, 2, 2]
    assert [part.size for part in plan.cut(plan.positions(3))] == [2, 1]
    assert plan.epoch(4) == 1.5


def test_a_position_far_into_the_run_costs_the_same() -> None:
    plan = BatchPlan(seed=5, num_samples=10**12, batch=4, micro_batch=4, total_samples=3 * 10**12)
    assert plan.samples(plan.positions(10**11)).size == 4
    assert plan.num_steps == 75 * 10**10


@given(plan=plans(), data=st.data())
def test_samples_of_similar_length_are_together(plan: BatchPlan, data: st.DataObject) -> None:
    positions = plan.positions(0)
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=positions.size, max_size=positions.size))
    cut = plan.cut(positions, lengths)
    assert sorted(np.concatenate(cut).tolist()) == positions.tolist()
    lengths_of_parts = sorted([lengths[position] for position in part.tolist()] for part in cut)
    assert [item for part in lengths_of_parts for item in part] == sorted(lengths)
    if positions.size % plan.micro_batch == 0:  # a short one can be worse off
        in_order = sum(part.size * max(lengths[position] for position in part.tolist()) for part in plan.cut(positions))
        assert sum(len(part) * max(part) for part in lengths_of_parts) <= in_order


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_long_and_short_samples(size: int) -> None:
    plan = BatchPlan(seed=5, num_samples=64, batch=64, micro_batch=2, total_samples=64)
    cut = plan.cut(plan.positions(0), list(range(64)))
    means = [np.concatenate([cut[micro] for micro in share(32, rank, size)]).mean() for rank in range(size)]
    assert max(means) < 1.4 * min(means), "sorted by length, the ratio would be several times as large"


@given(count=st.integers(0, 200), size=st.integers(1, 16))
def test_shares_are_contiguous_and_even(count: int, size: int) -> None:
    shares = [share(count, rank, size) for rank in range(size)]
    assert [item for part in shares for item in part] == list(range(count))
    lengths = [len(part) for part in shares]
    assert max(lengths) - min(lengths) <= 1


@given(plan=plans(), begin=st.integers(0, 3000), count=st.integers(1, 40))
def test_samples_are_the_permutation_of_each_epoch(plan: BatchPlan, begin: int, count: int) -> None:
    global_positions = np.arange(begin, begin + count, dtype=np.int64)
    epochs, positions = np.divmod(global_positions, plan.num_samples)
    pairs = zip(epochs.tolist(), positions.tolist(), strict=True)
    expected = [int(permute(plan.seed, epoch, position, plan.num_samples)) for epoch, position in pairs]
    assert plan.samples(global_positions).tolist() == expected
