"""The folder of an embedded Ray."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.checkpointing.errors import PreflightError
from outlast.cluster.driver.ray_session import _ray_folder
from outlast.cluster.fault_tolerance.failure_cause import OWN_RAY


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a short path, as Ray's sockets need; pytest's own is too long."""
    with tempfile.TemporaryDirectory(prefix="o-", dir="/tmp") as name:
        yield Path(name)


def test_ray_tmpdir_is_used(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short_path / "x"))
    folder = Path(_ray_folder())
    assert folder.parent == short_path / "x"
    assert folder.name.startswith(OWN_RAY)
    (folder / "driver").write_text("1 0")  # a driver that is gone
    assert Path(_ray_folder()).exists()
    assert not folder.exists()


def test_folders_of_others_are_neither_read_nor_removed(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short_path))
    elsewhere = short_path / "precious"
    elsewhere.mkdir()
    (elsewhere / "driver").write_text("1 0")
    (short_path / f"{OWN_RAY}link").symlink_to(elsewhere)
    for name in ("pipe", "endless", "linked"):
        (short_path / f"{OWN_RAY}{name}").mkdir(mode=0o700)
    os.mkfifo(short_path / f"{OWN_RAY}pipe" / "driver")
    (short_path / f"{OWN_RAY}endless" / "driver").symlink_to("/dev/zero")
    (short_path / f"{OWN_RAY}linked" / "driver").symlink_to(elsewhere / "driver")
    if os.geteuid() == 0:
        foreign = short_path / f"{OWN_RAY}foreign"
        foreign.mkdir()
        (foreign / "driver").write_text("1 0")
        os.chown(foreign, 1234, 1234)
    before = sorted(short_path.rglob("*"))
    folder = Path(_ray_folder())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(set(short_path.rglob("*")) - {folder, folder / "driver"}) == before


def test_a_ray_tmpdir_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(PreflightError, match=r"RAY_TMPDIR .* is too long"):
        _ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/x")
    with pytest.raises(PreflightError, match="no local Ray can be started in RAY_TMPDIR /proc/x"):
        _ray_folder()
