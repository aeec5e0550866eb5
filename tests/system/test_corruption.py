"""Damage is found, named, and never loaded: the run goes on from the newest checkpoint that is whole, or not at all.

One run is made and stopped once (checkpoints at steps 3, 6 and 7); each case damages a copy of it. Most cases resume in
this process; a handful go through real ranks to the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, NoCheckpointError, StorageError
from outlast.checkpointing.format.layout import CLAIM, MANIFEST, checkpoint_dir
from outlast.checkpointing.restore.verify import tensor_digests, verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.loop.optimizer import make_optimizer
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.conftest import Reference
from tests.support.groups.worker_group import StopAt, digests, losses, resumed, run_group
from tests.support.small_model import digests_of

BASE = "corrupt-base"
STEPS = [7, 6, 3]
EXTRA = "model-00001-of-00002.safetensors"
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_state/optimizer-00000-of-00002.safetensors",
    "training_state/optimizer-00001-of-00002.safetensors",
    "training_state/state.json",
    MANIFEST,
]

# -- damages -----------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_a_block(path: Path) -> None:
    """64 KiB of zeros in the middle, or the whole file when it is smaller: what a lost disk block looks like."""
    data = bytearray(path.read_bytes())
    begin = max(0, len(data) // 2 - 2**15)
    data[begin : begin + 2**16] = bytes(len(data[begin : begin + 2**16]))
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_one_byte_of_many(path: Path) -> None:
    """The shortest truncation; two bytes for a manifest, whose last byte is a line end that says nothing."""
    path.write_bytes(path.read_bytes()[: -2 if path.name == MANIFEST else -1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


Damage = Callable[[Path], None]
DAMAGES: list[Damage] = [flip_a_bit, zero_a_block, cut_in_half, cut_one_byte_of_many, grow, remove]
SAID = {
    flip_a_bit: "bytes changed",
    zero_a_block: "bytes changed",
    cut_in_half: "that were committed",
    cut_one_byte_of_many: "that were committed",
    grow: "that were committed",
    remove: "missing",
}

# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(storage: LocalStorage, assign: Callable[..., Assignment]) -> str:
    """The undamaged run, stopped at step 7."""
    ended = run_group(assign(BASE), storage, 2, StopAt(6))
    assert [item.outcome for item in ended] == [Outcome.STOPPED] * 2
    found = read_catalog(storage, BASE)
    assert [item.ref.step for item in found.accepted] == STEPS
    assert sorted([entry.path for entry in found.accepted[0].files] + [MANIFEST]) == sorted(FILES), "FILES lacks one"
    return BASE


@pytest.fixture
def copied(base: str, storage: LocalStorage, request: pytest.FixtureRequest) -> str:
    """A copy of the run under a name of its own; a manifest holds no run's name, so it stays valid."""
    run = "corrupt-" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    shutil.copytree(storage.path(base), storage.path(run))
    return run


@pytest.fixture(scope="module")
def model(base: str, storage: LocalStorage, assign: Callable[..., Assignment]) -> nn.Module:
    assignment = assign(base)
    settings: ModelSettings = assignment.config.model
    tokenizer = assignment.prepared.tokenizer(storage)
    task = CausalLM(assignment.config.data, tokenizer, {})
    return build_model(settings, task, tokenizer, assignment.config.seed, fresh=True)[0]


def folder(storage: LocalStorage, run: str, index: int = 0) -> Path:
    """Where the newest checkpoint lies, or the one `index` places before it."""
    return storage.path(checkpoint_dir(run, read_catalog(storage, run).accepted[index].ref))


def contents(storage: LocalStorage, run: str) -> dict[str, str]:
    """Every file of a run with its SHA-256, but for claims and journals."""
    root = storage.path(run)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != CLAIM and path.suffix != ".jsonl"
    }


def resume_here(
    storage: LocalStorage, run: str, model: nn.Module, assignment: Assignment
) -> tuple[int, dict[str, str]]:
    """Resumes in this process. Returns the step and the digests of what is in the model and its optimizer now."""
    optimizer = make_optimizer(model, assignment.config.train)
    checkpointer = Checkpointer(storage, run, launch="here")
    state = checkpointer.resume(model, optimizer)
    checkpointer.flush()
    assert state is not None
    return state["step"], digests_of(model, optimizer)


