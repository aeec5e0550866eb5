"""Paths and URLs mean what they say, or are refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage.factory import Location, open_storage, parse_location
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.data.sources import find_data_files
from tests.support.groups.worker_group import tiny_config


@dataclass(frozen=True)
class Bytes:
    """A PathLike whose path is bytes."""

    path: bytes

    def __fspath__(self) -> bytes:
        return self.path


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("runs", Path("runs")),
        ("./runs", Path("runs")),
        ("/x/runs", Path("/x/runs")),
        ("~/runs", Path.home() / "runs"),
        ("exp:1/runs", Path("exp:1/runs")),
        ("a b#c?d%20", Path("a b#c?d%20")),
        (Path("s3:/x"), Path("s3:/x")),
        (Path("~/runs"), Path.home() / "runs"),
        (Bytes(b"/x/\xff"), Path(os.fsdecode(b"/x/\xff"))),
        ("file:///x/runs", Path("/x/runs")),
        ("FILE:///x/runs", Path("/x/runs")),
        ("file://localhost/x", Path("/x")),
        ("file://LOCALHOST/x", Path("/x")),
        ("file:///a%20b", Path("/a b")),
        ("file:///a#b?c", Path("/a#b?c")),
        ("s3://bucket/x", "s3://bucket/x"),
        ("S3://Bucket/X?region=a", "s3://Bucket/X?region=a"),
        ("gs://bucket", "gs://bucket"),
    ],
    ids=str,
)
def test_what_a_location_means(location: Location, expected: Path | str) -> None:
    assert parse_location(location) == expected


@pytest.mark.parametrize(
    ("location", "message", "hint"),
    [
        ("file://./runs", "names a file on the host '.', not a path", "write the path alone, such as ./runs"),
        ("file://~/runs", "names a file on the host '~'", "such as ~/runs"),
        ("file://server/share", "on the host 'server'", "file:/// and an absolute path"),
        ("file://runs", "on the host 'runs'", "such as runs"),
        ("file://me:secret@server/x", "file://server/x names", ""),
        ("file:/x/runs", "did you mean /x/runs?", ""),
        ("file:runs", "did you mean runs?", "./file:runs"),
        ("s3:/bucket/x", "did you mean s3://bucket/x?", ""),
        ("s3:bucket", "did you mean s3://bucket?", ""),
        ("exp:/x", "did you mean exp://x?", "./exp:/x"),
        ("", "'' is not a path", ""),
        ("a\0b", "is not a path", ""),
        ("~no-such-user-here/runs", "no-such-user-here", "absolute path"),
        ("runs://x/y", "Unrecognized filesystem type", ""),
        ("s3://", "names no bucket", "s3://bucket/prefix"),
        ("gs:///runs", "names no bucket", ""),
        (None, "None is neither a path nor a URL", "s3://bucket/prefix"),
        (3, "3 is neither a path nor a URL", "s3://bucket/prefix"),
    ],
    ids=repr,
)
def test_what_is_refused(location: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_storage(location)
    assert message in caught.value.message
    assert "secret" not in caught.value.message + caught.value.hint
    assert hint in caught.value.hint


@pytest.mark.parametrize("make", [str, Path, lambda path: f"file://{path}", lambda path: LocalStorage(Path(path))])
def test_one_run_by_every_kind_of_location(make: type, tmp_path: Path) -> None:
    where = make(str(tmp_path / "exp:1 runs"))
    model = nn.Linear(1, 1)
    assert Checkpointer(where, "run").save(1, model, None, {"step": 1})
    assert [item.ref.step for item in read_catalog(where, "run").accepted] == [1]
    assert (tmp_path / "exp:1 runs/run/attempts").is_dir()


def test_settings_take_paths(tmp_path: Path) -> None:
    config = tiny_config("run", str(tmp_path), "x", sections={"checkpoint": {"storage": tmp_path / "runs"}})
    assert config.checkpoint.storage == str(tmp_path / "runs")
    config = tiny_config("run", str(tmp_path), "x", sections={"data": {"train": [tmp_path / "a", tmp_path / "b"]}})
    assert config.data.train == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("storage", ["file://./runs", "file:/x", "s3:/bucket", ""])
def test_settings_refuse_what_is_no_location(storage: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.storage"):
        tiny_config("run", storage, "x")


def test_a_data_file_of_a_file_url(tmp_path: Path) -> None:
    (tmp_path / "part 1.txt").write_text("a\n")
    (tmp_path / "part 2.txt").write_text("b\n")
    url = f"FILE://localhost{tmp_path}"
    assert [Path(item.path).name for item in find_data_files(f"{url}/part%201.txt")] == ["part 1.txt"]
    assert len(find_data_files(f"{url}/part ?.txt")) == 2
