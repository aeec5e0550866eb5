"""LoRA as peft offers it: each setting trains, resumes to the same bits, and loads in plain peft; adapters go on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.model import LoraSettings, ModelSettings
from outlast.trainers.config.train import Parallel
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.support.groups.worker_group import StopAt, digests, fault, losses, run_group, with_parallel
from tests.trainers.models.test_lora import directory, logits, make_base

SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "rslora": True},
    "dora": {"r": 4, "dora": True, "dropout": 0.1},
    "bias-all": {"r": 4, "bias": "all"},
    "bias-lora": {"r": 4, "bias": "lora_only"},
    "regex": {"r": 4, "target_modules": r".*layers\.1\..*(q|v)_proj"},
    "saved": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
}

FAST = [("dora", Parallel.FSDP), ("saved", Parallel.DDP)]


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    """A tiny Llama with biases."""
    folder = make_base(tmp_path_factory.mktemp(request.param), text_file)
    config = AutoConfig.from_pretrained(folder)
    config.attention_bias = config.mlp_bias = True
    config.tie_word_embeddings = request.param == "tied"
    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapt(assign: Callable[..., Assignment], base: Path) -> Callable[..., Assignment]:
    def make(name: str, lora: dict[str, Any] | None, **options: Any) -> Assignment:
        model = {"path": str(base), "lora": lora, "config": None, "tokenizer": None, **options.pop("model", {})}
        return assign(f"{name}-{base.name}", sections={"model": model, **options.pop("sections", {})}, **options)

    return make


def start_and_resume(make: Callable[..., Assignment], storage: LocalStorage) -> str:
    """Runs it once in one piece and once stopped at step 4; returns the name of the first run."""
    whole, parts = make("whole"), make("parts")
    assert run_group(whole, storage, 1)[0].outcome is Outcome.DONE
    assert run_group(parts, storage, 1, StopAt(4))[0].outcome is Outcome.STOPPED
    assert run_group(make("parts", launch="second"), storage, 1)[0].outcome is Outcome.DONE
    assert digests(storage, parts.config.name) == digests(storage, whole.config.name)
    assert losses(storage, parts.config.name) == losses(storage, whole.config.name)
    return str(whole.config.name)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_peft(
    setting: str, adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    def make(name: str, **options: Any) -> Assignment:
        return adapt(f"lora-{setting}-{name}", SETTINGS[setting], **options)

    folder = directory(storage, start_and_resume(make, storage))
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert not torch.equal(logits(adapted), logits(plain)), "it was trained"
    ours, _ = build(make("again"), storage)
    restore(ours, folder)
    assert torch.equal(logits(adapted), logits(ours)), "as peft loads it"
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(ours))


@pytest.mark.parametrize(
    ("setting", "parallel"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.faults, id=f"{case[0]}-{case[1].value}")
        for case in product(SETTINGS, Parallel)
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    setting: str, parallel: Parallel, adapt: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    def make(name: str, **options: Any) -> Assignment:
        run = f"lora-{setting}-{parallel.value}-{name}"
        return with_parallel(adapt(run, SETTINGS[setting], **options), parallel)

    whole, killed = make("whole"), make("killed")
    assert run_group(whole, storage, 2)[0].outcome is Outcome.DONE
    injected = fault(FaultPoint.WHILE_WRITING, 6, 1, FaultAction.SIGKILL, tmp_path)
    assert run_group(make("killed", faults=(injected,)), storage, 2)[1].exit_code == -signal.SIGKILL
    assert Path(injected.record).exists()
    assert run_group(make("killed", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, killed.config.name) == digests(storage, whole.config.name)
    assert losses(storage, killed.config.name) == losses(storage, whole.config.name)


def build(assignment: Assignment, storage: LocalStorage, *, fresh: bool = True) -> tuple[Any, dict[str, bytes]]:
    tokenizer = assignment.prepared.tokenizer(storage)
    task = CausalLM(assignment.config.data, tokenizer, assignment.prepared.facts)
    return build_model(assignment.config.model, task, tokenizer, 1, fresh=fresh)


def restore(model: Any, folder: Path) -> None:
    """Gives a model the adapter's weights as peft does."""
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def plain_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """An adapter as peft writes it, with weights that change the logits."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("form", ["as model.path", "as model.lora.path"])
def test_an_adapter_of_peft_goes_on_training(
    form: str, adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    theirs = plain_adapter(base, tmp_path / "adapter")
    model: dict[str, Any] = {"path": str(tmp_path / "adapter"), "lora": None}
    if form == "as model.lora.path":
        model = {"lora": {"path": str(tmp_path / "adapter")}}

    def make(name: str, **options: Any) -> Assignment:
        return adapt(f"go-on-{form.split()[-1]}-{name}", None, model=model, **options)

    started, files = build(make("start"), storage)
    assert torch.equal(logits(started), logits(theirs)), "it starts where peft left it"
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["k_proj", "q_proj"])
    assert config["base_model_name_or_path"] == str(base)
    folder = directory(storage, start_and_resume(make, storage))
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert not torch.equal(logits(again), logits(theirs))


def test_the_model_of_a_lora_run_goes_on_training(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path
) -> None:
    first = adapt("first-lora", {"r": 4})
    assert run_group(first, storage, 1)[0].outcome is Outcome.DONE
    folder = directory(storage, first.config.name)
    second = adapt("second-lora", None, model={"path": str(folder), "lora": None})
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(build(second, storage)[0]), logits(expected))
    assert run_group(second, storage, 1)[0].outcome is Outcome.DONE
    before, after = (
        load_file(directory(storage, run.config.name) / "adapter_model.safetensors") for run in (first, second)
    )
    assert before.keys() == after.keys()
    assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_tokenizer_of_the_base_model_is_used_if_an_adapter_has_none(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    plain_adapter(base, tmp_path / "adapter")
    assert not (tmp_path / "adapter/tokenizer.json").exists()
    assignment = adapt("adapter-tokenizer", None, model={"path": str(tmp_path / "adapter"), "lora": None})
    theirs = AutoTokenizer.from_pretrained(base)
    assert assignment.prepared.tokenizer(storage).inner.get_vocab() == theirs.get_vocab()


def refused(assignment: Assignment, storage: LocalStorage) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(assignment, storage)
    return caught.value


def test_adapters_that_do_not_fit(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    plain_adapter(base, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = min(weights)

    def changed(key: str, value: Any) -> str:
        other = tmp_path / f"{key}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, other)
        if key == "weights":
            save_file(value, other / "adapter_model.safetensors")
        else:
            config = json.loads((other / "adapter_config.json").read_bytes())
            (other / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        return str(other)

    def error(path: str) -> ConfigError:
        return refused(adapt("misfit", {"path": path}), storage)

    lacking = error(changed("weights", {key: item for key, item in weights.items() if key != name}))
    assert "lacks base_model.model.model.layers.0.self_attn.k_proj.lora_A" in lacking.message
    assert (
        "foreign" in error(changed("weights", {**weights, "base_model.model.foreign": weights[name].clone()})).message
    )
    other = error(changed("r", 7)).message
    assert f"{name} is [3, 32] in the file and [7, 32] here" in other
    assert "IA3" in error(changed("peft_type", "IA3")).message
    assert "was trained for SEQ_CLS, and model.task needs CAUSAL_LM" in error(changed("task_type", "SEQ_CLS")).message
    gone = changed("r", 3)
    (Path(gone) / "adapter_model.safetensors").unlink()
    assert error(gone).message == f"the adapter {gone} has no adapter_model.safetensors"
    (Path(gone) / "adapter_model.safetensors").write_bytes(b"no weights")
    assert f"{gone}/adapter_model.safetensors cannot be read: " in error(gone).message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "x"),
        ("r", "a"),
        ("r", 0),
        ("task_type", "BOGUS"),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("target_modules", ["nope"]),
        ("lora_dropout", "x"),
        ("lora_dropout", 2),
        ("modules_to_save", 5),
        ("rank_pattern", [1]),
        ("alpha_pattern", 5),
        ("layers_to_transform", "x"),
        ("lora_alpha", None),
        ("eva_config", 5),
        ("init_lora_weights", "zzz"),
    ],
    ids=str,
)
def test_a_configuration_that_peft_refuses(
    key: str, value: Any, adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    plain_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), key: value}))
    error = refused(adapt("refused", {"path": str(tmp_path / "adapter")}), storage)
    assert error.message.startswith(f"{file}: peft cannot adapt LlamaForCausalLM: ")
    assert "model.lora.target_modules" not in error.hint
    assert ("this model has: " in error.hint) == (value == ["nope"])


def test_the_hint_names_the_setting_that_peft_refuses(adapt: Callable[..., Assignment], storage: LocalStorage) -> None:
    error = refused(adapt("no-target", {"target_modules": ["q_prj"]}), storage)
    assert error.hint.startswith("set model.lora.target_modules; this model has: down_proj, ")


def test_a_missing_base_model_is_named(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    plain_adapter(base, tmp_path / "adapter").save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_bytes())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"the base model .*gone of the adapter .* does not exist") as caught:
        adapt("no-base", None, model={"path": str(tmp_path / "adapter"), "lora": None})
    assert "--merge --base" in caught.value.hint
    both = adapt("both", {"path": str(tmp_path / "adapter")})
    build(both, storage)  # the base model is in model.path


def test_modules_to_save_that_the_model_lacks(adapt: Callable[..., Assignment], storage: LocalStorage) -> None:
    error = refused(adapt("lacking", {"modules_to_save": ["embed_token"]}), storage)
    assert "no module 'embed_token'; did you mean 'embed_tokens'?" in error.message


def test_settings_beside_an_adapter() -> None:
    with pytest.raises(ValueError, match="leave out r, rslora"):
        LoraSettings.model_validate({"path": "/adapter", "r": 8, "rslora": True})
    with pytest.raises(ValueError, match="not a regular expression"):
        LoraSettings.model_validate({"target_modules": "(q_proj"})
    with pytest.raises(ValueError, match="resize needs path"):
        ModelSettings.model_validate({"config": {"model_type": "gpt2"}, "tokenizer": {"path": "x"}, "resize": True})


@pytest.mark.parametrize("tokens", [["<|one|>", "<|two|>"]])
def test_added_tokens_are_trained_and_saved_with_the_adapter(
    tokens: list[str], adapt: Callable[..., Assignment], storage: LocalStorage, base: Path
) -> None:
    def make(name: str, **options: Any) -> Assignment:
        return adapt(f"lora-added-{name}", {"r": 4}, model={"add_tokens": tokens}, **options)

    folder = directory(storage, start_and_resume(make, storage))
    theirs = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(tokens) == [400, 401]
    theirs.resize_token_embeddings(len(tokenizer))
    adapted = peft.PeftModel.from_pretrained(theirs, folder)
    ours, _ = build(make("again"), storage)
    restore(ours, folder)
    assert torch.equal(logits(adapted), logits(ours))
    rows = adapted.get_input_embeddings().weight
    assert rows.shape[0] == 402


def test_a_run_with_added_tokens_and_an_adapter_goes_on_training(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path
) -> None:
    """Its adapter holds the embeddings, which are larger than the base model's."""
    tokens = ["<|one|>", "return"]
    first = adapt("grown-first", {"r": 4}, model={"add_tokens": tokens})
    assert run_group(first, storage, 1)[0].outcome is Outcome.DONE
    folder = directory(storage, first.config.name)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(402)
    theirs = peft.PeftModel.from_pretrained(theirs, folder)
    for options in ({"resize": True}, {"add_tokens": tokens}):
        again = adapt(f"grown-{next(iter(options))}", None, model={"path": str(folder), "lora": None, **options})
        assert torch.equal(logits(build(again, storage)[0]), logits(theirs))

    def make(name: str, **options: Any) -> Assignment:
        return adapt(f"grown-{name}", None, model={"path": str(folder), "lora": None, "resize": True}, **options)

    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(directory(storage, start_and_resume(make, storage)) / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    embedding = "base_model.model.model.embed_tokens.weight"
    assert not torch.equal(before[embedding], after[embedding]), "the embedding is trained on"


def test_an_adapter_of_peft_with_a_resized_embedding_goes_on_training(
    adapt: Callable[..., Assignment], storage: LocalStorage, base: Path, tmp_path: Path
) -> None:
    """peft saves the embeddings with the adapter, although they are not trained."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|one|>", "return"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(402)
    model.save_pretrained(tmp_path / "grown")
    theirs = plain_adapter(tmp_path / "grown", tmp_path / "adapter")
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        theirs.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    embedding = "base_model.model.model.embed_tokens.weight"
    assert saved[embedding].shape[0] == 402

    def make(name: str, **options: Any) -> Assignment:
        settings = {"path": str(tmp_path / "adapter"), "lora": None, "resize": True}
        return adapt(f"resized-{name}", None, model=settings, **options)

    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(402)
    expected = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert torch.equal(logits(build(make("start"), storage)[0]), expected)
    folder = directory(storage, start_and_resume(make, storage))
    after = load_file(folder / "adapter_model.safetensors")
    assert after.keys() == saved.keys()
    assert torch.equal(after[embedding], saved[embedding])
    assert not all(torch.equal(after[name], saved[name]) for name in saved)
