"""Private parts of torch: the shape that the code relies on. What they compute is held by the tests of their users."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from torch._dynamo.exc import FailOnRecompileLimitHit

from outlast.checkpointing.torch_internals import compute_local_shape_and_global_offset, limit_recompiles


def test_the_arguments_are_the_known_ones() -> None:
    names = list(inspect.signature(compute_local_shape_and_global_offset).parameters)
    assert names[:3] == ["global_shape", "mesh", "placements"]


@pytest.fixture
def compiler() -> Iterator[None]:
    """The compiler's settings are put back."""
    limits = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with dynamo.patch({name: getattr(dynamo, name) for name in limits}), inductor.patch(deterministic=False):
        yield


def test_a_function_that_is_compiled_too_often_fails(compiler: None) -> None:
    limit_recompiles(2)
    compiled = torch.compile(lambda values: values + 1, dynamic=False, backend="eager")
    for length in (2, 3):
        compiled(torch.ones(length))
    with pytest.raises(FailOnRecompileLimitHit):
        compiled(torch.ones(4))


def test_kernels_are_not_chosen_by_the_clock_where_bits_count(compiler: None) -> None:
    limit_recompiles(4096)
    assert not inductor.deterministic
    torch.use_deterministic_algorithms(True)
    try:
        inductor.deterministic = False  # some releases of torch set it with the above, others do not
        limit_recompiles(4096)
        assert inductor.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
