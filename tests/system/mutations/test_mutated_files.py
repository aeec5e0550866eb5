"""Small files of every type are changed at random: each ends in the samples of an independent reader, or in an error
that names file and place; never in an unexpected exception, a crash or a hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.system.mutations.isolated import count_endings, process_with
from tests.system.mutations.targets import DATA, TARGETS, Workshop

FEW, MANY = range(30), range(30, 750)  # of each type: 10,500 in all


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process of its own: a file may end the one that reads it."""
    with process_with(Workshop, tmp_path_factory.mktemp("workshop")) as pool:
        yield pool


@pytest.mark.parametrize(
    "seeds", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.faults)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_mutated_file_is_read_right_or_named(
    target: str, seeds: range, process: ProcessPoolExecutor, cover: Callable[..., None]
) -> None:
    counts = count_endings(process, target, seeds)
    for kind, count in counts.items():
        cover("mutated files", kind, target, count)
    if target in DATA and target != "txt":
        assert counts["same samples"], "some mutations leave a file that can be read"
