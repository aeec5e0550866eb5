"""Where and why a drill's copies differ, on real processes without Ray: half a minute."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.drills.comparison import DifferenceCause
from outlast.cluster.drills.drill import DrillReport, FaultKind, RunCopy, drill_copies
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.worker_group import run_group, tiny_config

MODELS = """
import os
from types import SimpleNamespace

import torch
from torch import nn

def entropy():
    return int.from_bytes(os.urandom(4), "big")

class Exact(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)) * self.scale())

    def scale(self):
        return 1.0

class Random(Exact):
    def scale(self):
        return 1 + entropy() / 2**36

class RandomLater(Exact):
    _calls = 0

    def scale(self):
        self._calls += 1
        return 1.0 if self._calls < 16 else 1 + entropy() / 2**36

class Growing(Exact):
    _calls = 0

    def scale(self):
        self._calls += 1
        return 1 + self._calls / 1000

class Unseeded(Exact):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        with torch.no_grad():
            self.head.bias.normal_(generator=torch.Generator().manual_seed(entropy()))
"""
STEPS = 8


class GroupCopy(RunCopy):
    """A copy that runs without Ray: as Ray does, it starts a group again that has ended early."""

    def launch(self, faults: Any = (), tell: Any = None) -> Outcome:
        storage = open_storage(self.store.storage.url)
        prepared = prepare(self.config, storage)
        for _ in range(2):
            assignment = Assignment(
                self.config, self.declared, secrets.token_hex(3), prepared, code=self.code, faults=tuple(faults)
            )
            ended = run_group(assignment, storage, 1)[0]
            if ended.outcome is not None:
                return ended.outcome
        raise AssertionError(ended.error)


@pytest.fixture
def drilled(tmp_path: Path, text_file: str) -> Callable[[str], DrillReport]:
    """Drills a run of one of the models above, with a killed worker."""
    (tmp_path / "drilled_models.py").write_text(MODELS)

    def new_copy(model: str, suffix: str, at: int = 0) -> RunCopy:
        sections = {
            "model": {"class": f"drilled_models:{model}", "config": {}},
            "checkpoint": {"every": STEPS // 4},
            "data": {"eval": None},
        }
        tiny = tiny_config(
            suffix, str(tmp_path / "runs"), text_file, sections=sections, steps=STEPS, micro_batch=4, eval_every=None
        )
        body = tiny.model_dump(mode="json", exclude_defaults=True)
        return GroupCopy(RunConfig.model_validate(body), body, at, str(tmp_path))

    return lambda model: drill_copies(lambda *rest: new_copy(model, *rest), [FaultKind.KILL], STEPS)


def test_a_forward_pass_that_is_not_deterministic(drilled: Callable[[str], DrillReport]) -> None:
    report = drilled("Random")
    found = report.findings[0]
    assert (found.cause, found.error) == (DifferenceCause.NOT_DETERMINISTIC, "")
    assert found.first is not None
    assert found.first.step == 1
    assert found.first.before_fault
    assert (found.first.checkpoint, found.first.tensor) == (4, "embed.weight"), "the oldest that retention has left"
    assert found.first.largest is not None
    assert 0 < found.first.largest < 0.1
    assert "The model is built the same each time" in report.explanation
    assert not report.is_good


def test_a_forward_pass_that_is_not_deterministic_after_the_fault(drilled: Callable[[str], DrillReport]) -> None:
    """Only the repeated copy tells it from a resume that changes numbers."""
    report = drilled("RandomLater")
    found = report.findings[0]
    assert found.first is not None
    assert found.first.step == 8
    assert not found.first.before_fault
    assert found.cause == DifferenceCause.NOT_DETERMINISTIC


def test_state_that_no_checkpoint_holds(drilled: Callable[[str], DrillReport]) -> None:
    report = drilled("Growing")
    found = report.findings[0]
    assert (found.cause, found.error, found.resumed_from) == (DifferenceCause.RESUME, "", 4)
    assert found.first is not None
    assert (found.first.step, found.first.checkpoint, found.first.tensor) == (5, 6, "embed.weight")
    assert not found.first.before_fault
    assert "repeated and gave the same bits" in report.explanation


def test_a_model_that_is_not_built_from_the_seed(drilled: Callable[[str], DrillReport]) -> None:
    report = drilled("Unseeded")
    found = report.findings[0]
    assert found.cause == DifferenceCause.NOT_DETERMINISTIC
    assert found.first is not None
    assert found.first.step == 1
    assert "1 tensor of two new models differ, first head.bias" in report.explanation
