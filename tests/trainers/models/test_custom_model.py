"""The user's model classes: found beside the run file, saved, resumed, loaded; with carried state and without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import load_run
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.config.train import Parallel
from outlast.trainers.config.trust import Trust
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.models.custom_model import load_class
from outlast.trainers.predict import choose_checkpoint, load
from outlast.trainers.tasks.causal_lm import CausalLM
from outlast.trainers.user_code import make_importable
from tests.support.groups.worker_group import StopAt, digests, fault, losses, newest, resumed, run_group, with_parallel

EXAMPLES = Path(__file__).parents[3] / "examples"
PLAIN = """
from types import SimpleNamespace
from torch import nn

class Bigrams(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))
"""

TRUSTED = Trust(everything=True)


@pytest.fixture
def bring(assign: Callable[..., Assignment]) -> Callable[..., Assignment]:
    def make(name: str, *, carry: bool = True, exactness: str = "same-world", **options: Any) -> Assignment:
        config = {"width": 32, "num_heads": 2, "segment": 8, "memory": 8, "carry": carry}
        model = {"class": "recurrent:RecurrentLM", "config": config}
        sections = {"model": model, "checkpoint": {"overlap": True}, "exactness": exactness}
        assignment = assign(name, sections=sections, **options)
        object.__setattr__(assignment, "code", str(EXAMPLES))
        return assignment

    return make


def checkpoints(storage: LocalStorage, run: str, step: int) -> Path:
    return next(storage.path(f"{run}/attempts").glob(f"*/checkpoint-{step}"))


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_carried_state_is_restored(
    size: int, bring: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    run = f"memory-{size}"
    assert run_group(bring(run), storage, size)[0].outcome is Outcome.DONE
    injected = fault(FaultPoint.WHILE_WRITING, 9, 0, FaultAction.SIGKILL, tmp_path)
    run_group(bring(f"{run}-killed", faults=(injected,)), storage, size)
    assert Path(injected.record).exists()
    again = run_group(bring(f"{run}-killed", launch="second"), storage, size)
    assert again[0].outcome is Outcome.DONE
    assert [event["step"] for event in resumed(storage, f"{run}-killed")] == [6]
    assert digests(storage, f"{run}-killed") == digests(storage, run)
    assert losses(storage, f"{run}-killed") == losses(storage, run)

    before, after = (load_file(checkpoints(storage, run, step) / "model.safetensors") for step in (6, 10))
    assert before["memory"].any()
    assert not torch.equal(before["memory"], after["memory"]), "it carries something"
    forgetful = bring(f"{run}-forgot", carry=False)
    assert run_group(forgetful, storage, size)[0].outcome is Outcome.DONE
    assert losses(storage, f"{run}-forgot") != losses(storage, run), "and that counts"


def test_elastic_is_not_promised_of_carried_state(bring: Callable[..., Assignment], storage: LocalStorage) -> None:
    """A rank's results depend on its earlier micro-batches."""
    [ended] = run_group(bring("carried-elastic", exactness="elastic"), storage, 1)
    assert isinstance(ended.error, ConfigError)
    assert "buffer memory changes in the forward pass; exactness: elastic" in ended.error.message
    assert run_group(bring("empty-elastic", carry=False, exactness="elastic"), storage, 1)[0].outcome is Outcome.DONE


