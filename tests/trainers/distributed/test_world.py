"""The outputs of a user's model under DDP: it must find their tensors, and the user's code must find its own class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.distributed.world import _show_tensors
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import run_group

LOGITS = torch.ones(2, 3)


class Frozen:
    """Slots, no way to set them, and a constructor with arguments."""

    __slots__ = ("logits", "unset")
    logits: torch.Tensor

    def __new__(cls, logits: torch.Tensor) -> Frozen:
        made = object.__new__(cls)
        object.__setattr__(made, "logits", logits)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    @property
    def best(self) -> torch.Tensor:
        return self.logits.argmax(-1)


class Plain:
    """Names of dict's methods, a default that dataclasses refuse, equality of its own."""

    items: ClassVar[Any] = []
    values: Any = None

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.__dict__["items"] = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and bool((self.values == other.values).all())

    def __hash__(self) -> int:
        return 7

    @cached_property
    def best(self) -> torch.Tensor:
        return self.values.argmax(-1)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (SimpleNamespace(keys=LOGITS, values=LOGITS, copy=None, pop=1), ["keys", "values", "copy", "pop"]),
        (Frozen(LOGITS), ["logits"]),
        (Plain(LOGITS), ["items", "values"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_of_a_class_keep_it(outputs: Any, names: list[str]) -> None:
    shown = _show_tensors(nn.Identity(), (), outputs)
    assert sorted(item.name for item in fields(shown)) == sorted(names), "what DDP looks through"
    assert isinstance(shown, type(outputs))
    for name in names:
        assert getattr(shown, name) is getattr(outputs, name)
    assert shown == outputs or isinstance(outputs, Frozen)
    if hasattr(outputs, "best"):
        assert shown.best.tolist() == [0, 0]
    assert not hasattr(shown, "unset")


def test_each_class_is_derived_once() -> None:
    shown = [_show_tensors(nn.Identity(), (), Plain(LOGITS)) for _ in range(2)]
    assert type(shown[0]) is type(shown[1])


@pytest.mark.parametrize("outputs", [None, LOGITS, (LOGITS,), {"logits": LOGITS}, object()], ids=str)
def test_other_outputs_are_left_alone(outputs: Any) -> None:
    assert _show_tensors(nn.Identity(), (), outputs) is outputs


class Final:
    def __init__(self) -> None:
        self.logits = LOGITS

    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


def test_outputs_that_ddp_cannot_look_into() -> None:
    with pytest.raises(ConfigError, match="DDP cannot find the tensors in outputs of type Final: Final is final"):
        _show_tensors(nn.Identity(), (), Final())


OWN = """
from torch import nn
from outlast.trainers.tasks.causal_lm import CausalLM


class Scores:
    def __init__(self, values):
        self.values = values

    @property
    def logits(self):
        return self.values


class Bigrams(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.spare = nn.Linear(2, 2)

    def forward(self, input_ids, **_):
        return Scores(self.head(self.embed(input_ids)))


class Checked(CausalLM):
    def loss(self, outputs, batch):
        assert isinstance(outputs, Scores), type(outputs)
        return super().loss(outputs, batch)
"""


def test_a_model_with_outputs_of_its_own_trains_on_two_ranks(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_outputs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = {"class": "own_outputs:Bigrams", "config": {"width": 16}, "task": "own_outputs:Checked"}
    assignment = assign("own-outputs", sections={"model": model}, steps=2)
    object.__setattr__(assignment, "code", str(tmp_path))
    ended = run_group(assignment, storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2, ended[0].error
