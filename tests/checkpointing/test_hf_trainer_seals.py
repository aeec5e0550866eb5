"""Seals: what is sealed is durable and proven, what is not whole is passed over with its reason, nothing is deleted."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError, NoCheckpointError, StorageError
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.hf_trainer_seals import newest_sealed, seal
from tests.support.groups.worker_group import start_script


def save(output_dir: Path, step: int) -> Path:
    """A checkpoint as a script of somebody else writes it, not sealed."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(bytes([step % 256]) * 100_000)
    (folder / "deep" / "state.json").write_text(f'{{"step": {step}}}')
    (folder / "empty").touch()
    return folder


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """Two sealed checkpoints, the tenth and the ninth: numbers count, not names."""
    for step in (9, 10):
        seal(save(tmp_path, step))
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-latest").touch()
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def test_a_manifest_lists_every_file(output_dir: Path) -> None:
    manifest = Manifest.parse((output_dir / "checkpoint-10" / "manifest.json").read_bytes())
    assert [entry.path for entry in manifest.files] == ["deep/state.json", "empty", "model.bin"]
    assert (manifest.ref.step, manifest.world_size, manifest.num_bytes) == (10, 1, 100_012)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip(folder / "model.bin"), "model.bin: bytes changed"),
    "flipped-deep": (lambda folder: flip(folder / "deep/state.json"), "deep/state.json: bytes changed"),
    "truncated": (
        lambda folder: os.truncate(folder / "model.bin", 9),
        "model.bin: 9 bytes, not the 100,000 that were committed",
    ),
    "missing": (lambda folder: (folder / "empty").unlink(), "empty: missing"),
    "extra": (lambda folder: (folder / "more").touch(), "more: extra file"),
    "manifest-flipped": (lambda folder: flip(folder / "manifest.json"), "manifest.json: it"),
    "manifest-torn": (lambda folder: os.truncate(folder / "manifest.json", 200), "manifest.json: it is not a manifest"),
    "manifest-of-another": (
        lambda folder: shutil.copy(folder.parent / "checkpoint-9" / "manifest.json", folder),
        "manifest.json: it belongs to checkpoint-9",
    ),
    "not-sealed": (lambda folder: (folder / "manifest.json").unlink(), "there is no seal"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_whole_is_passed_over(name: str, output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage, reason = DAMAGES[name]
    with caplog.at_level(logging.WARNING):
        assert newest_sealed(output_dir) == str(output_dir / "checkpoint-10")
        assert caplog.messages == []
        damage(output_dir / "checkpoint-10")
        before = everything(output_dir)
        assert newest_sealed(output_dir) == str(output_dir / "checkpoint-9")
    (message,) = caplog.messages
    assert message.startswith(f"passed over {output_dir / 'checkpoint-10'}: {reason}")
    assert everything(output_dir) == before, "nothing is deleted or changed"


def test_never_from_zero_while_there_are_seals(output_dir: Path) -> None:
    for step in (9, 10):
        flip(output_dir / f"checkpoint-{step}" / "model.bin")
    save(output_dir, 11)
    before = everything(output_dir)
    with pytest.raises(NoCheckpointError, match=r"checkpoint-10: model\.bin: bytes changed") as caught:
        newest_sealed(output_dir)
    assert "checkpoint-9" in caught.value.message
    assert "checkpoint-11" not in caught.value.message
    assert everything(output_dir) == before


def test_none_where_nothing_was_ever_sealed(tmp_path: Path) -> None:
    assert newest_sealed(tmp_path / "not-there") is None
    save(tmp_path, 1)
    assert newest_sealed(tmp_path) is None


def test_a_checkpoint_may_be_written_and_sealed_again(output_dir: Path) -> None:
    flip(output_dir / "checkpoint-10" / "model.bin")
    seal(save(output_dir, 10))
    assert newest_sealed(output_dir) == str(output_dir / "checkpoint-10")


@pytest.mark.parametrize("name", ["checkpoint-7", "checkpoint-07", "model"])
def test_what_cannot_be_sealed(name: str, tmp_path: Path) -> None:
    if name != "checkpoint-7":
        save(tmp_path, 8).rename(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name}: it is not a checkpoint-N directory"):
        seal(tmp_path / name)


def test_a_seal_is_durable_in_the_right_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory before the manifest has a name, and its name before `seal` returns."""
    folder = save(tmp_path, 3)
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        done.append("temporary" if path.name.endswith(".tmp") else str(path.relative_to(tmp_path)))
        fsync(fd)

    def recorded_replace(source: Path, target: Path) -> None:
        done.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    seal(folder)
    files = {"checkpoint-3/model.bin", "checkpoint-3/empty", "checkpoint-3/deep/state.json"}
    assert set(done[:-4]) == files | {"checkpoint-3/deep", "checkpoint-3"}
    assert done[-4:] == [".", "temporary", "rename to manifest.json", "checkpoint-3"]
    assert max(done.index(name) for name in files) < done.index("checkpoint-3")
    assert done.index("checkpoint-3/deep/state.json") < done.index("checkpoint-3/deep") < done.index("checkpoint-3")


def test_a_disk_that_fails_leaves_no_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 3)

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="cannot sync"):
        seal(folder)
    assert not (folder / "manifest.json").exists()


AGREE = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from outlast.checkpointing import newest_sealed
dist.init_process_group("gloo")
folder = Path(sys.argv[1], os.environ["RANK"])
Path(folder, "found").write_text(newest_sealed(folder))
"""


def test_all_ranks_agree(tmp_path: Path) -> None:
    """Each with a directory of its own, as `save_on_each_node` has it, and one rank's newest is damaged."""
    for rank in "01":
        for step in (1, 2, 3):
            seal(save(tmp_path / rank, step))
    flip(tmp_path / "0" / "checkpoint-3" / "model.bin")
    shutil.rmtree(tmp_path / "1" / "checkpoint-2")
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    processes = start_script(script, [str(tmp_path)], 2)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in "01":
        assert (tmp_path / rank / "found").read_text() == str(tmp_path / rank / "checkpoint-1")
