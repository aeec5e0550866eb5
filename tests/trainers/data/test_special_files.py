"""Named pipes, devices and sockets where data or a model is expected: named, never read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.adapter_directory import read_adapter_config
from outlast.trainers.config.model import LoraSettings, ModelSettings, TokenizerSettings
from outlast.trainers.data.sources import find_data_files
from outlast.trainers.data.tokenizer import load_tokenizer
from outlast.trainers.models.build import check_names
from outlast.trainers.models.model_directory import check_model_directory


@pytest.mark.parametrize(
    "source", ["pipe.jsonl", "endless.txt", ".", "*.jsonl", "*.txt", "**/*.jsonl", "pipe.jsonl.gz"]
)
def test_a_data_file_that_is_no_file(source: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}\n")
    for name in ("pipe.jsonl", "pipe.jsonl.gz"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    with pytest.raises(
        ConfigError, match=r"data file .*(pipe\.jsonl|endless\.txt).* is a (named pipe|device)"
    ) as caught:
        find_data_files(str(tmp_path / source))
    assert "write its content to a file" in caught.value.hint


def test_other_special_files_beside_data_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "control")
    (tmp_path / "linked.jsonl").symlink_to("b.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    found = find_data_files(str(tmp_path))
    assert [Path(item.name).name for item in found] == ["b.jsonl", "linked.jsonl"]


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer.path", "model.lora.path"])
def test_a_model_directory_with_a_pipe(key: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    place, hub = str(tmp_path / "model"), "some/model"
    settings = {
        "model.path": ModelSettings(path=place),
        "model.tokenizer.path": ModelSettings(path=hub, tokenizer=TokenizerSettings(path=place)),
        "model.lora.path": ModelSettings(path=hub, lora=LoraSettings(path=place)),
    }
    with pytest.raises(ConfigError, match=rf"{key} .*: config\.json is a named pipe"):
        check_names(settings[key])


def test_a_model_directory_with_links(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").symlink_to("/dev/null")
    (tmp_path / "gone.bin").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"weights\.bin is a device"):
        check_model_directory("model.path", tmp_path)
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "weights.bin").symlink_to(__file__)
    check_model_directory("model.path", tmp_path)


def test_an_adapter_brings_no_code_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}')
    from outlast.trainers.config.adapter_directory import with_base

    assert with_base(ModelSettings(path=str(tmp_path))).path == "evil/model"
    with pytest.raises(ConfigError, match="would run code of the model that it names"):
        with_base(ModelSettings(path=str(tmp_path), trust_remote_code=True))


@pytest.mark.parametrize("body", ["[]", "{", "[" * 100_000, '{"peft_type": "IA3"}'])
def test_an_adapter_configuration_that_is_none(body: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(body)
    with pytest.raises(ConfigError):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("body", ['{"weight_map": {"a": "../../secret"}}', '{"weight_map": {"a": "/x"}}', "[]", "{"])
def test_an_index_that_leads_out_of_the_model(body: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(body)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: "):
        check_names(ModelSettings(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("tokenizer_config.json", "vocab", "BertTokenizer"),
        ("tokenizer_config.json", "merges", "GPT2Tokenizer"),
        ("special_tokens_map.json", "vocab", "BertTokenizer"),
        ("special_tokens_map.json", "vocab_file", "EsmTokenizer"),
        ("special_tokens_map.json", "tokenizer_file", "TokenizersBackend"),
    ],
)
def test_a_tokenizer_reads_no_file_elsewhere(name: str, key: str, kind: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere.txt"
    folder.mkdir()
    tokens = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n<cls>\n<eos>\n<unk>\n<pad>\n<mask>\n"
    elsewhere.write_text(f"{tokens}canary\n")
    (folder / "vocab.txt").write_text(tokens)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        entries = {"tokenizer_class": kind} if file == "tokenizer_config.json" else {}
        (folder / file).write_text(json.dumps(entries | ({key: str(elsewhere)} if file == name else {})))
    with pytest.raises(ConfigError, match=rf"{name}: {key} names the file .*elsewhere"):
        load_tokenizer(str(folder))