# -- one damaged file --------------------------------------------------------------------------------------------------


def test_an_undamaged_copy_resumes_from_its_newest(
    copied: str, storage: LocalStorage, model: nn.Module, assign: Callable[..., Assignment]
) -> None:
    step, loaded = resume_here(storage, copied, model, assign(BASE))
    assert step == 7
    assert loaded == digests(storage, BASE)
    assert resumed(storage, copied)[-1]["rejected"] == []


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("which", "expected"), [("previous", 0), ("both", 2)])
def test_damage_in_the_one_before_or_in_both(
    which: str,
    expected: int,
    file: str,
    damage: Damage,
    copied: str,
    storage: LocalStorage,
    model: nn.Module,
    assign: Callable[..., Assignment],
    cover: Callable[..., None],
) -> None:
    for place in [folder(storage, copied, index) for index in ((1,) if which == "previous" else (0, 1))]:
        damage(place / file)
    whole = read_catalog(storage, BASE).accepted[expected]
    step, loaded = resume_here(storage, copied, model, assign(BASE))
    assert step == whole.ref.step
    assert loaded == tensor_digests(storage, checkpoint_dir(BASE, whole.ref), whole)
    cover(
        f"Damaged files, in {'the previous one' if which == 'previous' else 'both'}",
        damage.__name__.replace("_", " "),
        file,
    )


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_named_and_passed_by(
    file: str,
    damage: Damage,
    copied: str,
    storage: LocalStorage,
    model: nn.Module,
    assign: Callable[..., Assignment],
    cover: Callable[..., None],
) -> None:
    damage(folder(storage, copied) / file)
    found = read_catalog(storage, copied)
    if file == MANIFEST:
        assert [item.ref.step for item in found.rejected] == [7]
        assert found.rejected[0].reasons[0].startswith(f"{MANIFEST}: ")
    else:
        faults = verify(storage, checkpoint_dir(copied, found.accepted[0].ref), found.accepted[0])
        assert len(faults) == 1
        assert faults[0].startswith(f"{file}: ")
        assert SAID[damage] in faults[0]  # type: ignore[index]

    previous = read_catalog(storage, BASE).accepted[1]
    step, loaded = resume_here(storage, copied, model, assign(BASE))
    assert step == 6
    assert loaded == tensor_digests(storage, checkpoint_dir(BASE, previous.ref), previous)
    rejected = resumed(storage, copied)[-1]["rejected"]
    assert [item["checkpoint"].rsplit("/", 1)[-1] for item in rejected] == ["checkpoint-7"]
    assert all(reason.startswith(f"{file}: ") for reason in rejected[0]["reasons"])
    cover("Damaged files, in the newest", damage.__name__.replace("_", " "), file)


def test_a_stale_extra_file_is_found(
    copied: str, storage: LocalStorage, model: nn.Module, assign: Callable[..., Assignment]
) -> None:
    """from_pretrained might prefer it to what was committed."""
    shutil.copy(folder(storage, copied) / "model.safetensors", folder(storage, copied) / EXTRA)
    assert resume_here(storage, copied, model, assign(BASE))[0] == 6
    assert resumed(storage, copied)[-1]["rejected"][0]["reasons"] == [f"{EXTRA}: extra file that was never committed"]


def test_a_file_of_another_checkpoint_is_found(
    copied: str, storage: LocalStorage, model: nn.Module, assign: Callable[..., Assignment]
) -> None:
    """Whole in itself, of the right size, and stale."""
    shutil.copy(folder(storage, copied, 1) / "model.safetensors", folder(storage, copied) / "model.safetensors")
    assert resume_here(storage, copied, model, assign(BASE))[0] == 6
    assert "bytes changed" in resumed(storage, copied)[-1]["rejected"][0]["reasons"][0]


def test_a_manifest_of_another_checkpoint_is_found(copied: str, storage: LocalStorage) -> None:
    shutil.copy(folder(storage, copied, 1) / MANIFEST, folder(storage, copied) / MANIFEST)
    found = read_catalog(storage, copied)
    assert [item.ref.step for item in found.accepted] == [6, 3]
    assert "belongs to" in found.rejected[0].reasons[0]


def test_what_a_killed_writer_left_is_no_damage(
    copied: str, storage: LocalStorage, model: nn.Module, assign: Callable[..., Assignment]
) -> None:
    (folder(storage, copied) / ".model.safetensors.0badf00d.tmp").write_bytes(b"half")
    assert resume_here(storage, copied, model, assign(BASE))[0] == 7


