"""Files that are read from a storage are changed at random: their bytes, or their content under digests that fit.

Each verb that reads it ends in an error that names the file, in damage told, or in an answer; never in an unexpected
exception, a hang, or memory without end. Where digests do not fit, only what was saved is restored and exported. What
outlast's reader of safetensors accepts, the library reads alike.

To repeat a mutation: `StoredWorkshop(folder).run(target, seed)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.system.mutations.forgeries import EXTREMES, TARGETS
from tests.system.mutations.isolated import count_endings, process_with
from tests.system.mutations.stored_files import StoredWorkshop

FEW, NUM_PARTS, PART = range(12), 4, 209  # of each of 24 kinds: 20,352 in all
MANY = [range(FEW.stop + part * PART, FEW.stop + (part + 1) * PART) for part in range(NUM_PARTS)]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process of its own: a file may end the one that reads it."""
    with process_with(StoredWorkshop, tmp_path_factory.mktemp("workshop")) as pool:
        yield pool


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(FEW, id="few"),
        *(pytest.param(seeds, id=f"many-{seeds.start}", marks=pytest.mark.faults) for seeds in MANY),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_mutated_file_ends_no_verb_unexpectedly(
    target: str, seeds: range, process: ProcessPoolExecutor, cover: Callable[..., None]
) -> None:
    for kind, count in count_endings(process, target, seeds).items():
        cover("mutated files of a storage", kind, target, count)


@pytest.mark.parametrize("target", TARGETS)
def test_an_extreme_file_takes_neither_memory_nor_time(target: str, process: ProcessPoolExecutor) -> None:
    """A gigabyte in one line (of a sparse file), a million brackets, no byte at all."""
    count_endings(process, target, EXTREMES)
