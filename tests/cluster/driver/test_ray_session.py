"""The folder of an embedded Ray."""

from __future__ import annotations

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


def test_a_ray_tmpdir_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(PreflightError, match=r"RAY_TMPDIR .* is too long"):
        _ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/x")
    with pytest.raises(PreflightError, match="no local Ray can be started in RAY_TMPDIR /proc/x"):
        _ray_folder()
