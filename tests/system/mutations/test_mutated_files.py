"""Small files of every type are changed at random: each ends in the samples of an independent reader, or in an error
that names file and place; never in an unexpected exception, a crash or a hang.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.system.mutations.targets import DATA, TARGETS, Workshop

FEW, MANY = range(30), range(30, 750)  # of each type: 10,500 in all
LIMIT_S, MEMORY = 600.0, 8 * 2**30
_workshop: Workshop | None = None


def _open_workshop(folder: str) -> None:
    global _workshop
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # a file that asks for more must not get it
    _workshop = Workshop(Path(folder))


def _run(target: str, seed: int) -> tuple[str, str]:
    assert _workshop is not None
    ending = _workshop.run(target, seed)
    return ending.kind, ending.fault


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process of its own: a file may end the one that reads it."""
    folder = str(tmp_path_factory.mktemp("workshop"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_open_workshop, initargs=(folder,)) as pool:
        yield pool


@pytest.mark.parametrize(
    "seeds", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.faults)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_mutated_file_is_read_right_or_named(
    target: str, seeds: range, process: ProcessPoolExecutor, cover: Callable[..., None]
) -> None:
    counts = Counter[str]()
    for seed in seeds:
        kind, fault = process.submit(_run, target, seed).result(timeout=LIMIT_S)
        assert not fault, f"mutation {seed} of {target}: {kind}: {fault}"
        counts[kind] += 1
    for kind, count in counts.items():
        cover("mutated files", kind, target, count)
    if target in DATA and target != "txt":
        assert counts["same samples"], "some mutations leave a file that can be read"