@pytest.mark.parametrize("mode", ["elastic", "fsdp"])
def test_a_constant_buffer_may_be_saved(
    mode: str, assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    """Restoring a checkpoint writes to the buffer, but that is not a forward pass."""
    line = "        self.register_buffer('scale', torch.ones(width))\n"
    (tmp_path / f"scaled_{mode}.py").write_text(
        "import torch\n" + PLAIN.replace("\n    def forward", f"{line}\n    def forward")
    )
    model = {"class": f"scaled_{mode}:Bigrams", "config": {"width": 16}}
    sections = {"model": model, "exactness": "elastic" if mode == "elastic" else "same-world"}
    parallel = Parallel.FSDP if mode == "fsdp" else Parallel.DDP

    def scaled(launch: str) -> Assignment:
        given = assign(f"scaled-{mode}", sections=sections, launch=launch)
        return replace(with_parallel(given, parallel), code=str(tmp_path))

    assert run_group(scaled("first"), storage, 2, StopAt(3))[0].outcome is Outcome.STOPPED
    assert "scale" in load_file(checkpoints(storage, f"scaled-{mode}", 4) / "model.safetensors")
    assert run_group(scaled("second"), storage, 2)[0].outcome is Outcome.DONE


def test_carried_state_of_an_idle_rank_resumes_the_same(
    bring: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """The last step has one micro-batch, on rank 1: the saved memory is that of rank 0, from an idle pass."""
    short = {"batch": 8, "micro_batch": 4, "steps": None, "eval_every": None}

    def brought(run: str, **options: Any) -> Assignment:
        epochs = 33.0 / bring(run).prepared.num_samples
        return bring(run, epochs=epochs, **{**short, **options})

    assert run_group(brought("idle"), storage, 2)[0].outcome is Outcome.DONE
    assert newest(storage, "idle").ref.step == 5
    run_group(brought("idle-stopped"), storage, 2, StopAt(3))
    assert [event["step"] for event in resumed(storage, "idle-stopped")] == []
    assert run_group(brought("idle-stopped", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert [event["step"] for event in resumed(storage, "idle-stopped")] == [4]
    assert digests(storage, "idle-stopped") == digests(storage, "idle")


def test_without_carried_state_the_number_of_workers_only_changes_the_order_of_summation(
    bring: Callable[..., Assignment], storage: LocalStorage
) -> None:
    for size in (1, 2):
        run_group(bring(f"segments-{size}", carry=False), storage, size)
    one, two = losses(storage, "segments-1"), losses(storage, "segments-2")
    assert one == pytest.approx(two, rel=1e-4)


def test_loaded_by_its_own_class(bring: Callable[..., Assignment], storage: LocalStorage) -> None:
    run_group(bring("own-class"), storage, 1, StopAt(3))
    make_importable(str(EXAMPLES))
    model = load_class("recurrent:RecurrentLM").from_pretrained(checkpoints(storage, "own-class", 4))
    weights = load_file(checkpoints(storage, "own-class", 4) / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    assert (
        newest(storage, "own-class").extra["declaration"]["mathematics"]["model"]["class_"] == "recurrent:RecurrentLM"
    )
    _, tried = load(
        bring("own-class").config, choose_checkpoint(RunStore(storage, "own-class"), None, Retention()), trust=TRUSTED
    )
    assert all(torch.equal(tensor, tried.state_dict()[name]) for name, tensor in weights.items())


def test_a_module_without_transformers(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "bigrams.py").write_text(PLAIN)
    sections = {"model": {"class": "bigrams:Bigrams", "config": {"width": 16}}}

    def brought(name: str, **options: Any) -> Assignment:
        assignment = assign(name, sections=sections, **options)
        object.__setattr__(assignment, "code", str(tmp_path))
        return assignment

    assert run_group(brought("bigrams"), storage, 2)[0].outcome is Outcome.DONE
    run_group(brought("bigrams-stopped"), storage, 2, StopAt(4))
    assert run_group(brought("bigrams-stopped", launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, "bigrams-stopped") == digests(storage, "bigrams")
    folder = checkpoints(storage, "bigrams", 10)
    assert json.loads((folder / "config.json").read_text()) == {"vocab_size": 400, "width": 16}
    make_importable(str(tmp_path))
    model = load_class("bigrams:Bigrams")(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    task, tried = load(
        brought("bigrams").config, choose_checkpoint(RunStore(storage, "bigrams"), None, Retention()), trust=TRUSTED
    )
    assert isinstance(task, CausalLM)
    assert all(torch.equal(tensor, tried.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.at_all:Model", "No module named 'nowhere'"),
        ("outlast.trainers.models.custom_model:Model", "has no 'Model'"),
        ("outlast.trainers.config.training_config:ModelSettings", "is not a torch.nn.Module"),
    ],
)
def test_unusable_classes(place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_class(place)
    assert caught.value.hint


def test_installed_modules_come_first(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise AssertionError('taken')")
    (tmp_path / "torch.py").write_text("raise AssertionError('taken')")
    make_importable(str(tmp_path))
    assert load_class("torch.nn:Linear") is torch.nn.Linear


def test_code_beside_the_weights_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    """Trusted code is saved in every checkpoint, so that the checkpoint can be loaded without the model directory."""
    tokenizer, config = train_bpe(iter(["a text"]), 300), json.dumps({"vocab_size": 300, "width": 16})
    make_importable(str(EXAMPLES))
    source = load_class("recurrent:RecurrentLM")
    source(source.config_class(**json.loads(config))).save_pretrained(tmp_path)
    (tmp_path / "recurrent_code.py").write_text((EXAMPLES / "recurrent.py").read_text())
    body = json.loads((tmp_path / "config.json").read_text())
    where = {"AutoConfig": "recurrent_code.RecurrentConfig", "AutoModelForCausalLM": "recurrent_code.RecurrentLM"}
    (tmp_path / "config.json").write_text(json.dumps({**body, "auto_map": where}))
    task = CausalLM(DataSettings(train="-"), tokenizer, {})
    with pytest.raises(ConfigError, match="custom code") as caught:
        build_model(ModelSettings(path=str(tmp_path)), task, tokenizer, 1, fresh=True)
    assert "model.trust_remote_code: true" in caught.value.hint
    trusting = ModelSettings(path=str(tmp_path), trust_remote_code=True)
    model, files = build_model(trusting, task, tokenizer, 1, fresh=True)
    assert type(model).__name__ == "RecurrentLM"
    assert files["recurrent_code.py"] == (EXAMPLES / "recurrent.py").read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == where


def test_checkpoints_need_no_transformers(tmp_path: Path) -> None:
    """A script may use any release of transformers, or none."""
    script = tmp_path / "own.py"
    script.write_text(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('transformers', 'tokenizers', 'accelerate', 'ray', 'pydantic')))\n"
        "import torch\n"
        "from outlast.checkpointing import Checkpointer, open_storage\n"
        "model = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "saver = Checkpointer(open_storage(sys.argv[1]), 'run')\n"
        "state = saver.resume(model, optimizer)\n"
        "model(torch.ones(2)).sum().backward()\n"
        "optimizer.step()\n"
        "step = state['step'] + 1 if state else 1\n"
        "assert saver.save(step, model, optimizer, {'step': step})\n"
        "print(step)\n"
    )
    message = [
        subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert message == ["1\n", "2\n"]


def test_the_run_file_of_the_example() -> None:
    config, _ = load_run(str(EXAMPLES / "recurrent.yaml"))
    assert config.model.class_ == "recurrent:RecurrentLM"
