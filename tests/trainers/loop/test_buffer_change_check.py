"""Models whose buffers change in the forward pass, where the mode of training cannot restore them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Exactness, NonFinite
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.buffer_change_check import watch_buffers
from outlast.trainers.loop.non_finite import NonFiniteGuard
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import run_group

EXAMPLES = Path(__file__).parents[3] / "examples"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEACHER = """
from types import SimpleNamespace

import torch
from torch import nn

class Teacher(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.teacher, self.other = (nn.Linear(width, vocab_size).requires_grad_(False) for _ in range(2))

    def forward(self, input_ids, **_):
        if self.training:
            with torch.no_grad():
                self.other.weight.mul_(1)
                self.teacher.weight.lerp_(self.head.weight, 0.1)
        hidden = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(hidden) + self.teacher(hidden) + self.other(hidden))
"""
REMEMBERING = """
from recurrent import RecurrentLM

class Remembering(RecurrentLM):
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
"""


class Counts(nn.Module):
    """Writes to a saved buffer, to one that is not saved, or with the value that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.zeros(2))
        self.register_buffer("lost", torch.zeros(2), persistent=False)
        self.constant: torch.Tensor
        self.register_buffer("constant", torch.ones(2), persistent=False)

    def forward(self, name: str) -> None:
        if name == "constant":
            self.constant.copy_(torch.ones(2))
        elif name == "replaced":
            self.register_buffer("lost", torch.ones(2), persistent=False)
        elif name == "new":
            self.register_buffer("late", torch.ones(2), persistent=False)
        else:
            getattr(self, name).add_(1)


@pytest.mark.parametrize(
    ("exactness", "recomputes", "refused"),
    [
        (Exactness.FAST, False, []),
        (Exactness.FAST, True, ["saved"]),
        (Exactness.SAME_WORLD, False, ["lost", "replaced", "new"]),
        (Exactness.SAME_WORLD, True, ["saved", "lost", "replaced", "new"]),
        (Exactness.ELASTIC, False, ["saved", "lost", "replaced", "new"]),
    ],
)
def test_which_buffers_may_change(exactness: Exactness, recomputes: bool, refused: list[str]) -> None:
    found = []
    for name in ("constant", "saved", "lost", "replaced", "new"):
        model = Counts()
        watched = watch_buffers(model, exactness, recomputes=recomputes)
        model(name)
        try:
            for still in watched:
                still.check()
        except ConfigError:
            found.append(name)
    assert found == refused


@pytest.mark.parametrize(
    ("places", "rope_type", "refused"), [(8, "dynamic", True), (16, "dynamic", False), (16, "longrope", False)]
)
def test_frequencies_that_grow_with_the_longest_sequence_are_refused(
    places: int, rope_type: str, refused: bool, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """Samples have 16 tokens. longrope rewrites its frequencies in each pass with equal values."""
    rope: dict[str, Any] = {"rope_type": rope_type, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": places}
    config = {"model_type": "llama", **SIZES, "max_position_embeddings": places, "rope_parameters": rope}
    run = f"grows-{rope_type}-{places}"
    [ended] = run_group(assign(run, sections={"model": {"config": config}}, steps=2), storage, 1)
    if not refused:
        assert ended.outcome is Outcome.DONE
        return
    assert ended.error is not None
    assert "inv_freq changes in the forward pass; exactness: same-world" in ended.error.message


def test_a_memory_and_recomputed_activations_are_refused(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "remembering.py").write_text(REMEMBERING)
    config = {"width": 32, "num_heads": 2, "segment": 8, "memory": 8, "carry": True}
    model = {"class": "remembering:Remembering", "config": config}
    assignment = assign("remembers", sections={"model": model}, gradient_checkpointing=True)
    (tmp_path / "recurrent.py").symlink_to(EXAMPLES / "recurrent.py")
    [ended] = run_group(replace(assignment, code=str(tmp_path)), storage, 1)
    assert ended.error is not None
    assert "buffer memory changes in the forward pass; train.gradient_checkpointing" in ended.error.message


@pytest.mark.parametrize(("exactness", "size"), [("same-world", 1), ("same-world", 2), ("elastic", 1)])
def test_a_teacher_that_follows_its_student_needs_one_worker(
    exactness: str, size: int, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """Whether or not a dry step saw it."""
    (tmp_path / "teacher.py").write_text(TEACHER)
    sections = {"model": {"class": "teacher:Teacher", "config": {"width": 8}}, "exactness": exactness}
    assignment = replace(assign(f"teacher-{exactness}-{size}", sections=sections, steps=2), code=str(tmp_path))
    ended = run_group(assignment, storage, size)
    if (exactness, size) == ("same-world", 1):
        assert ended[0].outcome is Outcome.DONE
        return
    assert isinstance(ended[0].error, ConfigError)
    assert "parameter teacher.weight changes in the forward pass" in ended[0].error.message


def test_names_within_a_compiled_module() -> None:
    counts = Counts()
    model = nn.Sequential()
    model.inner = torch.compile(counts, backend="eager")  # type: ignore[assignment]
    [guard] = watch_buffers(model, Exactness.SAME_WORLD, recomputes=False)
    non_finite = NonFiniteGuard(NonFinite.SKIP, World(), model)
    non_finite.begin()
    counts("saved")
    guard.check()
    non_finite.undo()
    assert not counts.get_buffer("saved").any()
    counts("lost")
    with pytest.raises(ConfigError, match=r"buffer inner\.lost changes"):
        guard.check()
