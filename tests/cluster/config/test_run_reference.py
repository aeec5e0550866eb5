"""The forms of RUN: each command that takes one finds the same run by each of them, and names the nearest otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import main
from outlast.cluster.config.run_reference import _split, find_run, run_name
from tests.cluster.jobs.test_job_server import JSON, VERSION, web_server
from tests.support.timelines import attempt, launch, start, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    first = launch("20260101-120000-a", 0, 9)
    write(LocalStorage(tmp_path / "runs"), "far-run", first, attempt(1, 0, start(1), launch=first[0]))
    body = f"name: far-run\nmodel: {{path: gpt2}}\ndata: {{train: /a.txt}}\ncheckpoint: {{storage: {tmp_path}/runs}}\n"
    (tmp_path / "far.yaml").write_text(body)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    ["far-run", "runs/far-run", "./runs/far-run/", "{folder}/runs/far-run", "file://{folder}/runs/far-run", "far.yaml"],
)
def test_one_run_by_each_form(folder: Path, text: str) -> None:
    text = text.format(folder=folder)
    assert run_name(text) == find_run(text, "./runs")[0].run == "far-run"


@pytest.mark.parametrize(("place", "text"), [("runs/far-run", "."), ("runs/far-run/attempts", "..")])
def test_the_directory_that_one_is_in(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, text: str) -> None:
    monkeypatch.chdir(folder / place)
    store = find_run(text, "./runs")[0]
    assert run_name(text) == store.run == "far-run"
    assert Path(store.storage.url) == folder / "runs"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/runs/far", ("s3://bucket/runs", "far")),
        ("s3://bucket/runs/far/", ("s3://bucket/runs", "far")),
        ("s3://bucket/runs/far?region=x", ("s3://bucket/runs?region=x", "far")),
        ("s3://bucket/runs?region=x/far", ("s3://bucket/runs?region=x", "far")),
        ("s3://bucket/runs?region=x/far/", ("s3://bucket/runs?region=x", "far")),
        ("far", (None, "far")),
    ],
)
def test_uris(text: str, expected: tuple[str | None, str]) -> None:
    assert _split(text) == expected


@pytest.mark.parametrize("text", ["", " ", "/", "s3://bucket", "s3://bucket/", "s3://bucket?region=x"])
def test_what_names_no_run(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="names no run"):
        run_name(text)
    with pytest.raises(ConfigError, match="names no run"):
        find_run(text, "./runs")


def test_a_directory_that_is_no_run_is_not_taken_for_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not usable"):
        run_name(".")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "far-rum"], 2),
        (["resume", "far-rum"], 2),
        (["supervise", "runs/far-rum"], 2),
        (["logs", "far-rum"], 3),
        (["logs", "runs/far-rum", "--follow"], 3),
        (["stop", "far-rum"], 3),
        (["stop", "far-run-1"], 3),
    ],
)
def test_the_nearest_run_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
) -> None:
    """A job's id is no run either."""
    job = '{"type": "SUBMISSION", "submission_id": "far-run-1", "entrypoint": "", "status": "SUCCEEDED", "metadata": '
    jobs = f'[{job}{{"outlast_run": "far-run"}}}}]'
    with web_server({"GET /api/version": (200, JSON, VERSION), "GET /api/jobs": (200, JSON, jobs)}) as server:
        monkeypatch.setattr("sys.argv", ["outlast", *arguments, "--address", server.place])
        with pytest.raises(SystemExit) as ended:
            main()
    error = capsys.readouterr().err
    assert ended.value.code == code, error
    assert "did you mean 'far-run'?" in error


def test_objects_are_no_run_file(tmp_path: Path) -> None:
    file = tmp_path / "run-k8s.yaml"
    file.write_text("apiVersion: v1\nkind: ConfigMap\n---\napiVersion: ray.io/v1\nkind: RayJob\n")
    with pytest.raises(ConfigError, match="is no run file: it holds objects of Kubernetes"):
        run_name(str(file))
