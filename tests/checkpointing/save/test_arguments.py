"""What a script passes to a save is kept as it is, or refused at the call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.export import read_content
from outlast.checkpointing.tools.query import resolve_checkpoint
from tests.support.groups.ranks import on_ranks
from tests.support.small_model import small_model, train_step


class Script:
    """A loop of the user's own."""

    def __init__(self, folder: Path, *, resumes: bool = True) -> None:
        self.storage = LocalStorage(folder)
        self.model, self.optimizer = small_model()
        self.checkpointer = Checkpointer(self.storage, "run")
        self.state = self.checkpointer.resume(self.model, self.optimizer) if resumes else None
        train_step(self.model, self.optimizer, 1)

    def save(self, step: Any, how: str = "save", **options: Any) -> bool:
        options = {"state": {"step": step}, **options}
        saved: bool = getattr(self.checkpointer, how)(step, self.model, self.optimizer, **options)
        return saved

    def steps(self) -> list[int]:
        return sorted(item.ref.step for item in read_catalog(self.storage, "run").accepted)


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_step_that_does_not_rise_is_refused(how: str, tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.save(10)
    assert script.save(20, how)
    for step in (5, 19, 0):
        with pytest.raises(ConfigError, match=f"step {step} cannot be saved.* the newest one saved is 20"):
            script.save(step, how)
    assert script.save(20, how), "it is kept"
    assert script.checkpointer.close()
    assert script.steps() == [10, 20]
    heir = Script(tmp_path)
    assert heir.state == {"step": 20}
    with pytest.raises(ConfigError, match=r"step 15 cannot be saved.* the newest one saved is 20"):
        heir.save(15, how)
    assert heir.save(21)


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_saved_again_with_other_weights_is_refused(resumed: bool, how: str, tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.save(10, "save" if resumed else how)
    if resumed:
        script = Script(tmp_path)
    else:
        train_step(script.model, script.optimizer, 2)
    with pytest.raises(ConfigError, match="step 10 is saved, with other weights: steps must rise"):
        script.save(10, how)
    assert script.save(11)


@pytest.mark.parametrize("step", [10.0, -1, True, np.bool_(True), torch.tensor(True), "3", None, 10**18, np.float32(3)])
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_what_is_no_step_is_refused(how: str, step: Any, tmp_path: Path) -> None:
    script = Script(tmp_path)
    with pytest.raises(ConfigError, match="is not usable: a step is an integer from 0"):
        script.save(step, how, state={})
    assert script.save(1)
    with pytest.raises(ConfigError, match="is not usable"):
        script.checkpointer.finish(script.checkpointer.accepted[0].ref, step)


@pytest.mark.parametrize("step", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_any_library_are_steps(step: Any, tmp_path: Path) -> None:
    assert Script(tmp_path).save(step)
    heir = Script(tmp_path)
    assert heir.steps() == [3]
    assert heir.state == {"step": step}
    assert type(heir.state["step"]) is type(step)


def test_a_script_that_does_not_resume_replaces_nothing(tmp_path: Path) -> None:
    assert Script(tmp_path).save(40)
    with pytest.raises(ConfigError, match="run 'run' has checkpoints") as caught:
        Script(tmp_path, resumes=False).save(1)
    assert "call resume" in caught.value.hint
    assert Script(tmp_path).steps() == [40]


METRICS = {"loss": torch.tensor(0.5), "numpy": np.float32(0.25), "count": 3, "nan": float("nan")}


def test_metrics_are_numbers(tmp_path: Path) -> None:
    script = Script(tmp_path)
    given = dict(METRICS)
    assert script.save(1, "async_save", metrics=given)
    given.clear()
    script.checkpointer.close()
    [manifest] = read_catalog(script.storage, "run").accepted
    assert {**manifest.metrics, "nan": 0} == {"loss": 0.5, "numpy": 0.25, "count": 3, "nan": 0}


@pytest.mark.parametrize("metrics", [{"a": "0.5"}, {"a": None}, {"a": [1]}, {"a": torch.ones(2)}, {1: 0.5}])
def test_other_metrics_are_refused(metrics: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a metric is a number"):
        Script(tmp_path).save(1, metrics=metrics)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a//b",
        "a/../b",
        "",
        ".",
        "a\\b",
        "C:x",
        "a\nb",
        "x" * 300,
        "manifest.json",
        "training_state/state.json",
        "training_state",
        "model.safetensors",
    ],
)
def test_a_file_that_leaves_or_shadows_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a checkpoint cannot have the file"):
        Script(tmp_path).save(1, files={name: b""})


def test_a_file_in_place_of_a_directory_of_another_one_is_refused(tmp_path: Path) -> None:
    """An object store would take both, and no directory could hold a copy."""
    with pytest.raises(ConfigError, match="another file lies in a directory of that name"):
        Script(tmp_path).save(1, files={"notes/a": b"", "notes": b""})


def test_a_file_beside_the_training_state_is_of_the_model(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.save(1, files={"training_state_notes.json": b"{}"})
    [accepted] = read_catalog(script.storage, "run").accepted
    folder = tmp_path / str(script.checkpointer.finish(accepted.ref, 1))
    assert (folder / "training_state_notes.json").read_bytes() == b"{}"
    content = read_content(resolve_checkpoint(RunStore(script.storage, "run"), "1", Retention()))
    assert content.files["training_state_notes.json"] == b"{}"


def test_files_are_bytes(tmp_path: Path) -> None:
    script = Script(tmp_path)
    with pytest.raises(ConfigError, match=r"file 'a\.json' is of the type str"):
        script.save(1, files={"a.json": "{}"})
    data = bytearray(b"{}")
    assert script.save(1, "async_save", files={"sub/a.json": data})
    data[:] = b"xx"
    script.checkpointer.close()
    [manifest] = read_catalog(script.storage, "run").accepted
    assert verify(script.storage, script.checkpointer.store.checkpoint_dir(manifest.ref), manifest) == []


def test_a_weight_of_a_type_that_no_file_holds_is_refused_at_the_call(tmp_path: Path) -> None:
    checkpointer = Checkpointer(LocalStorage(tmp_path), "run")
    model = nn.Module()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"phase is of torch\.complex64"):
        checkpointer.async_save(1, model, None, {})


def test_what_is_not_accepted_is_not_published(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.save(1)
    other = Checkpointer(LocalStorage(tmp_path / "other"), "run")
    with pytest.raises(ConfigError, match="is no accepted checkpoint"):
        other.finish(script.checkpointer.accepted[0].ref, 1)


def save_on_ranks(folder: str, case: str) -> str:
    """The error on this rank."""
    rank = torch.distributed.get_rank()
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    step: Any = 1 + (rank if case == "steps" else 0)
    if case == "float" and rank:
        step = 1.0
    if case == "moments" and rank:
        optimizer.state.pop(next(iter(model.parameters())))
    state = {"x": object()} if case == "state" and not rank else {}
    checkpointer = Checkpointer(LocalStorage(Path(folder)), "run")
    try:
        checkpointer.save(step, model, optimizer, state)
    except ConfigError as error:
        return error.message
    return "saved"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("steps", r"the ranks save different steps: \[1, 2\]"),
        ("float", r"rank 1: step 1\.0 \(float\) is not usable"),
        ("moments", "rank 1 has other optimizer state than rank 0"),
        ("state", r"rank 0: state\['x'\] cannot be saved"),
    ],
)
def test_ranks_that_differ_are_all_refused(case: str, message: str, tmp_path: Path) -> None:
    answers = on_ranks(2, save_on_ranks, str(tmp_path), case)
    assert all(re.search(message, answer) for answer in answers), answers