def test_verify_names_each_bad_file(copied: str, storage: LocalStorage) -> None:
    where = folder(storage, copied)
    flip_a_bit(where / "model.safetensors")
    remove(where / "config.json")
    cut_in_half(where / "training_state/state.json")
    (where / EXTRA).write_bytes(b"stale")
    manifest = read_catalog(storage, copied).accepted[0]
    faults = dict(line.split(": ", 1) for line in verify(storage, checkpoint_dir(copied, manifest.ref), manifest))
    assert faults.keys() == {"model.safetensors", "config.json", "training_state/state.json", EXTRA}
    assert faults["config.json"] == "missing"
    assert faults["model.safetensors"] == "bytes changed, first in the 16 MiB block at byte 0"
    assert "that were committed" in faults["training_state/state.json"]
    assert faults[EXTRA] == "extra file that was never committed"


def test_a_commit_whose_manifest_has_gone_is_reported(copied: str, storage: LocalStorage) -> None:
    for index, steps in enumerate(([6, 3], [3], [])):
        remove(folder(storage, copied) / MANIFEST)
        found = read_catalog(storage, copied)
        assert [item.ref.step for item in found.accepted] == steps
        assert [item.ref.step for item in found.rejected] == STEPS[: index + 1]
        assert all("never deleted" in item.reasons[0] for item in found.rejected)
    assert not found.is_fresh


# -- through real ranks, to the end ------------------------------------------------------------------------------------


