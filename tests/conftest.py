"""Fixtures for the whole suite."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from outlast.checkpointing.faults import Fault
from outlast.checkpointing.storage import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.data import prepare

from tests.group import tiny_config


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
    """Makes the assignment of a tiny run: `assign(name, faults=…, launch=…, **train settings)`."""

    def make(name: str, *, faults: tuple[Fault, ...] = (), launch: str = "first", **train: Any) -> Assignment:
        config = tiny_config(name, storage.url, text_file, **train)
        declared = config.model_dump(mode="json", exclude_defaults=True)
        return Assignment(config, declared, launch, prepare(config, storage), faults=faults)

    return make
