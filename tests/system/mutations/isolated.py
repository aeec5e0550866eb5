"""A process in which files are mutated and read: one of them may end it, or ask for memory without end."""

from __future__ import annotations

import multiprocessing
import resource
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LIMIT_S, MEMORY = 600.0, 8 * 2**30


@dataclass(frozen=True)
class Ending:
    """How outlast ended with a mutated file.

    Attributes:
        kind: Such as `same samples`, `refused`, or `accepted` where nothing else can compare.
        fault: What is wrong with the ending; empty for a right one.
    """

    kind: str
    fault: str = ""


class Workshop(Protocol):
    """Mutates files of some kinds, each mutation a function of its seed."""

    def run(self, target: str, seed: int) -> Ending: ...


_workshop: Workshop | None = None


def process_with(make: Callable[[Path], Workshop], folder: Path) -> ProcessPoolExecutor:
    """Start the process; `make` builds the workshop there, in this folder."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_open, initargs=(make, folder))


def _open(make: Callable[[Path], Workshop], folder: Path) -> None:
    global _workshop
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # a file that asks for more must not get it
    _workshop = make(folder)


def _run(target: str, seed: int) -> tuple[str, str]:
    assert _workshop is not None
    ending = _workshop.run(target, seed)
    return ending.kind, ending.fault


def count_endings(process: ProcessPoolExecutor, target: str, seeds: Iterable[int]) -> Counter[str]:
    """Run mutations of a target, and count how they end. Fails at the first wrong end, and names its seed."""
    counts = Counter[str]()
    for seed in seeds:
        kind, fault = process.submit(_run, target, seed).result(timeout=LIMIT_S)
        assert not fault, f"mutation {seed} of {target}: {kind}: {fault}"
        counts[kind] += 1
    return counts
