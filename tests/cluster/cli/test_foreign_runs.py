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
from typer.testing import CliRunner

from outlast.checkpointing.errors import ConfigError, DamagedError, NoCheckpointError, OutlastError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.forged import add_file, forge_manifest
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


# -- values of wrong types ---------------------------------------------------------------------------------------------

READERS = [
    "list --storage {}/..",
    "status {}",
    "report {} -o page",
    "checkpoints ls {}",
    "checkpoints export {} newest out",
]
LONE = "\ud800"  # half of a surrogate pair: JSON can hold it, UTF-8 cannot
CLAIMS: dict[str, Any] = {
    "settings": [["a"], [], "x", {"model": [1], "data": [1], "checkpoint": [1]}, {"data": {"train": [1]}}, {"a": LONE}],
    "workers": ["x", {"a": 1}, [1], [[]]],
    "claimed_at": [[], 1e308, -1e308],
    "world_size": [{}, "x"],
    "versions": [[1], "x"],
}


@pytest.mark.parametrize("key", CLAIMS)
def test_a_claim_with_values_of_wrong_types_is_read(key: str, made: Path, tmp_path: Path) -> None:
    [path] = made.glob("attempts/*/claim.json")
    right = json.loads(path.read_bytes())
    for wrong in CLAIMS[key]:
        path.write_text(json.dumps({**right, key: wrong}))
        _read(made, tmp_path)


@pytest.mark.parametrize("key", ["t", "began", "exit_code", "progress", "ended", "pid", "error"])
def test_a_liveness_file_with_values_of_wrong_types_is_read(key: str, made: Path, tmp_path: Path) -> None:
    folder = made / "launches" / "first"
    folder.mkdir(parents=True, exist_ok=True)
    right = {"beat": 1, "t": 1.0, "began": 1.0, "host": "a", "pid": 1, "started": "1", "ended": True, "exit_code": 0}
    wrongs: list[Any] = [{}, [], "x", 10**400, 1e308]
    for wrong in wrongs:
        (folder / "alive.json").write_text(json.dumps({**right, key: wrong}))
        _read(made, tmp_path)
    (folder / "alive.json").write_text(json.dumps({name: value for name, value in right.items() if name != key}))
    _read(made, tmp_path)


def test_a_record_with_values_of_wrong_types_is_read(made: Path, tmp_path: Path) -> None:
    folder = made / "launches" / "first"
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [
        {"settings": [1]},
        {"settings": {"model": [1]}},
        {"code": 1.5},
        {"code": {"git": 1, "num_changed": {}}},
    ]
    for wrong in records:
        (folder / "record.json").write_text(json.dumps(wrong))
        _read(made, tmp_path)


def _read(run: Path, tmp_path: Path) -> None:
    """Run the verbs that show what they find; each succeeds."""
    for verb in READERS:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = verb.format(run).split()
        words = [str(tmp_path / word) if word in ("out", "page") else word for word in words]
        assert outlast(*words) is None, words


WRONG_STATES: dict[str, Any] = {
    "step": 1,
    "metrics": ["x"],
    "log_history": [{"loss": 1.0}],
    "unlogged": [1.0],
    "scaler": 3,
    "groups": [{"params": 1}],
    "left_out": "x",
}


@pytest.mark.parametrize("key", WRONG_STATES)
def test_a_loop_state_that_no_loop_saved_is_named(
    key: str, made: Path, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    newest = max(made.glob("attempts/*/checkpoint-*"), key=lambda path: path.name)
    state = json.loads((newest / "training_state/state.json").read_bytes())
    add_file(newest, "training_state/state.json", json.dumps({**state, key: WRONG_STATES[key]}).encode())
    shutil.move(made, storage.path(name := f"foreign-state-{key.replace('_', '-')}"))
    error = run_group(assign(name, launch="again", steps=2, eval_every=None), storage, 1)[0].error
    assert isinstance(error, DamagedError)
    assert f"training_state/state.json: {key} cannot be that of this run" in error.message
    assert "checkpoint-2" in error.message


@pytest.mark.parametrize(
    "declaration",
    [{"data": {"a": 1}}, {"mathematics": [1]}, {"versions": 3, "world_size": "x"}, {"mathematics": {"model": "x"}}],
    ids=range(4),
)
def test_a_declaration_of_any_form_is_shown(declaration: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """A loop of the user's own may declare what it likes."""
    for folder in models(made):
        forge_manifest(folder, lambda body: body.update(extra={"declaration": declaration}, metrics={"eval_loss": 1.0}))
    _read(made, tmp_path)
    assert outlast("checkpoints", "diff", made, "newest", "newest") is None


@pytest.mark.parametrize("config", [b"[" * 500 + b"]" * 500, b"no JSON", b"[1]", b"3"], ids=range(4))
def test_a_configuration_that_is_none_is_named(
    config: bytes, made: Path, assign: Callable[..., Assignment], storage: LocalStorage, request: pytest.FixtureRequest
) -> None:
    for folder in models(made):
        add_file(folder, "config.json", config)
    shutil.move(made, storage.path(name := f"foreign-config-{request.node.callspec.id}"))
    error = run_group(assign(name, launch="again", steps=2, eval_every=None), storage, 1)[0].error
    assert isinstance(error, DamagedError)
    assert "checkpoint-2: config.json is no configuration" in error.message


def test_a_layout_of_no_text_is_another_layout(
    made: Path, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    for folder in models(made):
        forge_manifest(folder, lambda body: body["extra"].get("declaration", {}).update(layout=None))
    shutil.move(made, storage.path("foreign-layout"))
    error = run_group(assign("foreign-layout", launch="again", steps=2, eval_every=None), storage, 1)[0].error
    assert isinstance(error, ConfigError)
    assert "the model differs from the one that run" in error.message


def test_a_declaration_without_settings_is_other_settings(
    made: Path, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    for folder in models(made):
        forge_manifest(folder, lambda body: body["extra"].update(declaration={"note": 1}))
    shutil.move(made, storage.path("foreign-declaration"))
    error = run_group(assign("foreign-declaration", launch="again", steps=2, eval_every=None), storage, 1)[0].error
    assert isinstance(error, ConfigError)
    assert "was started with other settings" in error.message


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
