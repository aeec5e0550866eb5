"""Which of a user's files are sent with a job: no data, no credentials, nothing ignored, nothing from outside."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.cluster.cli.main import main
from outlast.cluster.driver.code_files import is_credential_file, select_code
from outlast.cluster.jobs.bundle import MAX_PACKAGE_BYTES, bundle, describe_bundle, warn_of_code

KEY = "-----BEGIN PRIVATE KEY-----\nMIIEcanary\n-----END PRIVATE KEY-----\n"
CREDENTIALS = [
    *(".env", "prod.env", "a.pem", "server.key", "id_rsa", "id_ed25519.pub", ".netrc", ".pypirc", "credentials.json"),
    *("aws_credentials_old.json", "client_secret_1.json", "service-account.json", "Secrets.yaml", "my_secrets.toml"),
    *("token.txt", "hf_token.txt", "kubeconfig.yaml", "kaggle.json"),
]
CODE = [
    *("model.py", "pkg/__init__.py", "pkg/secrets.py", "credentials.py", "config.json", "tokenizer.json", "tokens.txt"),
    *("special_tokens_map.json", "settings.yaml", "pyproject.toml", "vocab.txt"),
]
DATA = ["rows.jsonl", "model.safetensors", "train.csv", "pkg/__pycache__/a.py", ".hidden/a.py"]


def write(root: Path, *names: str, text: str = "canary") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def sent(code: Path) -> dict[str, str]:
    with bundle({"name": "a"}, code) as folder:
        work = folder / "work"
        files = [path for path in work.rglob("*") if path.is_file()]
        assert not any(path.is_symlink() for path in work.rglob("*"))
        names = {str(path.relative_to(work)): path.read_text() for path in files}
        return {name: text for name, text in names.items() if name not in ("run.yaml", "outlast-code.json")}


def test_code_is_sent_and_credentials_are_named(tmp_path: Path) -> None:
    write(tmp_path, *CODE, *CREDENTIALS, *DATA)
    write(tmp_path, ".aws/credentials")
    write(tmp_path, "account.json", text=f'{{"private_key": "{KEY}"}}')
    assert sent(tmp_path).keys() == set(CODE)
    found = select_code(tmp_path)
    assert found.refused.keys() == {*CREDENTIALS, ".aws", "account.json"}
    assert found.refused["account.json"] == "contains a private key"
    warned = list(warn_of_code(tmp_path))
    assert f"{tmp_path}/token.txt is not sent: it holds credentials by its name" in warned
    assert all(map(is_credential_file, CREDENTIALS))
    assert not any(is_credential_file(Path(name).name) for name in CODE)


def test_a_token_in_code_is_sent_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path, "model.py", text=f"TOKEN = 'hf_{'aB3' * 10}'")
    assert sent(tmp_path).keys() == {"model.py"}
    assert list(warn_of_code(tmp_path)) == [f"{tmp_path}/model.py is sent, and seems to contain a credential"]


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside, code = tmp_path / "outside", tmp_path / "code"
    write(outside, "private.txt", "folder/private.py")
    write(code, "model.py", "lib/a.py", text="1")
    write(code, "id_rsa", ".hidden.txt")
    (code / "file.txt").symlink_to(outside / "private.txt")
    (code / "folder").symlink_to(outside / "folder")
    (code / "lib/up").symlink_to(code)
    (code / "broken.txt").symlink_to("nothing")
    (code / "loop.txt").symlink_to("loop.txt")
    (code / ".#model.py").symlink_to("user@host.1234:1")  # an editor's lock
    (code / "key.txt").symlink_to("id_rsa")
    (code / "same.py").symlink_to("model.py")
    (code / "also").symlink_to("lib")
    found = sent(code)
    assert found.keys() == {"model.py", "lib/a.py", "same.py", "also/a.py"}
    assert "canary" not in str(found)
    refused = select_code(code).refused
    assert refused["file.txt"] == refused["folder"] == "is a link out of the folder"
    assert refused["lib/up"] == "is a link to a folder around it"
    assert refused["broken.txt"] == refused["loop.txt"] == "is a broken link"
    assert "key.txt" in refused


def test_a_code_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    write(tmp_path, "code/model.py")
    (tmp_path / "link").symlink_to("code")
    assert sent(tmp_path / "link").keys() == {"model.py"}


def test_special_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "model.py")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / ".gitignore")
    assert sent(tmp_path).keys() == {"model.py"}


def submit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: Path, *more: str) -> list[str]:
    """Submit to an address where nothing answers, which ends with 3. Return the code and all lines."""
    body = "name: a\nmodel: {path: gpt2}\ndata: {train: /data/a.txt}\ncheckpoint: {storage: /runs}\n"
    run_file = code.parent / "run.yaml"
    run_file.write_text(body)
    arguments = ["submit", str(run_file), "--code", str(code), "--address", "127.0.0.1:1", *more]
    monkeypatch.setattr("sys.argv", ["outlast", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return [str(ended.value.code), *printed.out.splitlines(), *printed.err.splitlines()]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda code: code.rmdir(), "No such file or directory"),
        (lambda code: (code.rmdir(), code.write_text("")), "Not a directory"),
        (lambda code: (code.rmdir(), code.symlink_to(code)), "a loop of links"),
        (lambda code: (code / "a.py").symlink_to("nothing"), "a.py is a broken link"),
        (lambda code: (code / "a.py").symlink_to("a.py"), "a.py is a broken link"),
        (lambda code: os.mkfifo(code / "a.py"), "a.py is no file, but a pipe"),
        (lambda code: (code / ".outlastignore").write_text("!\n"), ".outlastignore is not valid"),
    ],
    ids=["missing", "file", "loop", "dangling", "own-loop", "fifo", "ignore-file"],
)
@pytest.mark.parametrize("more", [(), ("--supervise",), ("--dry-run",)], ids=["submit", "supervise", "dry-run"])
def test_code_that_cannot_be_sent_is_named_before_anything_is_sent(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    expected: str,
    more: tuple[str, ...],
) -> None:
    (tmp_path / "code").mkdir()
    make(tmp_path / "code")
    exit_code, *lines = submit(capsys, monkeypatch, tmp_path / "code", *more)
    assert exit_code == "2", lines
    assert expected in " ".join(lines)
    assert str(tmp_path / "code") in " ".join(lines)


def test_code_that_is_too_large_is_named_with_its_largest_entries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "code/model.py", "code/data/a.json", "code/data/b.json")
    os.truncate(tmp_path / "code/data/a.json", 80_000_000)
    os.truncate(tmp_path / "code/data/b.json", 50_000_000)
    text = "has 130.0 MB, more than the 104.9 MB that a job server takes; largest: data/ 130.0 MB, model.py 6 B; "
    exit_code, *lines = submit(capsys, monkeypatch, tmp_path / "code")
    assert exit_code == "2"
    assert text + "largest file: data/a.json 80.0 MB" in " ".join(lines)
    assert ".outlastignore" in lines[-1]
    exit_code, *lines = submit(capsys, monkeypatch, tmp_path / "code", "--dry-run")
    assert exit_code == "2"
    assert "sends  data/a.json (80.0 MB)" in lines
    (tmp_path / "code/.outlastignore").write_text("data\n")
    assert submit(capsys, monkeypatch, tmp_path / "code")[0] == "3"


def test_the_limit_is_that_of_ray() -> None:
    from ray._private import ray_constants

    assert ray_constants.DASHBOARD_CLIENT_MAX_SIZE == MAX_PACKAGE_BYTES


def test_environments_caches_and_data_stay_and_are_listed(tmp_path: Path) -> None:
    write(tmp_path, "model.py", ".git/a.py", "venv/a.py", "node_modules/a/a.json", "own/pyvenv.cfg", "own/lib/a.py")
    write(tmp_path, "env/__init__.py", "data/a.parquet", "data/b.parquet", "LICENSE", "__pycache__/a.py", "a/venv.py")
    (tmp_path / os.fsdecode(b"bad\xff.py")).write_text("")
    assert sent(tmp_path).keys() == {"model.py", "env/__init__.py", "a/venv.py"}
    lines = list(describe_bundle(tmp_path, ship=False))
    listed = {line.removeprefix("leaves out  ") for line in lines if line.startswith("leaves")}
    assert listed == {".git/", "venv/", "node_modules/", "own/", "data/*.parquet (2 files)", "LICENSE", "__pycache__/"}
    assert any("has a name that is not UTF-8" in line for line in warn_of_code(tmp_path))
    assert lines[-1] == f"in all 3 files of {tmp_path}, 18 B"


def test_a_dry_run_lists_before_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "code/model.py")
    exit_code, *lines = submit(capsys, monkeypatch, tmp_path / "code", "--dry-run", "-s", "checkpoint.storage=runs")
    assert exit_code == "2"
    assert "sends  model.py (6 B)" in lines
    assert "checkpoint.storage is 'runs'" in " ".join(lines)


@pytest.mark.parametrize("in_repository", [False, True])
def test_ignore_files(tmp_path: Path, in_repository: bool) -> None:
    """As git reads them: nearer ones win, `!` takes back, a slash anchors; those above count in a repository only."""
    code = tmp_path / "code"
    names = ["a.py", "a.json", "build/a.py", "pkg/a.json", "pkg/b.json", "pkg/private/a.py", "pkg/x/deep.py", "top.py"]
    write(code, *names)
    (tmp_path / ".gitignore").write_text("top.py\n")
    (code / ".gitignore").write_text("*.json\n/build/\n# nothing\n")
    (code / "pkg/.gitignore").write_text("!b.json\n")
    if in_repository:
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
        command = ["git", "-C", str(code), "ls-files", "--others", "--exclude-standard"]
        by_git = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert sent(code).keys() == {name for name in by_git if not name.endswith(".gitignore")}
    (code / ".outlastignore").write_text("private/\n**/deep.py\n!/a.json\n")
    expected = {"a.py", "a.json", "pkg/b.json", "top.py"} - ({"top.py"} if in_repository else set())
    assert sent(code).keys() == expected
    lines = list(describe_bundle(code, ship=False))
    assert "ignores  build/" in lines
    (code / ".outlastignore").write_text("private/\n**/deep.py\n!/a.json\npkg/b.json\n")
    assert "pkg/b.json" not in sent(code), "it has the last word over a nearer .gitignore"
    assert {line.split()[1] for line in lines if line.startswith("sends")} >= expected


def test_a_dry_run_lists_what_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cluster: nothing is connected to."""
    write(tmp_path, "code/model.py", "code/token.txt", "code/skipped.txt")
    (tmp_path / "code/.outlastignore").write_text("skipped.txt\n")
    (tmp_path / "code/evil\x1b[2J\n.py").write_text("")
    body = "name: a\nmodel: {path: gpt2}\ndata: {train: /data/a.txt}\ncheckpoint: {storage: /runs}\n"
    (tmp_path / "run.yaml").write_text(body)
    arguments = ["submit", str(tmp_path / "run.yaml"), "--code", str(tmp_path / "code"), "--dry-run"]
    monkeypatch.setattr("sys.argv", ["outlast", *arguments])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://192.0.2.1:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-1")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert {
        "sends  run.yaml",
        "sends  model.py (6 B)",
        "ignores  skipped.txt",
        "sends  evil\\x1b[2J\\n.py (0 B)",
    } <= set(lines)
    assert "token.txt is not sent" in printed.err
    assert "the job server at http://192.0.2.1:1 gets a token unencrypted" in printed.err
    assert "canary" not in printed.out + printed.err
