"""What a forward pass may not do to parameters, on how many workers; and a resume that is played before the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.dry_step import DryStep, dry_step
from outlast.trainers.checks.model_checks import check_model

OWN_MODELS = """
from types import SimpleNamespace

import torch
from torch import nn
from transformers import GPT2LMHeadModel


class Base(nn.Module):
    def __init__(self, vocab_size, width=16):
        super().__init__()
        self.embed, self.middle = nn.Embedding(vocab_size, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("calls", torch.zeros(1))
        self.more(width)

    def more(self, width):
        pass

    def inner(self, hidden):
        return hidden

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.inner(self.middle(self.embed(input_ids)))))


class Teacher(Base):
    def more(self, width):
        self.teacher = nn.Linear(width, width).requires_grad_(False)

    def inner(self, hidden):
        if self.training:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.middle.weight, 0.1)
        return hidden + self.teacher(hidden)


class TeacherByData(Teacher):
    def inner(self, hidden):
        self.teacher.weight.data = self.teacher.weight.data * 0.9 + self.middle.weight.data * 0.1
        return hidden + self.teacher(hidden)


class MaxNorm(Base):
    def more(self, width):
        self.embed = nn.Embedding(self.embed.num_embeddings, width, max_norm=100.0)


class Made(Base):
    def inner(self, hidden):
        if "late" not in self._parameters:
            self.late = nn.Parameter(torch.zeros(hidden.shape[-1]))
        return hidden + self.late


class Replaced(Base):
    def inner(self, hidden):
        self.middle.weight = nn.Parameter(self.middle.weight.detach() * 1)
        return hidden


class LateBuffer(Base):
    def inner(self, hidden):
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(hidden.shape[-1]), persistent=False)
        return hidden * self.late


class Anchored(Base):
    anchor = None

    def inner(self, hidden):
        if self.anchor is None:
            self.anchor = self.middle.weight.detach().clone()
        return hidden * (1 + (self.middle.weight - self.anchor).pow(2).sum())


class Cached(Base):
    def more(self, width):
        self.tables = {}

    def inner(self, hidden):
        length = hidden.shape[1]
        if length not in self.tables:
            self.tables[length] = torch.arange(length)[:, None] / 10
        self.calls += 1
        return hidden * self.tables[length] + self.calls


class Compiled(Base):
    def more(self, width):
        self.norm = torch.compile(nn.BatchNorm1d(width), backend="eager")

    def inner(self, hidden):
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class AnchoredAtLoading(GPT2LMHeadModel):
    @classmethod
    def from_pretrained(cls, *given, **named):
        found = super().from_pretrained(*given, **named)
        model = found[0] if isinstance(found, tuple) else found
        model.anchor = model.transformer.wpe.weight.detach().clone()
        return found

    def forward(self, *given, **named):
        outputs = super().forward(*given, **named)
        if hasattr(self, "anchor"):
            outputs.logits = outputs.logits * (1 + (self.transformer.wpe.weight - self.anchor).pow(2).sum())
        return outputs
"""

Try = Callable[..., DryStep]


@pytest.fixture
def try_model(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Try:
    """Makes the dry step of a class above."""
    (tmp_path / "watched_models.py").write_text(OWN_MODELS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(kind: str, num_workers: int = 1, exactness: str = "same-world", **model: Any) -> DryStep:
        settings = {"class": f"watched_models:{kind}", "config": {"width": 16}, **model}
        given = assign(f"watched-{kind}", sections={"model": settings, "exactness": exactness}, micro_batch=2)
        meta = check_model(given.config, given.prepared, storage)[0]
        return dry_step(given.config, given.prepared, storage, meta, num_workers=num_workers, on_gpu=False)

    return run


@pytest.mark.parametrize(
    ("kind", "named"),
    [("Teacher", "teacher.weight"), ("TeacherByData", "teacher.weight"), ("MaxNorm", "embed.weight")],
)
def test_parameters_that_the_forward_pass_changes(kind: str, named: str, try_model: Try) -> None:
    assert not try_model(kind).skipped, "on one worker it is exact"
    for given in ({"num_workers": 2}, {"exactness": "elastic"}):
        with pytest.raises(ConfigError, match=f"forward pass of {kind} changes the parameter {named}; only on one"):
            try_model(kind, **given)


@pytest.mark.parametrize(("kind", "named"), [("Made", "late"), ("Replaced", "middle.weight")])
def test_parameters_that_the_forward_pass_makes(kind: str, named: str, try_model: Try) -> None:
    with pytest.raises(ConfigError, match=f"{kind} makes, replaces or deletes the parameter {named} in its forward"):
        try_model(kind)


def test_a_buffer_that_the_forward_pass_makes(try_model: Try) -> None:
    with pytest.raises(ConfigError, match="buffer late appears in the forward pass; exactness: same-world") as caught:
        try_model("LateBuffer")
    assert caught.value.hint == "register it in the constructor"


def test_an_attribute_of_the_first_forward_pass(try_model: Try) -> None:
    with pytest.raises(ConfigError, match="a resumed run would differ in the loss: Anchored, or its task, keeps"):
        try_model("Anchored")
    assert not try_model("Anchored", exactness="fast").skipped


def test_an_attribute_of_the_users_from_pretrained(try_model: Try, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="a resumed run would differ in the loss: AnchoredAtLoading"):
        try_model("AnchoredAtLoading", path=str(tmp_path / "base"), config=None)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within torch.compile
@pytest.mark.parametrize("kind", ["Base", "Cached", "Compiled"])
def test_what_a_resume_restores_or_computes_again(kind: str, try_model: Try) -> None:
    assert try_model(kind) == DryStep()
