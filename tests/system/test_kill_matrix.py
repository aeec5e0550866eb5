"""Resume equals uninterrupted, bit for bit, wherever a rank dies, hangs or stops for a while.

The reference is a run that nothing ever happened to, one for each world size. A case strikes one rank at one named
point, proves that the fault fired and that the group ended with it (or, if the process was only stopped, did not), runs
the same run again if need be, and compares the SHA-256 of every weight and optimizer tensor and the loss of every step.
Saves block here; `test_kill_background_save.py` has those in the background.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.format.layout import MANIFEST, checkpoint_dir
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.worker_group import (
    ACTIONS,
    IN_TRAINING,
    StopAt,
    digests,
    fault,
    losses,
    newest,
    resumed,
    run_group,
    run_struck,
)

Assign = Callable[..., Assignment]
MakeReference = Callable[[int], Reference]

POINTS = [
    point for point in FaultPoint if point is not FaultPoint.AFTER_SNAPSHOT
]  # that one is of saves in the background
#: Two checkpoints stay, so that retention has deleted something by the third save, at step 9.
KEEP_TWO = {"checkpoint": {"keep_last": 2}}
LLAMA = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attention_dropout": 0.1,
        }
    }
}


@dataclass(frozen=True)
class Case:
    size: int
    point: FaultPoint
    action: FaultAction
    rank: int

    def __str__(self) -> str:
        return f"{self.size}-{self.point.value}-{self.action.value}-rank{self.rank}"

    @property
    def step(self) -> int:
        """That of the second save, unless the point is in training or something must have been deleted."""
        in_training = {FaultPoint.ACCUMULATING: 7, FaultPoint.STEP: 7, FaultPoint.EVALUATING: 8}
        return {**in_training, FaultPoint.AFTER_RETENTION: 9}.get(self.point, 6)

    @property
    def resume_steps(self) -> set[int]:
        """Where the next attempt may go on."""
        if self.point in (*IN_TRAINING, FaultPoint.AFTER_MANIFEST):
            return {6}
        if self.point is FaultPoint.AFTER_RETENTION:
            return {9}
        # Rank 0 may have all it needs for the commit before it hears that another rank is dead.
        return {3, 6} if self.point is FaultPoint.BEFORE_MANIFEST and self.rank else {3}

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def is_fast(self) -> bool:
        if self.action in (FaultAction.HANG, FaultAction.STOP):
            return str(self) in ("2-before-manifest-stop-rank0", "2-evaluating-hang-rank1")
        if self.point in IN_TRAINING:
            return str(self) == "2-step-sigkill-rank1"
        in_the_middle = self.point in (FaultPoint.WHILE_WRITING, FaultPoint.BEFORE_MANIFEST)
        if self.action is FaultAction.EXCEPTION:
            return self.size == 2 and self.rank == 0 and in_the_middle
        if self.size == 2:
            return self.rank == 0 or in_the_middle
        return str(self).startswith(("1-before-manifest", "3-while-writing", "4-before-manifest")) and self.is_last


def all_cases() -> list[Any]:
    cases = [
        Case(size, point, action, rank)
        for size in (1, 2, 3, 4)
        for point in POINTS
        for action in ACTIONS
        for rank in sorted({0, size - 1})
        if size == 2 or point not in IN_TRAINING  # SIGKILL on other numbers of ranks is in test_exactness.py
    ]
    return [pytest.param(item, id=str(item), marks=() if item.is_fast else pytest.mark.faults) for item in cases]


def json_files(storage: LocalStorage, run: str) -> dict[str, Any]:
    """What the newest checkpoint says in JSON: configuration, tokenizer, loop state, history of evaluations."""
    manifest = newest(storage, run)
    names = [entry.path for entry in manifest.files if entry.path.endswith(".json")]
    return {name: json.loads(read_bytes(storage, f"{checkpoint_dir(run, manifest.ref)}/{name}")) for name in names}


def assert_finished_as(storage: LocalStorage, run: str, reference: Reference, *, same_history: bool = True) -> None:
    """The run's newest checkpoint, its losses and its published model are the reference's."""
    assert digests(storage, run) == reference.digests
    if same_history:
        assert json_files(storage, run) == json_files(storage, reference.run)
    assert losses(storage, run) == reference.losses
    directory = f"{run}/attempts/{list_attempts(RunStore(storage, run))[-1]}/model"
    published = Manifest.parse(read_bytes(storage, f"{directory}/{MANIFEST}"))
    assert published.extra == {"final_step": 10}
    assert verify(storage, directory, published) == []


@pytest.mark.parametrize("case", all_cases())
def test_struck_equals_undisturbed(
    case: Case,
    assign: Assign,
    storage: LocalStorage,
    reference: MakeReference,
    tmp_path: Path,
    cover: Callable[..., None],
) -> None:
    run = f"kill-{case}"
    strike = fault(case.point, case.step, case.rank, case.action, tmp_path)
    run_struck(assign(run, sections=KEEP_TWO), storage, case.size, strike)
    if case.action is not FaultAction.STOP:
        ended = run_group(assign(run, launch="second", sections=KEEP_TWO), storage, case.size)
        assert [item.outcome for item in ended] == [Outcome.DONE] * case.size
        assert resumed(storage, run)[-1]["step"] in case.resume_steps
    assert_finished_as(storage, run, reference(case.size))
    where = "in training" if case.point in IN_TRAINING else "in a save"
    rank = "another rank" if case.rank else "rank 0"
    cover(f"Processes that die, hang or stop {where}", case.action.value, f"{case.point.value}, {rank}")


def test_three_kills_in_one_launch(
    assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """The first kill is before there is any commit, so the second attempt starts from the beginning."""
    faults = (
        fault(FaultPoint.WHILE_WRITING, 3, 1, FaultAction.SIGKILL, tmp_path),
        fault(FaultPoint.BEFORE_MANIFEST, 6, 0, FaultAction.SIGKILL, tmp_path),
        fault(FaultPoint.STEP, 8, 1, FaultAction.SIGKILL, tmp_path),
    )
    assignment = assign("kill-three", faults=faults)
    for strike in faults:
        assert not Path(strike.record).exists()
        ended = run_group(assignment, storage, 2)
        assert Path(strike.record).exists()
        assert ended[strike.rank].exit_code == -signal.SIGKILL

    ended = run_group(assignment, storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert len(list_attempts(RunStore(storage, "kill-three"))) == 4
    assert [event["step"] for event in resumed(storage, "kill-three")] == [3, 6]
    assert_finished_as(storage, "kill-three", reference(2))


@pytest.mark.parametrize(
    ("name", "sections", "train"),
    [("llama", LLAMA, {}), ("bf16", {}, {"precision": "bf16"})],
    ids=["llama", "bf16"],
)
def test_other_models_and_precisions(
    name: str, sections: dict[str, Any], train: dict[str, Any], assign: Assign, storage: LocalStorage, tmp_path: Path
) -> None:
    whole, cut = f"{name}-whole", f"{name}-cut"
    assert run_group(assign(whole, sections=sections, **train), storage, 2)[0].outcome is Outcome.DONE
    expected = Reference(whole, digests(storage, whole), losses(storage, whole))

    strike = fault(FaultPoint.WHILE_WRITING, 6, 0, FaultAction.SIGKILL, tmp_path)
    ended = run_group(assign(cut, faults=(strike,), sections=sections, **train), storage, 2)
    assert Path(strike.record).exists()
    assert ended[0].exit_code == -signal.SIGKILL

    run_group(assign(cut, launch="second", sections=sections, **train), storage, 2)
    assert_finished_as(storage, cut, expected)


def test_another_seed_ends_otherwise(assign: Assign, storage: LocalStorage, reference: MakeReference) -> None:
    """So that equality above means something: another seed gives other bits."""
    run_group(assign("other-seed", sections={"seed": 12}), storage, 2)
    others = digests(storage, "other-seed")
    assert others.keys() == reference(2).digests.keys()
    assert others != reference(2).digests


@pytest.fixture(scope="module")
def stopped(assign: Assign, storage: LocalStorage) -> Callable[[str], str]:
    """`stopped(name)`: a new run on one rank that was stopped at step 5."""

    def make(name: str) -> str:
        ended = run_group(assign(name), storage, 1, StopAt(4))
        assert [item.outcome for item in ended] == [Outcome.STOPPED]
        return name

    return make


def test_a_stop_commits_where_it_stands(assign: Assign, storage: LocalStorage, reference: MakeReference) -> None:
    """Only rank 0 hears of the steps, so only rank 0 asks for the stop; both ranks end."""
    ended = run_group(assign("stop"), storage, 2, StopAt(4))
    assert [(item.outcome, item.exit_code) for item in ended] == [(Outcome.STOPPED, 0)] * 2
    stops = [event["step"] for _, event in run_events(RunStore(storage, "stop")) if event["event"] == "stop"]
    assert stops == [5], "at the end of the step after the one that asked; steps 3 and 6 are the regular saves"
    manifest = newest(storage, "stop")
    assert manifest.ref.step == 5
    assert verify(storage, checkpoint_dir("stop", manifest.ref), manifest) == []

    ended = run_group(assign("stop", launch="second"), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert_finished_as(storage, "stop", reference(2))


def test_a_finished_run_is_done_again_without_a_change(
    assign: Assign, storage: LocalStorage, reference: MakeReference
) -> None:
    run_group(assign("again"), storage, 2)
    for launch in ("second", "third"):
        ended = run_group(assign("again", launch=launch), storage, 2)
        assert [item.outcome for item in ended] == [Outcome.DONE] * 2
        assert resumed(storage, "again")[-1]["step"] == 10
        assert_finished_as(storage, "again", reference(2))


def test_another_world_size_goes_on(assign: Assign, storage: LocalStorage, reference: MakeReference) -> None:
    """Three ranks read what two wrote. The samples are the same ones, so the losses agree up to rounding."""
    run_group(assign("resize"), storage, 2, StopAt(4))
    ended = run_group(assign("resize", launch="second"), storage, 3)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 3
    assert losses(storage, "resize") == pytest.approx(reference(2).losses, rel=1e-5)
    changed = [event for _, event in run_events(RunStore(storage, "resize")) if event["event"] == "changed"]
    assert [(event["what"], event["before"], event["now"]) for event in changed] == [("world_size", 2, 3)]


def test_another_processor_is_recorded(assign: Assign, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels may give other bits in the same steps."""
    here = torch.backends.cpu.get_cpu_capability()  # read once per process
    run_group(assign("processor"), storage, 1, StopAt(4))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert run_group(assign("processor", launch="second"), storage, 1)[0].outcome is Outcome.DONE
    [changed] = [event for _, event in run_events(RunStore(storage, "processor")) if event["event"] == "changed"]
    assert (changed["what"], changed["before"], changed["now"]) == ("processor", here, "DEFAULT")
    assert not changed["same_bits"]


