"""Errors in the model settings are found by the driver, before any worker is started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.jobs.ray_jobs import check_named_code as check_submission
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks.model_checks import check_code, check_model
from outlast.trainers.user_code import make_importable
from tests.support.groups.worker_group import tiny_config
from tests.trainers.models.test_lora import LORA, make_base

OUTLAST = str(Path(sys.executable).with_name("outlast"))
OWN = """
import torch
from torch import nn

class Rising(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.scale = float(torch.ones(width).sum())  # which no tensor without memory can tell
        if width == 7:
            raise RuntimeError("not seven")
"""
TEXT_PART = """
from transformers import CLIPTextConfig, PreTrainedModel
from torch import nn

class TextPart(PreTrainedModel):  # the Auto class of its task does not know this configuration, and need not
    config_class = CLIPTextConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()
"""


@pytest.fixture
def own_code(tmp_path: Path) -> str:
    (tmp_path / "rising.py").write_text(OWN)
    (tmp_path / "text_part.py").write_text(TEXT_PART)
    (tmp_path / "sinking.py").write_text("import torch\n\nfloat(nothing)\n")
    make_importable(str(tmp_path))
    return str(tmp_path)


def own(width: int, name: str = "Rising") -> dict[str, Any]:
    return {"class": f"rising:{name}", "config": {"width": width}}


def gpt2(**config: Any) -> dict[str, Any]:
    return {"config": {"model_type": "gpt2", "n_embd": 36, **config}}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (gpt2(n_layers=2), "model.config.n_layers: gpt2 models have no such setting; did you mean 'n_layer'"),
        ({"config": {"model_type": "gpt22"}}, "'gpt22' is unknown to transformers .*; did you mean 'gpt2'"),
        ({"class": "no_such_module:Model", "config": {}}, "No module named 'no_such_module'"),
        ({"class": "sinking:Model", "config": {}}, "name 'nothing' is not defined .*sinking.py, line 3"),
        (own(8, "Rizing"), "has no 'Rizing'; did you mean 'Rising'"),
        ({"task": "rising:Rising"}, "model.task 'rising:Rising' is not a subclass of Task"),
    ],
    ids=str,
)
def test_errors_found_before_the_data_is_read(own_code: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_code(tiny_config("run", "none", "none", sections={"model": model}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        (gpt2(n_head=5), {}, "`embed_dim` must be divisible by num_heads"),
        (gpt2(n_layer="two"), {}, "expected int"),
        (own(7), {}, "Rising cannot be built: RuntimeError: not seven .*rising.py, line 11"),
        ({"class": "rising:Rising", "config": {"widht": 8}}, {}, "unexpected keyword argument 'widht'"),
        (own(8), {"gradient_checkpointing": True}, "Rising cannot recompute its activations"),
    ],
    ids=str,
)
def test_errors_found_before_a_worker_is_started(
    own_code: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    model: dict[str, Any],
    train: dict[str, Any],
    message: str,
) -> None:
    assignment = assign("preflight", sections={"model": model}, **train)
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(assignment.config, assignment.prepared, storage)
    assert caught.value.hint


def test_valid_models_pass(
    own_code: str, assign: Callable[..., Assignment], storage: LocalStorage, text_file: str, tmp_path: Path
) -> None:
    """Also a class that cannot be built on the meta device, and a base model without weights."""
    base = make_base(tmp_path / "base", text_file)
    (base / "model.safetensors").unlink()
    adapted = {"path": str(base), "config": None, "tokenizer": None}
    text_part = {"class": "text_part:TextPart", "config": {"num_hidden_layers": 1, "hidden_size": 16}}
    for model in (gpt2(), own(8), text_part, adapted, {**adapted, "lora": LORA}):
        assignment = assign("preflight", sections={"model": model})
        check_model(assignment.config, assignment.prepared, storage)
    assignment = assign("preflight", sections={"model": {**adapted, "lora": {"target_modules": ["q_prj"]}}})
    with pytest.raises(ConfigError, match="q_prj") as caught:
        check_model(assignment.config, assignment.prepared, storage)
    assert "q_proj" in caught.value.hint


def test_a_submission_is_checked_where_its_code_is_importable(own_code: str) -> None:
    """A class that is not importable here may be installed on the cluster."""
    for model in (own(8, "Rizing"), gpt2(n_layers=2)):
        with pytest.raises(ConfigError, match=r"Rizing|n_layers"):
            check_submission(RunConfig.model_validate(body_of(model)), Path(own_code))
    elsewhere = RunConfig.model_validate(body_of({"class": "installed_there:Model", "config": {}}))
    check_submission(elsewhere, None)
    with pytest.raises(ConfigError, match="installed_there"):
        check_submission(elsewhere, Path(own_code))


def body_of(model: dict[str, Any]) -> dict[str, Any]:
    config = tiny_config("run", "none", "none", sections={"model": model})
    return config.model_dump(mode="json", exclude_defaults=True, by_alias=True)


def test_the_command_fails_at_once(own_code: str, tmp_path: Path, text_file: str) -> None:
    """With one error and exit code 2; Ray is not started, and only the prepared data is written."""
    run_file, place = tmp_path / "run.yaml", {"checkpoint": {"storage": str(tmp_path / "runs")}}
    run_file.write_text(yaml.safe_dump({**body_of(own(7)), **place, "data": {"train": text_file, "eval": "5%"}}))
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # no cluster there: starting Ray would fail
    command = [OUTLAST, "train", str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2, done.stderr
    assert "not seven" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".data"]
