"""Preparation that is killed, runs twice at once, reads changing files, or reads more data than the memory bound."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.preparation.prepare import Prepared, prepare
from tests.support.groups.worker_group import tiny_config

PREPARE = """
    import sys
    from pathlib import Path
    from outlast.checkpointing.storage.local import LocalStorage
    from outlast.trainers.config.training_config import TrainingConfig
    from outlast.trainers.preparation.prepare import prepare

    config = TrainingConfig.model_validate_json(sys.argv[1])
    prepared = prepare(config, LocalStorage(Path(config.checkpoint.storage)))
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(prepared.num_tokens["train"], int(peak) * 1024)
"""


def write_shards(folder: Path, num_rows: int) -> Path:
    folder.mkdir()
    for shard in range(2):
        with (folder / f"part-{shard}.txt").open("w") as file:
            for number in range(num_rows):
                file.write(f"Row {number} of shard {shard}, " + "with words and more words " * 20 + "\n")
    return folder


def config_of(storage: Path, source: Path) -> TrainingConfig:
    return tiny_config("run", str(storage), str(source), sections={"data": {"eval": "5%", "max_length": 64}})


def start(config: TrainingConfig) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PREPARE), config.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def contents(storage: Path, prepared: Prepared) -> dict[str, bytes]:
    """All files, except incomplete ones of a killed writer."""
    root = storage / prepared.directory
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.faults
@pytest.mark.parametrize("seen", ["tokenizer/tokenizer.json", "train.arrow"])
def test_killed_midway_then_two_at_once(seen: str, tmp_path: Path) -> None:
    """Killed as soon as a file exists. Two processes then write the same bytes as an undisturbed one."""
    source = write_shards(tmp_path / "shards", 2000)
    expected = prepare(config_of(tmp_path / "calm", source), LocalStorage(tmp_path / "calm"))
    storage = tmp_path / "stormy"
    config = config_of(storage, source)
    victim = start(config)
    wait_until(lambda: (storage / expected.directory / seen).exists())
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert not (storage / expected.directory / "data.json").exists(), "it was killed after it had finished"
    both = [start(config), start(config)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    assert prepare(config, LocalStorage(storage)) == expected
    assert contents(storage, expected) == contents(tmp_path / "calm", expected)


@pytest.mark.faults
def test_files_that_change_while_they_are_read(tmp_path: Path) -> None:
    """Data under a fingerprint is made of the bytes that it covers; otherwise no manifest is written."""
    source = write_shards(tmp_path / "shards", 2000)
    config, storage = config_of(tmp_path / "runs", source), LocalStorage(tmp_path / "runs")
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(prepare, config, storage)
        wait_until(lambda: any((tmp_path / "runs").rglob("tokenizer.json")))
        with (source / "part-1.txt").open("a") as file:
            file.write("one row more\n")
        with pytest.raises(ConfigError, match="changed while they were read"):
            prepared.result()
    assert not list((tmp_path / "runs").rglob("data.json"))
    assert prepare(config, storage).num_rows["train"] > 0


@pytest.mark.faults
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Eight times the rows, 72 MB, need less than 40 MB more: two blocks of 16 MiB are held while a file is stored."""
    peaks = []
    for num_rows in (8_000, 64_000):
        source = write_shards(tmp_path / f"shards-{num_rows}", num_rows)
        process = start(config_of(tmp_path / f"runs-{num_rows}", source))
        output, _ = process.communicate()
        assert process.returncode == 0
        num_tokens, peak = map(int, output.split())
        assert num_tokens > num_rows * 100
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40 * 2**20


def test_a_text_that_the_tokenizer_rejects_is_a_bad_row(tmp_path: Path) -> None:
    """`tokenizers` raises a bare Exception for it, and not before the rows of a batch are encoded together."""
    inner = tokenizers.Tokenizer(WordLevel({"the": 0, "cat": 1, "end": 2}, unk_token="unknown"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="end").save_pretrained(tmp_path / "words")
    with pytest.raises(Exception, match=r"WordLevel error: Missing"):
        inner.encode("the dog")
    rows = tmp_path / "rows.jsonl"
    texts = ["the cat", "cat the", "the dog", "cat cat"]
    rows.write_text("".join(json.dumps({"text": text, "label": at % 2}) + "\n" for at, text in enumerate(texts)))
    sections: dict[str, Any] = {
        "model": {"task": "sequence-classification", "tokenizer": {"path": str(tmp_path / "words")}},
        "data": {"eval": None},
        "train": {"eval_every": None},
    }
    storage = LocalStorage(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 3: the tokenizer rejects it: WordLevel error"):
        prepare(tiny_config("run", storage.url, str(rows), sections=sections), storage)
    sections["data"]["max_bad_rows"] = 1
    prepared = prepare(tiny_config("run", storage.url, str(rows), sections=sections), storage)
    assert (prepared.num_bad_rows, prepared.num_samples) == (1, 3)
    ids = [sample["input_ids"].tolist() for sample in prepared.split(storage, "train").take(range(3))]
    assert ids == [[0, 1], [1, 0], [1, 1]]
