"""What a launch was made of: real git repositories, clean, changed, too large, or none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.query import show_checkpoint
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.provenance import (
    CODE_FILE,
    DIFF,
    DIFF_BYTES,
    code_state,
    packages,
    record_provenance,
    resolved,
)
from outlast.cluster.jobs.bundle import bundle
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.worker_group import run_group, tiny_config


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit of a package with a module in a folder."""
    folder = tmp_path / "code"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine/model.py").write_text("WIDTH = 4\nDEPTH = 2\n")
    (folder / "run.yaml").write_text("name: a\n")
    git(folder, "init")
    git(folder, "remote", "add", "origin", "https://me:hunter2-token@example.com/mine.git")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


def test_a_clean_repository(repository: Path) -> None:
    found = code_state(repository / "mine")
    assert found["git"] == git(repository, "rev-parse", "HEAD")
    assert (found["changed"], found[DIFF], found["diff_cut"]) == ([], "", False)
    assert found["remote"] == "https://example.com/mine.git"


def test_the_diff_makes_the_code_again(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applied to a clean clone: changed files of code; what is not tracked is named only."""
    monkeypatch.setenv("OUTLAST_TEST_UNRELATED", "DEPTH = 3")  # no credential by its name
    (repository / "mine/model.py").write_text("WIDTH = 8\nDEPTH = 3\n")
    (repository / "mine/new.py").write_text("A = 1\n\x0c\nB = 2")  # no newline at its end
    (repository / "mine/empty.py").write_text("")
    (repository / "data.bin").write_bytes(b"\x00\xff")
    (repository / "local.env").write_text("TOKEN=of-mine")
    (repository / "secrets.yaml").write_text("password: of-mine")
    (repository / ".hidden.py").write_text("TOKEN = 'of-mine'")
    before = git(repository, "status", "--porcelain")
    found = code_state(repository)
    assert git(repository, "status", "--porcelain") == before
    assert set(found["changed"]) == {
        "mine/model.py",
        "mine/new.py",
        "mine/empty.py",
        "data.bin",
        "local.env",
        "secrets.yaml",
        ".hidden.py",
    }
    assert set(found["untracked"]) == set(found["changed"]) - {"mine/model.py"}
    assert "of-mine" not in json.dumps(found)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", str(repository), str(clone))
    (tmp_path / "code.diff").write_text(found[DIFF])
    git(clone, "apply", str(tmp_path / "code.diff"))
    assert (clone / "mine/model.py").read_bytes() == (repository / "mine/model.py").read_bytes()
    assert git(clone, "status", "--porcelain") == "M mine/model.py"


def test_a_tracked_file_of_credentials_is_named_only(repository: Path) -> None:
    (repository / "mine/Secrets.yaml").write_text("password: first\n")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "second")
    (repository / "mine/Secrets.yaml").write_text("password: of-mine\n")
    found = code_state(repository)
    assert found["changed"] == ["mine/Secrets.yaml"]
    assert found[DIFF] == ""


def test_credentials_in_the_code_are_left_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-very-secret-1234")
    monkeypatch.setenv("DATABASE_URL", "postgres://me:canary-1@host/db")
    lines = ["KEY = 'sk-very-secret-1234'", "URL = 'postgres://me:canary-1@host/db'", "PASSWORD = 'canary-1'"]
    (repository / "mine/model.py").write_text("\n".join([*lines, "T = 'ghp_" + "a1B" * 12 + "'\n"]))
    (repository / "of-canary-1.py").write_text("")
    found = code_state(repository)
    assert "sk-very-secret" not in json.dumps(found)
    assert "canary-1" not in json.dumps(found)
    assert "a1Ba1B" not in json.dumps(found)
    assert "KEY = '<MY_API_KEY>'" in found[DIFF]


@pytest.mark.parametrize("num_lines", [20_000, 200_000])
def test_a_large_diff_is_cut_and_says_so(repository: Path, num_lines: int) -> None:
    (repository / "mine/model.py").write_text("".join(f"NUMBER_{number} = {number}\n" for number in range(num_lines)))
    found = code_state(repository)
    assert found["diff_cut"]
    assert 0.9 * DIFF_BYTES < len(found[DIFF].encode()) <= DIFF_BYTES


def test_no_repository(tmp_path: Path) -> None:
    found = code_state(tmp_path)
    assert found["git"] is None
    assert "not a git repository" in found["why"]
    assert DIFF not in found


def test_a_submission_takes_along_what_git_says(repository: Path) -> None:
    """The folder that travels has no `.git`, and whoever asks there is told what was known at home."""
    (repository / "mine/model.py").write_text("WIDTH = 8\n")
    at_home = code_state(repository)
    with bundle({"name": "a"}, repository) as folder:
        assert not (folder / "work/.git").exists()
        assert (folder / "work" / CODE_FILE).is_file()
        assert code_state(folder / "work") == at_home


def test_the_environment_stays_outside(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLAST_TEST_DATA", text_file)
    declared = tiny_config("run", str(tmp_path), "${env:OUTLAST_TEST_DATA}").model_dump(
        mode="json", exclude_defaults=True
    )
    config = RunConfig.model_validate(tiny_config("run", str(tmp_path), text_file).model_dump(exclude_defaults=True))
    whole = resolved(config, declared)
    assert whole["data"]["train"] == "${env:OUTLAST_TEST_DATA}"
    assert whole["train"]["clip"] == 1.0, "defaults are there"
    assert whole["model"]["class"] is None
    assert text_file not in json.dumps(whole)


def test_a_checkpoint_names_the_record_of_its_launch(
    assign: Callable[..., Assignment], storage: LocalStorage, repository: Path
) -> None:
    assignment = assign("recorded", steps=3)
    config = RunConfig.model_validate(dict(assignment.declared))
    (repository / "mine/model.py").write_text("WIDTH = 8\n")
    prepared, store = prepare(config, storage), RunStore(storage, "recorded")
    thread = record_provenance(store, config, assignment.declared, "first", prepared, str(repository))
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    thread.join(60)
    place = show_checkpoint(RunStore(storage, "recorded"))["record"]
    assert place == f"{storage.url}/recorded/launches/first/record.json"
    body = json.loads(Path(place).read_text())
    assert body["code"]["git"] == git(repository, "rev-parse", "HEAD")
    assert body["packages"] == packages()
    assert body["packages"]["torch"]
    assert body["data"]["fingerprint"] == assignment.prepared.fingerprint
    assert body["machine"]["memory"] > 10**8
    assert body["settings"]["train"]["steps"] == 3
    assert "WIDTH = 8" in Path(place).with_name(DIFF).read_text()
    [attempt] = list_attempts(RunStore(storage, "recorded"))
    claim = read_claim(RunStore(storage, "recorded"), attempt)
    assert claim["record"] == "recorded/launches/first/record.json"
    assert claim["workers"][0]["cpus"] >= 1
