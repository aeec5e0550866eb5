"""Prepared data of a stranger, under digests that fit: prepared again, or damage, never a failure within a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import DamagedError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.preparation.prepare import Prepared, prepare
from tests.support.forged import forge_data
from tests.support.groups.worker_group import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(60)))
    return tiny_config("run", str(tmp_path / "runs"), str(tmp_path / "text.txt"))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "runs")


@pytest.fixture
def made(config: TrainingConfig, storage: LocalStorage) -> Prepared:
    return prepare(config, storage)


@pytest.mark.parametrize(
    "change",
    [{"num_samples": {}}, {"num_samples": None}, {"num_tokens": [1]}, {"notes": 1}, {"files": {}}, {"facts": []}],
    ids=lambda change: next(iter(change)),
)
def test_values_of_wrong_types_are_no_data(
    change: dict[str, Any], made: Prepared, config: TrainingConfig, storage: LocalStorage
) -> None:
    forge_data(storage.path(made.directory), lambda body: body.update(change))
    assert prepare(config, storage) == made


def test_data_of_an_earlier_release_is_reused(made: Prepared, config: TrainingConfig, storage: LocalStorage) -> None:
    """It has no counts of cut and empty rows."""

    def change(body: dict[str, Any]) -> None:
        for name in ("longest", "num_cut", "num_empty"):
            del body[name]

    forge_data(storage.path(made.directory), change)
    found = prepare(config, storage)
    assert (found.longest, found.num_cut, found.num_empty) == ({}, {}, {})
    assert found.files == made.files


def test_another_number_of_samples_is_damage(made: Prepared, config: TrainingConfig, storage: LocalStorage) -> None:
    forge_data(storage.path(made.directory), lambda body: body.update(num_samples=10**6))
    found = prepare(config, storage)
    with pytest.raises(DamagedError, match=r"train.arrow: \d+ samples instead of 1000000"):
        found.split(storage, "train")
    assert len(found.split(storage, "eval")) == made.num_eval_samples


def test_data_without_its_tokenizer_is_damage(made: Prepared, storage: LocalStorage) -> None:
    kept = tuple(entry for entry in made.files if not entry.path.endswith("tokenizer.json"))
    with pytest.raises(DamagedError, match=f"{made.directory}/tokenizer'"):
        replace(made, files=kept).tokenizer(storage)
