"""The common architectures: trained on two ranks, saved, resumed, and loaded by the plain Auto class, to the last bit.

About 30 s; the killed runs of `-m faults` two minutes more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.state.named_weights import named_weights
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.config.train import Exactness, Parallel
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model, weight_naming
from outlast.trainers.models.weight_names import file_naming
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.checkpointing.state.test_shards import state_digests
from tests.support.groups.ranks import on_ranks
from tests.support.groups.worker_group import digests, fault, losses, newest, run_group, with_parallel

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
OLD_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
BART = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
#: By model type: the head's Auto class, and settings that make it tiny.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("MaskedLM", COMMON),
    "roberta": ("TokenClassification", COMMON),
    "distilbert": ("QuestionAnswering", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "electra": ("SequenceClassification", {**COMMON, "embedding_size": 16}),
    "openai-gpt": ("CausalLM", OLD_GPT),
    "gpt2": ("CausalLM", OLD_GPT),
    "gpt_neo": (
        "CausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("CausalLM", COMMON),
    "llama": ("CausalLM", GROUPED),
    "mistral": ("CausalLM", GROUPED),
    "mixtral": ("CausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen2": ("CausalLM", GROUPED),
    "qwen3_moe": ("CausalLM", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gemma": ("CausalLM", {**GROUPED, "head_dim": 8}),
    "phi": ("CausalLM", COMMON),
    "opt": (
        "CausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "falcon": ("CausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "t5": (
        "Seq2SeqLM",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": ("Seq2SeqLM", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, **BART}),
}


def settings(kind: str, config: Mapping[str, Any]) -> ModelSettings:
    return ModelSettings.model_validate({"config": {"model_type": kind, **config}, "tokenizer": {"train_bpe": 300}})


def new_model(kind: str, *, fresh: bool = True) -> tuple[nn.Module, dict[str, bytes]]:
    head, config = ARCHITECTURES[kind]
    tokenizer = train_bpe(iter(["the same text"]), 300)
    task: Any = type("Head", (CausalLM,), {"auto_class": f"AutoModelFor{head}"})
    return build_model(settings(kind, config), task(DataSettings(train="-"), tokenizer, {}), tokenizer, 7, fresh=fresh)


def logits(model: Any, kind: str) -> torch.Tensor:
    tokens = torch.arange(20).reshape(2, 10) + 5
    decoder = {"decoder_input_ids": tokens[:, :6]} if ARCHITECTURES[kind][0] == "Seq2SeqLM" else {}
    outputs = model(input_ids=tokens, **decoder)
    found: torch.Tensor = (
        torch.stack([outputs.start_logits, outputs.end_logits]) if "start_logits" in outputs else outputs.logits
    )
    return found.float()


def train(folder: str, run: str, num_steps: int) -> dict[str, dict[str, str]]:
    """Trains every architecture to `num_steps`, from where its last checkpoint is. Returns digests of the states."""
    found = {}
    for kind in ARCHITECTURES:
        model, files = new_model(kind, fresh=not (Path(folder) / f"{run}-{kind}").exists())
        naming, world = weight_naming(model), World()
        saver = Checkpointer(LocalStorage(Path(folder)), f"{run}-{kind}", ranks=world, naming=naming, files=files)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = saver.resume(model, optimizer)
        wrapped = world.parallelize(model, Exactness.SAME_WORLD)
        for step in range(state["step"] if state else 0, num_steps):
            seed_everything(step, world.rank)
            optimizer.zero_grad()
            scores = logits(wrapped, kind).flatten(0, -2)
            functional.cross_entropy(scores, torch.randint(scores.shape[-1], scores.shape[:1])).backward()
            optimizer.step()
        assert saver.async_save(num_steps, model, optimizer, {"step": num_steps})
        assert saver.wait()
        found[kind] = state_digests(model, optimizer)
        if world.rank == 0:
            with torch.no_grad():
                torch.save(logits(model.eval(), kind), Path(folder) / f"{run}-{kind}.pt")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, trained for 2 steps at once, and one at a time by other processes."""
    folder = tmp_path_factory.mktemp("architectures")
    whole = on_ranks(2, train, str(folder), "whole", 2)
    on_ranks(2, train, str(folder), "twice", 1)
    twice = on_ranks(2, train, str(folder), "twice", 2)
    (folder / "states.json").write_text(json.dumps([*whole, *twice]))
    return folder


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_resumed_and_loaded_to_the_last_bit(kind: str, trained: Path, one_thread: None) -> None:
    states = [item[kind] for item in json.loads((trained / "states.json").read_text())]
    assert all(state == states[0] for state in states), "on both ranks, in one go or in two"
    folder = next(trained.glob(f"whole-{kind}/attempts/*/checkpoint-2"))
    model, info = getattr(transformers, f"AutoModelFor{ARCHITECTURES[kind][0]}").from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), "every weight found its place"
    with torch.no_grad():
        assert torch.equal(logits(model.eval(), kind), torch.load(trained / f"whole-{kind}.pt"))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_files_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model: Any = new_model(kind)[0]
    model.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), named_weights(model, weight_naming(model))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_what_is_neither_renamed_nor_cut_is_refused() -> None:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    model: Any = new_model("gpt2")[0]
    model.config.model_type = "turned"
    turn = WeightConverter("wte.weight", "wte.weight", operations=[Transpose(0, 1)])
    register_checkpoint_conversion_mapping("turned", [turn])
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel hold transformer.wte.weight in a form that is not a slice"):
        file_naming(model)


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("mixtral", Parallel.DDP),
        ("mixtral", Parallel.FSDP),
        *(pytest.param(kind, Parallel.DDP, marks=pytest.mark.faults) for kind in ("openai-gpt", "llama", "gpt_neox")),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    kind: str, parallel: Parallel, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    config = {"model_type": kind, **ARCHITECTURES[kind][1]}
    sections = {"model": {"config": config}, "checkpoint": {"overlap": True}}
    run = f"{kind}-{parallel.value}"

    def make(name: str, **options: Any) -> Assignment:
        return with_parallel(assign(name, sections=sections, **options), parallel)

    assert run_group(make(run), storage, 2)[0].outcome is Outcome.DONE
    strike = fault(FaultPoint.WHILE_WRITING, 6, 0, FaultAction.SIGKILL, tmp_path)
    run_group(make(f"{run}-killed", faults=(strike,)), storage, 2)
    assert Path(strike.record).exists()
    again = run_group(make(f"{run}-killed", launch="second"), storage, 2)
    assert again[0].outcome is Outcome.DONE
    assert digests(storage, f"{run}-killed") == digests(storage, run)
    assert losses(storage, f"{run}-killed") == losses(storage, run)
    assert newest(storage, run).ref.step == 10
    [folder] = Path(storage.path(run)).glob("attempts/*/checkpoint-10")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), "every weight found its place"
    assert named_weights(model, weight_naming(model)).keys() == load_file(folder / "model.safetensors").keys()
