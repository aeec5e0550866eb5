"""Checks of an attempt's model: all ranks must have built the same one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from tests.support.groups.worker_group import run_group

OWN_MODEL = """
import torch
from torch import nn
from transformers import GPT2LMHeadModel


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class Ordered(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        for name in sorted(("alpha", "beta"), reverse=bool(rank())):
            self.add_module(name, nn.Linear(4, 4, bias=False))


class Frozen(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.ln_f.bias.requires_grad_(not rank())


class Larger(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.ParameterList(torch.zeros(3) for _ in range(rank()))
"""


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        ("Ordered", "is alpha.weight [4, 4] on rank 0, and beta.weight [4, 4] on rank 1"),
        ("Frozen", "is transformer.ln_f.bias [32] on rank 0, and transformer.ln_f.bias [32], not trained on rank 1"),
        ("Larger", "is none on rank 0, and more.0 [3] on rank 1"),
    ],
)
def test_ranks_that_build_different_models_are_refused(
    kind: str,
    difference: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients are added by position: they would be mixed silently."""
    (tmp_path / "differing_models.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    sections = {"model": {"class": f"differing_models:{kind}", "config": config}}
    ended = run_group(assign(f"ranks-{kind}", sections=sections), storage, 2)
    for item in ended:
        assert isinstance(item.error, ConfigError)
        assert "the ranks build different models: parameter" in item.error.message
        assert difference in item.error.message
