"""Credentials in run files: neither stored nor echoed; `${env:NAME}` is expanded for use only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_file import SettingsError, load_run, settings_of
from outlast.cluster.preflight.validate import validate

BODY = {
    "name": "run",
    "model": {"config": {"model_type": "gpt2"}, "tokenizer": {"train_bpe": 300}},
    "data": {"train": "rows.txt"},
    "train": {"steps": 1, "batch": 1},
}


def run_file(folder: Path, **settings: object) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**BODY, **settings}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"train": "https://me:canary@host/rows.txt"}},
        {"data": {"train": ["a.txt", "s3://b/rows.txt?secret_key=canary"]}},
        {"checkpoint": {"storage": "s3://AKIAIOSFODNN7EXAMPLE:canary@bucket/runs"}},
        {"track": {"options": {"wandb": {"entity": "hf_" + "canary1" * 5}}}},
        {"failure": {"note": "canary-1, the value of a variable"}},
    ],
)
def test_a_credential_in_a_run_file_is_refused(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-1")
    path = run_file(tmp_path, **settings)
    refused = r"holds a credential.*write \$\{env:NAME\}|must not carry credentials|https:// is not a kind of storage"
    with pytest.raises(SettingsError, match=refused) as caught:
        load_run(path)
    assert caught.value.exit_code == 2
    assert "line" in caught.value.message
    assert "canary" not in f"{caught.value} {caught.value.hint}"


def test_one_remedy_is_named_for_a_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must not contain one") as caught:
        load_run(run_file(tmp_path, model={"path": "hf_" + "canary1" * 5}))
    assert [found.finding.key for found in caught.value.findings] == ["model.path"]


@pytest.mark.parametrize(
    "option",
    [
        "data.train=https://me:canary@h/a.txt",
        "train.lr=sk-canarycanarycanarycanary",
        "nonsense?token=canary",
        "track.options={wandb: {api_key: canary}}",
        "train.password=canary",
        "name.password=canary",
        "train.token=[canary",
    ],
)
def test_a_credential_in_an_option_is_not_echoed(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(tmp_path), [option])
    assert "canary" not in f"{caught.value} {caught.value.hint}"


def test_variables_keep_credentials_out_of_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PASSWORD", "canary-1")
    written = "s3://bucket/rows.txt?secret_key=${env:DATA_PASSWORD}"
    config, declared = load_run(run_file(tmp_path, data={"train": written}))
    assert config.data.train == "s3://bucket/rows.txt?secret_key=canary-1", "what is used is whole"
    assert declared["data"]["train"] == written
    assert "canary" not in json.dumps(declared)


def test_what_is_stored_is_not_checked_again(tmp_path: Path) -> None:
    """A run of an earlier release resumes whatever its settings hold."""
    stored = {**BODY, "data": {"train": "s3://bucket/rows.txt?secret_key=canary"}}
    assert settings_of(stored, "run")[0].data.train == "s3://bucket/rows.txt?secret_key=canary"


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"steps": 1, "batch": 1, "lr": "${env:OF_NO_SECRET_NAME}"}},
        {"train": {"steps": "${env:OF_NO_SECRET_NAME}", "batch": 1}},
        {"data": {"train": "rows.txt", "eval": ["${env:OF_NO_SECRET_NAME}"], "eval_share": "${env:OF_NO_SECRET_NAME}"}},
        {"checkpoint": {"every": "${env:OF_NO_SECRET_NAME}"}},
        {"scale": {"workers": "${env:OF_NO_SECRET_NAME}"}},
    ],
)
def test_an_error_shows_the_variable_and_not_its_value(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_NO_SECRET_NAME", "canary 1'\n\"")
    path = run_file(tmp_path, **settings)
    with pytest.raises(SettingsError) as caught:
        load_run(path)
    assert "canary" not in str(caught.value)
    assert "canary" not in json.dumps([item.as_json() for item in validate(path)])


def test_settings_of_the_numbers_hold_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stored with each checkpoint, expanded."""
    monkeypatch.setenv("MY_TOKEN", "canary-1")
    model = {"config": {"model_type": "gpt2", "some_name": "${env:MY_TOKEN}"}, "tokenizer": {"train_bpe": 300}}
    with pytest.raises(SettingsError, match="must not contain one") as caught:
        load_run(run_file(tmp_path, model=model))
    assert "canary" not in str(caught.value)


def test_a_line_break_in_a_setting_forges_no_finding(tmp_path: Path) -> None:
    path = run_file(tmp_path, **{"x\n  line 9: all is well\x1b[0m": 1})
    with pytest.raises(SettingsError) as caught:
        load_run(path)
    assert [line for line in str(caught.value).splitlines() if line.startswith("  line 9")] == []
    assert "\x1b" not in str(caught.value)