def another_width(path: Path) -> None:
    """One bit, and it still is JSON: only its digest tells."""
    text = path.read_text()
    assert '"n_embd": 32' in text
    path.write_text(text.replace('"n_embd": 32', '"n_embd": 33'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", flip_a_bit),
        ("model.safetensors", remove),
        ("training_state/optimizer-00001-of-00002.safetensors", cut_in_half),
        ("training_state/state.json", zero_a_block),
        ("config.json", another_width),
        ("config.json", zero_a_block),
        (MANIFEST, flip_a_bit),
        (MANIFEST, remove),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_all_ranks_fall_back_together_and_end_equal(
    file: str,
    damage: Damage,
    copied: str,
    storage: LocalStorage,
    assign: Callable[..., Assignment],
    reference: Callable[[int], Reference],
) -> None:
    damage(folder(storage, copied) / file)
    ended = run_group(assign(copied, launch="second"), storage, 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2, ended
    event = resumed(storage, copied)[-1]
    assert event["step"] == 6
    assert [item["checkpoint"].rsplit("/", 1)[-1] for item in event["rejected"]] == ["checkpoint-7"]
    assert event["rejected"][0]["reasons"][0].startswith(f"{file}: ")
    assert digests(storage, copied) == reference(2).digests
    assert losses(storage, copied) == reference(2).losses


def test_two_damaged_checkpoints_leave_the_third(
    copied: str,
    storage: LocalStorage,
    assign: Callable[..., Assignment],
    reference: Callable[[int], Reference],
) -> None:
    flip_a_bit(folder(storage, copied, 0) / "model.safetensors")
    flip_a_bit(folder(storage, copied, 1) / "model.safetensors")
    assert run_group(assign(copied, launch="second"), storage, 2)[0].outcome is Outcome.DONE
    assert resumed(storage, copied)[-1]["step"] == 3
    assert digests(storage, copied) == reference(2).digests


# -- a storage that does not answer proves nothing --------------------------------------------------------------------


class Flaky(LocalStorage):
    """Fails to open weights so many times, as a network file system does for a moment."""

    def __init__(self, root: Path, failures: int) -> None:
        super().__init__(root)
        self.failures = failures

    def open(self, path: str) -> BinaryIO:
        if path.endswith("model.safetensors") and self.failures:
            self.failures -= 1
            raise StorageError(f"cannot read {path}: Input/output error")
        return super().open(path)


@pytest.mark.parametrize("failures", [2, 99])
def test_a_read_that_fails_is_tried_again_and_rejects_nothing(
    failures: int, copied: str, storage: LocalStorage, model: nn.Module, assign: Callable[..., Assignment]
) -> None:
    """About a second: there are pauses between the tries."""
    flaky = Flaky(Path(storage.url), failures)
    if failures == 2:
        assert resume_here(flaky, copied, model, assign(BASE))[0] == 7
        assert resumed(storage, copied)[-1]["rejected"] == []
        return
    with pytest.raises(StorageError, match="Input/output error"):
        resume_here(flaky, copied, model, assign(BASE))
    assert flaky.failures == 99 - 3
    assert resumed(storage, copied) == []


# -- nothing whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "training_state/state.json", MANIFEST])
def test_with_nothing_whole_the_run_refuses(
    file: str, copied: str, storage: LocalStorage, assign: Callable[..., Assignment]
) -> None:
    for where in [folder(storage, copied, index) for index in range(3)]:
        flip_a_bit(where / file)
    before = contents(storage, copied)
    for launch in ("second", "third"):  # asking again changes nothing
        ended = run_group(assign(copied, launch=launch), storage, 2)
        for item in ended:
            assert isinstance(item.error, NoCheckpointError)
            assert item.error.exit_code == 5
            assert item.error.permanent
            for step in STEPS:
                assert f"checkpoint-{step}: {file}: " in item.error.message
            assert "outlast checkpoints verify" in item.error.hint
        assert contents(storage, copied) == before


def test_a_damaged_checkpoint_is_put_back_and_used(
    copied: str, storage: LocalStorage, model: nn.Module, assign: Callable[..., Assignment]
) -> None:
    """A copy of the lost file is enough, as the error's hint says."""
    for index in range(3):
        flip_a_bit(folder(storage, copied, index) / "model.safetensors")
    with pytest.raises(NoCheckpointError):
        resume_here(storage, copied, model, assign(BASE))
    shutil.copy(folder(storage, BASE) / "model.safetensors", folder(storage, copied) / "model.safetensors")
    step, loaded = resume_here(storage, copied, model, assign(BASE))
    assert (step, loaded) == (7, digests(storage, BASE))


# -- damage beside the checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [zero_a_block, remove], ids=lambda damage: damage.__name__)
def test_a_damaged_claim_does_not_let_settings_change(
    damage: Damage, copied: str, storage: LocalStorage, assign: Callable[..., Assignment]
) -> None:
    """The claim says with which settings the run was started; without it a changed one must not slip in."""
    damage(storage.path(f"{copied}/attempts/{list_attempts(RunStore(storage, copied))[0]}/{CLAIM}"))
    error = run_group(assign(copied, launch="second", lr=2e-3), storage, 1)[0].error
    assert isinstance(error, ConfigError)


def test_a_bit_in_a_claim_does_not_stop_the_run(
    copied: str, storage: LocalStorage, assign: Callable[..., Assignment]
) -> None:
    """The user changed nothing, so nobody may tell them that they did."""
    path = storage.path(f"{copied}/attempts/{list_attempts(RunStore(storage, copied))[0]}/{CLAIM}")
    body = json.loads(path.read_text())
    body["mathematics"]["train"]["lr"] *= 2
    path.write_text(json.dumps(body))
    ended = run_group(assign(copied, launch="second"), storage, 1)[0]
    assert not isinstance(ended.error, ConfigError)


def test_a_damaged_journal_costs_nothing_but_itself(copied: str, storage: LocalStorage) -> None:
    """Which checkpoints exist is decided by manifests; every single flipped bit in the commit journal is survived."""
    path = next(storage.path(copied).glob("attempts/*/commits-0-*.jsonl"))
    whole, expected = path.read_bytes(), read_catalog(storage, copied).accepted
    crashed = []
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        try:
            assert read_catalog(storage, copied).accepted == expected
        except (KeyError, ValueError, TypeError) as error:
            crashed.append(f"byte {position}: {type(error).__name__}: {error}")
    assert not crashed, f"{len(crashed)} of {len(whole)} bits stop the run: {crashed[:3]}"


def test_a_rejected_checkpoint_changes_nothing_in_the_model(copied: str, storage: LocalStorage) -> None:
    """A model of another architecture is told apart before a weight is touched."""
    stranger = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in stranger.state_dict().items()}
    with pytest.raises(ConfigError, match="checkpoint-7: the checkpoint holds the weights of another model"):
        Checkpointer(storage, copied, launch="here").resume(stranger)
    assert all(torch.equal(value, before[name]) for name, value in stranger.state_dict().items())
