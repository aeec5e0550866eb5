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
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.location import Location, parse_location, store_endpoints, store_ports
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
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("s3://${env:BUCKET}/x", "s3://${env:BUCKET}/x"),
        ("s3://b?endpoint_override=${env:HOST}:${env:PORT}", "s3://b?endpoint_override=${env:HOST}:${env:PORT}"),
        ("//data//runs", Path("/data/runs")),
        ("file:////data/runs", Path("/data/runs")),
        ("a/b://c", Path("a/b:/c")),
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
        ("a\ud800b", "is not a path", ""),
        (" s3://bucket/x", "is a URL after a blank", "write s3://bucket/x"),
        ("s3://bucket/x\ny", "cannot be printed", "s3://bucket/prefix"),
        ("s3://bucket/\ud800", "cannot be printed", ""),
        ("runs://x/y", "runs:// is not a kind of storage", "s3://bucket/prefix"),
        ("s3://", "names no bucket", "s3://bucket/prefix"),
        ("gs:///runs", "names no bucket", ""),
        (None, "None is neither a path nor a URL", "s3://bucket/prefix"),
        (3, "3 is neither a path nor a URL", "s3://bucket/prefix"),
        ("s3:///runs", "names no bucket", ""),
        ("s3:// /runs", "names no bucket", ""),
        ("S3A://bucket/x", "s3a:// is not", "write s3://"),
        ("azure://container/x", "azure:// is not", "write abfs://"),
        ("https://me:secret@host/x", "https:// is not", "download it"),
        ("s3://key:secret@bucket/x", "must not carry credentials", "environment"),
        ("s3://key@bucket/x", "must not carry credentials", ""),
        ("s3://key:12/secret@bucket/x", "which no bucket has", ""),
        ("s3://minio:9000/bucket", "which no bucket has", "endpoint_override=HOST:PORT"),
        ("s3://bucket?endpoint_override=key:secret@minio:9000", "must not carry credentials", ""),
        ("abfs://container:secret@account/x", "must not carry credentials", ""),
        ("s3://bucket?endpoint_override=minio:90000", "Port out of range", ""),
        ("s3://bucket?endpoint_override=minio:port", "Port could not be cast", ""),
    ],
    ids=repr,
)
def test_what_is_refused(location: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_storage(location)
    assert message in caught.value.message
    assert "secret" not in caught.value.message + caught.value.hint
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("url", "endpoints", "ports"),
    [
        ("s3://bucket/x", [], {443}),
        ("s3://bucket?endpoint_override=minio:9000", ["https://minio:9000"], {9000}),
        ("s3://bucket?endpoint_override=http://minio:9000", ["http://minio:9000"], {9000}),
        ("s3://bucket?endpoint_override=minio&scheme=http", ["http://minio"], {80}),
        ("gs://bucket?endpoint_override=[::1]:4443&scheme=http", ["http://[::1]:4443"], {4443}),
        ("abfs://c@a?blob_storage_authority=.local:10000&blob_storage_scheme=http", ["http://.local:10000"], {10000}),
        ("abfs://c@a.dfs.core.windows.net/x", [], {443}),
        ("hdfs://name-node:8021/x", [], {8021, 9866}),
        ("hdfs:///x", [], {8020, 9866}),
    ],
)
def test_servers_and_ports_of_a_store(url: str, endpoints: list[str], ports: set[int]) -> None:
    assert store_endpoints(url) == endpoints
    assert store_ports(url) == ports


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


@pytest.mark.parametrize("place", ["https://host/x.jsonl", "s3a://bucket/x", "file://x.jsonl", "s3:///x.jsonl"])
def test_settings_refuse_data_that_is_no_location(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train"):
        tiny_config("run", str(tmp_path), place)
    with pytest.raises(ValueError, match=r"data\.eval"):
        tiny_config("run", str(tmp_path), "x", sections={"data": {"train": "x", "eval": ["y", place]}})


def test_a_data_file_of_a_file_url(tmp_path: Path) -> None:
    (tmp_path / "part 1.txt").write_text("a\n")
    (tmp_path / "part 2.txt").write_text("b\n")
    url = f"FILE://localhost{tmp_path}"
    assert [Path(item.path).name for item in find_data_files(f"{url}/part%201.txt")] == ["part 1.txt"]
    assert len(find_data_files(f"{url}/part ?.txt")) == 2
