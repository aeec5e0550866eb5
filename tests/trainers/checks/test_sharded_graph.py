"""What ranks that shard a model, or add gradients as DDP does, must have in common is checked before they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.dry_step import DryStep, dry_step
from outlast.trainers.checks.model_checks import check_model
from outlast.trainers.config.train import Parallel
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import losses, run_group, with_parallel

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SWITCH = {"model_type": "switch_transformers", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SWITCH |= {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
FLAUBERT = {"model_type": "flaubert", "emb_dim": 32, "n_layers": 2, "n_heads": 4, "layerdrop": 0.5}
SQUEEZEBERT = {"model_type": "squeezebert", **BERT, "embedding_size": 32}
#: Bodies of a constructor and of `forward`, between the embedding `h` and the head.
OWN = {
    "Plain": ("", "for block in self.blocks: h = h + block(h)"),
    "Scalar": ("self.scale = nn.Parameter(torch.tensor(1.0))", "h = h * self.scale"),
    "Mixed": ("self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))", "h = (h * self.scale).float()"),
    "Branching": ("", "h = h + self.blocks[int(input_ids.sum()) % 3](h)"),
    "BranchingLater": (
        "self.calls = 0",
        "self.calls += 1\n        h = h + self.blocks[int(input_ids.sum()) % 3 if self.calls > 12 else 0](h)",
    ),
    "Direct": ("", "h = h + self.blocks[0].forward(h)"),
    # Outputs that hold the model itself, and a weight as it is: no cycle to follow, and no way beside them.
    "Holding": ("", "for block in self.blocks: h = h + block(h)\n        self.holds_itself = True"),
    "Beside": ("self.gate = nn.Linear(width, 2)", "self.extra = self.gate(h).logsumexp(-1).pow(2).sum()"),
    "NestedBranching": (
        "",
        "\n        for i, block in enumerate(self.blocks):\n"
        "            if i == 0 or (int(input_ids.sum()) + i) % 2:\n"
        "                h = h + checkpoint(block, h, use_reentrant=True)",
    ),
}
HEAD = """
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.tasks.causal_lm import CausalLM


class WithDecay(CausalLM):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) + outputs.weight.pow(2).sum()


class WithExtra(CausalLM):
    def loss_sum(self, model, batch):
        return super().loss_sum(model, batch) + unwrap(model).extra
"""
CLASS = """

class {name}(nn.Module):
    def __init__(self, vocab_size, width=16):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        {constructor}

    def forward(self, input_ids, **_):
        h = self.embed(input_ids)
        {forward}
        more = {{"model": self, "weight": self.head.weight}} if hasattr(self, "holds_itself") else {{}}
        return SimpleNamespace(logits=self.head(h), **more)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """The settings of a model class of the user."""
    classes = [CLASS.format(name=name, constructor=made, forward=run) for name, (made, run) in OWN.items()]
    (tmp_path / "branching_models.py").write_text(HEAD + "".join(classes))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name: {"class": f"branching_models:{name}", "config": {"width": 16}}


def tried(assignment: Assignment, storage: LocalStorage) -> DryStep:
    meta = check_model(assignment.config, assignment.prepared, storage)[0]
    return dry_step(assignment.config, assignment.prepared, storage, meta, num_workers=2, on_gpu=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Scalar", "Scalar: scale has no dimension"),
        ("Mixed", "a block of it has weights of the types float32, float64"),
        ("Branching", "the micro-batches of a step use different blocks or parameters, such as blocks"),
        ("Direct", "blocks.0 cannot be sharded: the model calls its `forward` instead of the module itself"),
    ],
)
def test_a_model_of_the_user_that_cannot_be_sharded(
    name: str,
    message: str,
    own: Callable[[str], dict[str, Any]],
    assign: Callable[..., Assignment],
    storage: LocalStorage,
) -> None:
    assignment = assign(name, sections={"model": own(name)}, batch=8, micro_batch=1)
    with pytest.raises(ConfigError, match=message) as caught:
        tried(with_parallel(assignment, Parallel.FSDP), storage)
    assert "scale.parallel=ddp" in str(caught.value.hint)
    assert not tried(assignment, storage).skipped, "it is right under DDP"


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (SWITCH, "seq2seq-lm", "experts are modules of their own"),
        (FLAUBERT, "masked-lm", "leaves layers out at random"),
        (SQUEEZEBERT, "masked-lm", "the model calls its `forward` instead of the module itself"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_an_architecture_that_cannot_be_sharded(
    config: dict[str, Any],
    task: str,
    message: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one two", "source": "one two", "target": "three four"}\n' * 40)
    sections = {"model": {"config": config, "task": task}, "data": {"train": str(tmp_path / "rows.jsonl")}}
    assignment = assign("sharded", sections=sections)
    with pytest.raises(ConfigError, match=message):
        tried(with_parallel(assignment, Parallel.FSDP), storage)


def test_ranks_that_run_other_blocks_stop_before_the_weights_change(
    own: Callable[[str], dict[str, Any]], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """No dry step can foresee it; the parts of the model have the same size, so nothing else notices it."""
    assignment = with_parallel(
        assign("later", sections={"model": own("BranchingLater")}, batch=4, micro_batch=1, steps=20), Parallel.FSDP
    )
    ended = run_group(assignment, storage, 2)
    assert [type(item.error) for item in ended] == [ConfigError] * 2, ended
    assert "the ranks ran different blocks of the sharded model" in str(ended[0].error)
    plain = with_parallel(assign("plain", sections={"model": own("Plain")}, batch=4, micro_batch=1), Parallel.FSDP)
    assert [item.outcome for item in run_group(plain, storage, 2)] == [Outcome.DONE] * 2
    assert len(losses(storage, "later")) < 20


def test_a_loss_beside_the_outputs(
    own: Callable[[str], dict[str, Any]], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """DDP would take the gate for unused, and fail at its gradient."""
    model = {**own("Beside"), "task": "branching_models:WithExtra"}
    with pytest.raises(ConfigError, match=r"depends on gate\.\w+ by another way than the outputs of Beside"):
        tried(assign("beside", sections={"model": model}), storage)
    elastic = assign("beside", sections={"model": model, "exactness": "elastic"})
    assert not tried(elastic, storage).skipped
    assert [item.outcome for item in run_group(elastic, storage, 2)] == [Outcome.DONE] * 2


def test_outputs_that_hold_the_model_and_a_weight(
    own: Callable[[str], dict[str, Any]], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    assignment = assign("holding", sections={"model": {**own("Holding"), "task": "branching_models:WithDecay"}})
    assert not tried(assignment, storage).skipped
    assert [item.outcome for item in run_group(assignment, storage, 2)] == [Outcome.DONE] * 2


def test_reentrant_checkpoints_of_a_graph_that_varies(
    own: Callable[[str], dict[str, Any]], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    sections = {"model": own("NestedBranching")}
    with pytest.raises(ConfigError, match="micro-batches give gradients to different parameters"):
        tried(assign("nested", sections=sections, batch=8, micro_batch=1), storage)
    elastic = assign("nested", sections={**sections, "exactness": "elastic"}, batch=8, micro_batch=1)
    assert not tried(elastic, storage).skipped