SLOWLY = pytest.mark.faults
DEEPER = {"model_type": "gpt2", "n_layer": 3}


@pytest.mark.parametrize(
    ("key", "sections", "train"),
    [
        pytest.param("train.lr", {}, {"lr": 2e-3}, id="lr"),
        pytest.param("train.batch", {}, {"batch": 16}, id="batch", marks=SLOWLY),
        pytest.param("train.micro_batch", {}, {"micro_batch": 2}, id="micro_batch", marks=SLOWLY),
        pytest.param("train.steps", {}, {"steps": 20}, id="steps", marks=SLOWLY),
        pytest.param("train.precision", {}, {"precision": "bf16"}, id="precision", marks=SLOWLY),
        pytest.param("seed", {"seed": 12}, {}, id="seed", marks=SLOWLY),
        pytest.param("model.config.n_layer", {"model": {"config": DEEPER}}, {}, id="model"),
        pytest.param("exactness", {"exactness": "fast"}, {}, id="exactness"),
        pytest.param("the data", {"data": {"max_length": 32}}, {}, id="max_length"),
        pytest.param("the data", {"data": {"train": "OTHER"}}, {}, id="other-file", marks=SLOWLY),
    ],
)
def test_changed_mathematics_are_refused(
    key: str,
    sections: dict[str, Any],
    train: dict[str, Any],
    assign: Assign,
    storage: LocalStorage,
    stopped: Callable[[str], str],
    text_file: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if sections.get("data", {}).get("train") == "OTHER":
        other = tmp_path / "other.txt"
        other.write_text(Path(text_file).read_text() + "\nOne line more.\n")
        sections = {"data": {"train": str(other)}}
    run = stopped(f"changed-{request.node.callspec.id}")
    before = read_catalog(storage, run)

    error = run_group(assign(run, launch="second", sections=sections, **train), storage, 1)[0].error
    assert isinstance(error, ConfigError)
    assert key in error.message
    assert error.exit_code == 2
    assert read_catalog(storage, run) == before, "a refused attempt leaves the checkpoints as they were"

    ended = run_group(assign(run, launch="third"), storage, 1)
    assert ended[0].outcome is Outcome.DONE, "with the settings put back the run goes on"


def test_data_that_comes_out_otherwise_is_refused(
    assign: Assign, storage: LocalStorage, stopped: Callable[[str], str]
) -> None:
    """Under the same fingerprint: another release of a tokenizer is enough."""
    again = assign(stopped("made-again"), launch="second")
    files = [
        replace(entry, xxh3_128="0" * 32) if entry.path == "train.arrow" else entry for entry in again.prepared.files
    ]
    other = replace(again, prepared=replace(again.prepared, files=tuple(files)))
    error = run_group(other, storage, 1)[0].error
    assert isinstance(error, ConfigError)
    assert "its samples differ from those" in error.message
    assert run_group(replace(again, launch="third"), storage, 1)[0].outcome is Outcome.DONE


def test_settings_that_change_no_number_may_change(
    assign: Assign, storage: LocalStorage, stopped: Callable[[str], str], reference: MakeReference
) -> None:
    run = stopped("changed-keeping")
    sections = {"checkpoint": {"keep_last": 2, "every": 2}}
    ended = run_group(assign(run, launch="second", sections=sections, eval_every=3), storage, 1)
    assert ended[0].outcome is Outcome.DONE
    assert [item.ref.step for item in read_catalog(storage, run).accepted] == [10, 8]
    assert_finished_as(storage, run, reference(1), same_history=False)
