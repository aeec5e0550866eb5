"""A run from a stranger: no verb imports what it names, follows where it leads, or writes outside of what it is given.

The attacks are forged into a run that outlast made: a claim, a manifest or an adapter's configuration with other
content, and digests that fit.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError, DamagedError, NoCheckpointError, OutlastError
from outlast.checkpointing.format.manifest import Digester
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import run_group
from tests.trainers.models.test_lora import LORA, make_base

ATTACK = "from pathlib import Path\nPath({record!r}).write_text('ran')\nfrom torch.nn import Linear as Model\n"


@pytest.fixture
def made(assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path) -> Path:
    """A copy of a finished run, to forge."""
    if not storage.path("foreign").exists():
        assert run_group(assign("foreign", steps=2, eval_every=None), storage, 1)[0].outcome is Outcome.DONE
    return Path(shutil.copytree(storage.path("foreign"), tmp_path / "runs" / "foreign", symlinks=True))


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `evil` in the working directory; the path exists once it was imported."""
    record = tmp_path / "record"
    (tmp_path / "evil.py").write_text(ATTACK.format(record=str(record)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield record
    sys.modules.pop("evil", None)


def outlast(*arguments: object) -> OutlastError | None:
    """The error with which a command ends; None if it succeeds."""
    error = CliRunner().invoke(app, list(map(str, arguments))).exception
    assert error is None or isinstance(error, OutlastError), repr(error)
    return error


def forge_claim(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    [claim] = run.glob("attempts/*/claim.json")
    body = json.loads(claim.read_bytes())
    change(body["settings"])
    claim.write_text(json.dumps(body))


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_bytes())
    change(body)
    del body["digest"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=True)
    manifest.unlink()
    manifest.write_text(json.dumps({**body, "digest": xxhash.xxh3_128(text.encode()).hexdigest()}))


def add_file(folder: Path, name: str, data: bytes) -> None:
    """A file of the checkpoint as if it were committed; `name` may lead anywhere."""
    digester = Digester()
    digester.update(data)
    entry = digester.entry("x")

    def change(body: dict[str, Any]) -> None:
        listed = {"num_bytes": entry.num_bytes, "xxh3_128": entry.xxh3_128, "blocks": list(entry.blocks)}
        body["files"] = [item for item in body["files"] if item["path"] != name] + [{"path": name, **listed}]

    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_bytes(data)
    forge_manifest(folder, change)


def models(run: Path) -> list[Path]:
    return [path.parent for path in run.glob("attempts/*/*/manifest.json")]


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["class", "task"])
def test_no_verb_imports_what_a_claim_names(key: str, made: Path, attack: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["model"][key] = "evil:Model"

    forge_claim(made, change)
    for arguments in (
        ("try", made, "--prompt", "a"),
        ("try", made, "--prompt", "a", "--code", "."),
        ("resume", made, "--address", "http://127.0.0.1:9"),
        ("supervise", made, "--address", "http://127.0.0.1:9"),
    ):
        error = outlast(*arguments)
        assert isinstance(error, ConfigError), arguments
        assert f"names code: model.{key} evil:Model" in error.message
        assert "--trust-remote-code" in error.hint
    others = ["checkpoints ls", "checkpoints verify", "checkpoints show", "checkpoints path", "status", "report"]
    for verb in (*others, "checkpoints diff {} newest newest", "checkpoints export {} newest out"):
        outlast(*(verb if "{}" in verb else f"{verb} {{}}").format(made).split())
    assert not attack.exists()
    outlast("try", made, "--prompt", "a", "--trust-remote-code")
    assert attack.exists(), "the user's word counts"


def test_resume_imports_no_optimizer_and_no_remote_code_of_a_claim(made: Path, attack: Path) -> None:
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "train.optimizer evil:Model": lambda settings: settings["train"].update(optimizer="evil:Model"),
        "model.trust_remote_code True": lambda settings: settings["model"].update(trust_remote_code=True),
    }
    changes["train.optimizer evil:no-name"] = lambda settings: settings["train"].update(optimizer="evil:no-name")
    for shown, change in changes.items():
        forge_claim(made, change)
        error = outlast("resume", made, "--code", ".", "--address", "http://127.0.0.1:9")
        assert isinstance(error, ConfigError)
        assert shown in error.message
    assert not attack.exists()


def test_resume_writes_to_no_other_run(made: Path, tmp_path: Path) -> None:
    forge_claim(made, lambda settings: settings.update(checkpoint={"storage": str(tmp_path / "precious")}))
    error = outlast("resume", made, "--address", "http://127.0.0.1:9")
    assert isinstance(error, ConfigError)
    assert f"{tmp_path}/precious/foreign, which would be written to" in error.message
    assert f"checkpoint.storage={made.parent}" in error.hint


def test_kernels_on_the_hub_are_code(made: Path, tmp_path: Path) -> None:
    for folder in models(made):
        config = json.loads((folder / "config.json").read_bytes())
        add_file(folder, "config.json", json.dumps({**config, "attn_implementation": "evil/kernel"}).encode())
    error = outlast("try", made, "--prompt", "a")
    assert isinstance(error, ConfigError)
    assert "attn_implementation 'evil/kernel'" in error.message
    assert "--trust-remote-code" in error.hint


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../../../planted", "{outside}/planted", "a/../../planted", "a//planted"])
def test_no_path_of_a_manifest_is_written_or_read(name: str, made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    before = sorted(path for path in tmp_path.rglob("planted"))
    for folder in models(made):
        (folder / "a").mkdir()
        add_file(folder, name.format(outside=outside), b"evil")
    planted = sorted(path for path in tmp_path.rglob("planted"))
    assert planted != before
    for path in planted:
        path.unlink()
    for arguments in (
        ("try", made, "--prompt", "a"),
        *(("checkpoints", "export", made, which, tmp_path / "out" / which) for which in ("newest", "model")),
        ("checkpoints", "verify", made),
        ("checkpoints", "diff", made, "newest", "model"),
    ):
        ended = CliRunner().invoke(app, list(map(str, arguments)))
        assert isinstance(ended.exception, DamagedError | NoCheckpointError) or ended.exit_code == 5, arguments
    assert sorted(path for path in tmp_path.rglob("planted")) == before


def test_no_size_of_a_manifest_takes_memory(made: Path, tmp_path: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        [item] = [item for item in body["files"] if item["path"] == "config.json"]
        item["num_bytes"], item["blocks"] = 2**40, ["0" * 16] * 2**16

    for folder in models(made):
        forge_manifest(folder, change)
    error = outlast("checkpoints", "export", made, "newest", tmp_path / "out")
    assert error is not None
    assert "config.json: " in error.message


def test_an_export_holds_the_weights_that_outlast_wrote(made: Path, tmp_path: Path) -> None:
    for folder in models(made):
        add_file(folder, "pytorch_model.bin", b"a pickle")
    error = outlast("checkpoints", "export", made, "newest", tmp_path / "out", "--format", "pytorch")
    assert error is not None
    assert "cannot write" in error.message
    assert not (tmp_path / "out").exists()


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path, text_file: str
) -> tuple[Path, Path]:
    """A copy of an adapter's run, and its base model."""
    base = make_base(tmp_path / "base", text_file)
    model = {"path": str(base), "lora": LORA, "config": None, "tokenizer": None}
    assignment = assign("foreign-adapter", sections={"model": model}, steps=2, eval_every=None)
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    return Path(shutil.move(storage.path("foreign-adapter"), tmp_path / "foreign-adapter")), base


def test_what_an_adapter_names_is_not_followed(adapter: tuple[Path, Path], attack: Path, tmp_path: Path) -> None:
    run, base = adapter
    config = json.loads((models(run)[0] / "adapter_config.json").read_bytes())
    attacks: dict[str, dict[str, Any]] = {
        "no path that leads out of a run": {"base_model_name_or_path": str(base)},
        "imports the module 'evil'": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        "is of type 'PROMPT_TUNING'": {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
    }
    for shown, change in attacks.items():
        for folder in models(run):
            add_file(folder, "adapter_config.json", json.dumps({**config, **change}).encode())
        given = () if "base_model_name_or_path" in change else ("--base", base)
        for arguments in (
            ("try", run, "--prompt", "a", *given),
            ("checkpoints", "export", run, "newest", tmp_path / "out", "--merge", *given),
        ):
            error = outlast(*arguments)
            assert isinstance(error, ConfigError)
            assert shown in error.message
    assert not attack.exists()


def test_a_manifest_names_no_code_either(adapter: tuple[Path, Path], attack: Path, tmp_path: Path) -> None:
    run, base = adapter
    for key, name in {"class_": "evil:Model", "task": "evil"}.items():

        def change(body: dict[str, Any], key: str = key, name: str = name) -> None:
            body["extra"]["declaration"]["mathematics"]["model"][key] = name

        for folder in models(run):
            if folder.name != "model":
                forge_manifest(folder, change)
        for arguments in (
            ("try", run, "--prompt", "a", "--base", base),
            ("checkpoints", "export", run, "newest", tmp_path / "out", "--merge", "--base", base),
        ):
            error = outlast(*arguments)
            assert isinstance(error, ConfigError)
            assert f"model.{key.rstrip('_')} {name}" in error.message
    assert not attack.exists()


def test_a_model_that_claims_to_be_an_adapter_leads_nowhere(made: Path, tmp_path: Path) -> None:
    for folder in models(made):
        body = {"peft_type": "LORA", "base_model_name_or_path": "/precious"}
        add_file(folder, "adapter_config.json", json.dumps(body).encode())
    error = outlast("try", made, "--prompt", "a")
    assert isinstance(error, ConfigError)
    assert "no path that leads out of a run" in error.message
