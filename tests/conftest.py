"""Fixtures for the whole suite."""

from __future__ import annotations

import os
import pydoc_data.topics
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}  # for the Ray clusters of tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from outlast.checkpointing.fault_injection import FaultSpec
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.worker_group import digests, losses, run_group, tiny_config

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it, for our processes too
settings.register_profile("fast", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("fast")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real English text: 40 pages of Python's own help."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    pages = sorted(pydoc_data.topics.topics.items())[:40]
    path.write_text("\n".join(" ".join(page.split()) for _, page in pages))
    return str(path)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> LocalStorage:
    """One storage for all tiny runs, so that their data is prepared once. Each test names its own run."""
    return LocalStorage(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def assign(storage: LocalStorage, text_file: str) -> Callable[..., Assignment]:
    """Makes the assignment of a tiny run: `assign(name, faults=…, launch=…, sections=…, **train settings)`."""

    def make(
        name: str,
        *,
        faults: tuple[FaultSpec, ...] = (),
        launch: str = "first",
        sections: Mapping[str, Any] | None = None,
        **train: Any,
    ) -> Assignment:
        config = tiny_config(name, storage.url, text_file, sections=sections, **train)
        declared = config.model_dump(mode="json", exclude_defaults=True)
        return Assignment(config, declared, launch, prepare(config, storage), faults=faults)

    return make


@pytest.fixture(scope="session")
def docs_block() -> Callable[[str], str]:
    """`docs_block(page)`: the Python block of a page in docs/ that names the test which runs it."""

    def block(page: str) -> str:
        text = (Path(__file__).parents[1] / "docs" / page).read_text()
        return text.split("```python tests/")[1].split("\n", 1)[1].split("```")[0]

    return block


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the ranks of a test: with more threads, experts add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cover(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`cover(what, kind, place)`: one case of a fault matrix has passed; the table is printed at the end."""

    def note(what: str, kind: str, place: str, count: int = 1) -> None:
        record_property("covered", (what, kind, place, count))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints kinds × places of the fault matrices that ran, with counts."""
    covered: dict[str, Counter[tuple[str, str]]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "covered":
                what, kind, place, count = value
                covered.setdefault(what, Counter())[kind, place] += count
    for what, counts in sorted(covered.items()):
        kinds = list(dict.fromkeys(kind for kind, _ in sorted(counts)))
        places = list(dict.fromkeys(place for _, place in sorted(counts)))
        terminalreporter.section(f"{what}: {counts.total():,} cases")
        terminalreporter.write_line("| | " + " | ".join(kinds) + " |")
        terminalreporter.write_line("|---" * (len(kinds) + 1) + "|")
        for place in places:
            cells = " | ".join(str(counts[kind, place] or "") for kind in kinds)
            terminalreporter.write_line(f"| {place} | {cells} |")


@dataclass(frozen=True)
class Reference:
    """What a run ended with that nothing ever happened to."""

    run: str
    digests: dict[str, str]
    losses: dict[int, float]


@pytest.fixture(scope="session")
def reference(storage: LocalStorage, assign: Callable[..., Assignment]) -> Callable[[int], Reference]:
    """`reference(size)`: the uninterrupted tiny run on that many ranks, made once."""

    @cache
    def make(size: int) -> Reference:
        run = f"reference-{size}"
        ended = run_group(assign(run), storage, size)
        assert [item.outcome for item in ended] == [Outcome.DONE] * size
        return Reference(run, digests(storage, run), losses(storage, run))

    return make
