"""LoRA: an adapter in peft's layout, killed and resumed to the same bits, merged into a plain model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Parallel
from outlast.trainers.data.tokenizer import tokenizer_files, train_bpe
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.predict import choose_checkpoint, load
from tests.support.groups.worker_group import digests, fault, losses, newest, run_group, with_parallel

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}


def make_base(folder: Path, text_file: str) -> Path:
    """A tiny pretrained Llama with its tokenizer."""
    tokenizer = train_bpe(iter(Path(text_file).read_text().splitlines()), 400)
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=400, pad_token_id=0, eos_token_id=0, bos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name, data in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), text_file)


@pytest.fixture
def adapt(assign: Callable[..., Assignment], base: Path) -> Callable[..., Assignment]:
    def make(name: str, **options: Any) -> Assignment:
        model = {"path": str(base), "lora": LORA, "config": None, "tokenizer": None, **options.pop("model", {})}
        return assign(name, sections={"model": model, **options.pop("sections", {})}, **options)

    return make


def directory(storage: LocalStorage, run: str) -> Path:
    ref = newest(storage, run).ref
    return storage.path(f"{run}/attempts/{ref.attempt}/checkpoint-{ref.step}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(24).reshape(2, 12) + 7).logits
        return found


@pytest.fixture
def trained(adapt: Callable[..., Assignment], storage: LocalStorage) -> Path:
    if not storage.path("adapter").exists():
        assert run_group(adapt("adapter"), storage, 2)[0].outcome is Outcome.DONE
    return directory(storage, "adapter")


def test_killed_and_resumed_equals_uninterrupted(
    adapt: Callable[..., Assignment], storage: LocalStorage, trained: Path, tmp_path: Path
) -> None:
    injected = fault(FaultPoint.WHILE_WRITING, 6, 1, FaultAction.SIGKILL, tmp_path)
    assert run_group(adapt("adapter-killed", faults=(injected,)), storage, 2)[1].exit_code == -9
    assert Path(injected.record).exists()
    assert run_group(adapt("adapter-killed", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, "adapter-killed") == digests(storage, "adapter")
    assert losses(storage, "adapter-killed") == losses(storage, "adapter")
    assert (trained / "adapter_config.json").read_bytes() == (
        directory(storage, "adapter-killed") / "adapter_config.json"
    ).read_bytes()


def test_a_sharded_adapter_resumes(
    adapt: Callable[..., Assignment], storage: LocalStorage, trained: Path, tmp_path: Path
) -> None:
    """Under FSDP2, where each rank holds a share of the frozen weights and of the adapter."""

    def sharded(name: str, **options: Any) -> Assignment:
        return with_parallel(adapt(name, **options), Parallel.FSDP)

    run, injected = "adapter-spread", fault(FaultPoint.WHILE_WRITING, 6, 1, FaultAction.SIGKILL, tmp_path)
    assert run_group(sharded(run), storage, 2)[0].outcome is Outcome.DONE
    run_group(sharded(f"{run}-killed", faults=(injected,)), storage, 2)
    assert Path(injected.record).exists()
    assert run_group(sharded(f"{run}-killed", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, f"{run}-killed") == digests(storage, run)
    assert losses(storage, f"{run}-killed") == losses(storage, run)
    assert losses(storage, run) == pytest.approx(losses(storage, "adapter"), rel=1e-4)
    assert load_file(directory(storage, run) / "adapter_model.safetensors").keys() == (
        load_file(trained / "adapter_model.safetensors").keys()
    )


def test_the_layout_is_that_of_peft(trained: Path, base: Path) -> None:
    assert not (trained / "model.safetensors").exists(), "the base model must not be saved"
    names = load_file(trained / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 2, "two layers, two projections, two matrices"
    assert any(tensor.any() for name, tensor in names.items() if "lora_B" in name), "it was trained"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)
    assert torch.equal(logits(adapted), logits(AutoPeftModelForCausalLM.from_pretrained(trained)))
    assert not torch.equal(logits(adapted), logits(AutoModelForCausalLM.from_pretrained(base)))


def export(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["checkpoints", "export", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return str(done.exception) if done.exception else done.output


def test_merging_equals_that_of_peft(storage: LocalStorage, trained: Path, base: Path, tmp_path: Path) -> None:
    run = storage.path("adapter")
    assert "no path that leads out of a run" in export(run, "newest", tmp_path / "merged", "--merge", code=1)
    export(run, "newest", tmp_path / "merged", "--merge", "--base", base)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(adapted))
    expected = logits(adapted.merge_and_unload())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert (tmp_path / "merged/tokenizer.json").exists()

    export(run, "newest", tmp_path / "alone")
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "alone")
    assert torch.equal(logits(alone.merge_and_unload()), expected)

    export(run, "newest", tmp_path / "half", "--merge", "--base", base, "--dtype", "bf16")
    assert load_file(tmp_path / "half/model.safetensors")["lm_head.weight"].dtype is torch.bfloat16


def test_another_base_model_is_refused(
    adapt: Callable[..., Assignment], storage: LocalStorage, trained: Path, base: Path, tmp_path: Path, text_file: str
) -> None:
    other = make_base(tmp_path / base.name, text_file)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    message = export(storage.path("adapter"), "newest", tmp_path / "merged", "--merge", "--base", other, code=1)
    assert "does not have the weights" in message
    [ended] = run_group(adapt("adapter", launch="third", model={"path": str(other)}, steps=10), storage, 1)
    assert isinstance(ended.error, ConfigError)
    assert "the base model's weights differ" in ended.error.message


def test_a_new_head_is_trained_and_saved(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"number {number}", "label": "odd" if number % 2 else "even"} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": None, "max_length": 8}
    model = {"task": "sequence-classification"}
    assignment = adapt("adapter-head", model=model, sections={"data": data}, eval_every=None)
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    place = directory(storage, "adapter-head")
    assert "base_model.model.score.weight" in load_file(place / "adapter_model.safetensors")
    config = AutoConfig.from_pretrained(place)
    assert config.id2label == {0: "even", 1: "odd"}
    torch.manual_seed(1)  # the initial weights of the head must not matter
    adapted = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, config=config), place)
    export(storage.path("adapter-head"), "newest", tmp_path / "merged", "--merge", "--base", base)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted))
    assert torch.equal(logits(merged), logits(adapted.merge_and_unload()))
    found = choose_checkpoint(RunStore(storage, "adapter-head"), None, Retention())
    _, tried = load(assignment.config, found, str(base))
    torch.testing.assert_close(logits(tried), logits(merged))  # `outlast try` takes adapter and head, not merged


def test_without_peft_the_error_names_the_extra(
    adapt: Callable[..., Assignment], storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlast.trainers.models.build import build_model
    from outlast.trainers.tasks.causal_lm import CausalLM

    assignment = adapt("adapter-without")
    monkeypatch.setitem(sys.modules, "peft", None)
    tokenizer = assignment.prepared.tokenizer(storage)
    task = CausalLM(assignment.config.data, tokenizer, assignment.prepared.facts)
    with pytest.raises(ConfigError, match="peft, which is not installed") as caught:
        build_model(assignment.config.model, task, tokenizer, 1, fresh=True)
    assert caught.value.hint == "pip install 'outlast[lora]'"


def test_unknown_target_modules(adapt: Callable[..., Assignment], storage: LocalStorage) -> None:
    [ended] = run_group(adapt("adapter-nowhere", model={"lora": {"target_modules": ["c_attn"]}}), storage, 1)
    assert isinstance(ended.error, ConfigError)
    assert "q_proj" in ended.error.hint
    assert not read_catalog(storage, "adapter-nowhere").accepted


def test_an_adapter_needs_a_model(assign: Callable[..., Assignment]) -> None:
    with pytest.raises(ValueError, match="lora needs path"):
        assign("adapter-alone", sections={"model": {"lora": LORA}})
