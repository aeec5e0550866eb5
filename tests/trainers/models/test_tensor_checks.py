"""Tensors that no checkpoint can hold are refused before any worker is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.model_checks import check_model

OWN_MODELS = """
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.more(width)


class Lazy(Base):
    def more(self, width):
        self.inner = nn.LazyLinear(width)


class Sparse(Base):
    def more(self, width):
        self.register_buffer("graph", torch.sparse_coo_tensor([[0], [1]], [1.0], (2, 2)), persistent=False)


class Extra(Base):
    def more(self, width):
        self.inner = Counter()


class Counter(nn.Module):
    def get_extra_state(self):
        return {"count": 1}

    def set_extra_state(self, state):
        pass


class Anew(Base):
    def more(self, width):
        self.count = 1

    def get_extra_state(self):
        return torch.tensor(self.count)


class Complex(Base):
    def more(self, width):
        self.inner = nn.Parameter(torch.ones(width, dtype=torch.complex64))


class Unsigned(Base):
    def more(self, width):
        self.register_buffer("count", torch.ones(2, dtype=torch.uint16))


class Usual(Base):
    def more(self, width):
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))
        self.register_buffer("turns", torch.ones(2, dtype=torch.complex64), persistent=False)
        self.register_buffer("absent", None)
        self.inner, self.own = nn.utils.parametrizations.weight_norm(nn.Linear(width, width)), torch.ones(3)

    def get_extra_state(self):
        return self.own
"""


@pytest.fixture
def check(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    (tmp_path / "odd_tensors.py").write_text(OWN_MODELS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(kind: str) -> None:
        given = assign(f"tensors-{kind}", sections={"model": {"class": f"odd_tensors:{kind}", "config": {"width": 8}}})
        check_model(given.config, given.prepared, storage)

    return run


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Lazy", "inner.weight of Lazy gets its shape in the first forward pass only"),
        ("Sparse", "graph of Sparse is not a dense tensor: sparse_coo"),
        ("Extra", "the state of Extra has inner._extra_state, which is neither a parameter nor a buffer"),
        ("Anew", "the state of Anew has _extra_state, which is neither a parameter nor a buffer"),
        ("Complex", "inner of Complex is complex64, which safetensors files do not hold"),
        ("Unsigned", "count of Unsigned is uint16, which safetensors files do not hold"),
    ],
)
def test_tensors_that_no_checkpoint_holds(kind: str, message: str, check: Callable[[str], None]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(kind)
    assert caught.value.hint


def test_usual_tensors(check: Callable[[str], None]) -> None:
    check("Usual")
