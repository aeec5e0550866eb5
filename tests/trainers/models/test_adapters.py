"""Adapters of peft: saved in peft's layout by some number of ranks, loaded by another number, bit for bit the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.models.lora import adapter_files, adapter_naming
from tests.checkpointing.state.test_shards import state_digests
from tests.support.groups.ranks import on_ranks

NUMBERS = torch.arange(12).reshape(2, 6)
LORA = {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True}


def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def attach(folder: str, kind: str, launch: str) -> tuple[Any, torch.optim.Optimizer, Checkpointer]:
    model: Any = get_peft_model(base(), LoraConfig(**LORA, init_lora_weights=False))
    naming, files = adapter_naming(model), adapter_files(model)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=0.1)
    return model, optimizer, Checkpointer(LocalStorage(Path(folder)), "run", launch=launch, naming=naming, files=files)


def save(folder: str, kind: str) -> dict[str, str]:
    model, optimizer, saver = attach(folder, kind, "a")
    for number in range(2):
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(input_ids=NUMBERS, labels=NUMBERS).loss.backward()
        optimizer.step()
    assert saver.async_save(2, model, optimizer, {"step": 2})
    assert saver.wait()
    model.eval()
    torch.save(model(input_ids=NUMBERS).logits.detach(), Path(folder) / "logits.pt")
    return state_digests(model, optimizer)


def load(folder: str, kind: str) -> dict[str, str]:
    model, optimizer, saver = attach(folder, kind, "b")
    assert saver.resume(model, optimizer) == {"step": 2}
    return state_digests(model, optimizer)


@pytest.mark.parametrize(
    ("kind", "size", "other", "other_size"),
    [("ddp", 2, "plain", 1), ("plain", 1, "ddp", 3), ("fsdp", 2, "fsdp", 3), ("fsdp", 3, "ddp", 2)],
)
def test_saved_in_the_layout_of_peft(kind: str, size: int, other: str, other_size: int, tmp_path: Path) -> None:
    saved = on_ranks(size, save, str(tmp_path), kind)[0]
    assert all(found == saved for found in on_ranks(other_size, load, str(tmp_path), other))

    folder = next(tmp_path.glob("run/attempts/*/checkpoint-2"))
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert len(names) == 2 * 2 + 2
    assert all(name.startswith("base_model.model.") and "default" not in name for name in names)
    assert not (folder / "model.safetensors").exists(), "the base model must not be written"
    model = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=NUMBERS).logits, torch.load(tmp_path / "logits.pt"))


def test_several_adapters_are_refused() -> None:
    model: Any = get_peft_model(base(), LoraConfig(**LORA))
    model.add_adapter("other", LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="adapters default, other"):
        adapter_naming(model)
