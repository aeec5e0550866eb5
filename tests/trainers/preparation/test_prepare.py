"""Preparation: the same samples from any format, prepared once, reused, and prepared again when damaged."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import ROWS_PER_BATCH, Samples, write_samples
from outlast.trainers.data.readers import read_rows
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.preparation import prepare as data
from outlast.trainers.preparation.encode import Encoder, encode_here
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.causal_lm import CausalLM
from tests.support.groups.worker_group import tiny_config

Write = Callable[[Path, Sequence[Any]], None]


def write_txt(path: Path, documents: Sequence[Any]) -> None:
    path.write_text("".join(f"{document}\n" for document in documents), encoding="utf-8")


def write_jsonl(path: Path, documents: Sequence[Any]) -> None:
    lines = (json.dumps({"id": number, "text": document}) for number, document in enumerate(documents))
    path.write_text("".join(f"{line}\n" for line in lines))


def write_csv(path: Path, documents: Sequence[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(documents)])


def write_parquet(path: Path, documents: Sequence[Any]) -> None:
    pq.write_table(pa.table({"id": range(len(documents)), "text": list(documents)}), path, row_group_size=50)


WRITERS: dict[str, Write] = {"txt": write_txt, "jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """A storage of the test's own, without prepared data."""
    return LocalStorage(tmp_path / "runs")


def config_of(storage: LocalStorage, train: Path, *, seed: int = 11, **data: Any) -> TrainingConfig:
    return tiny_config("run", storage.url, str(train), sections={"data": data, "seed": seed})


def samples(prepared: Prepared, storage: LocalStorage, split: str = "train") -> npt.NDArray[np.int32]:
    data = prepared.split(storage, split)
    return ids(data, range(len(data)))


def ids(data: Samples, numbers: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.stack([sample["input_ids"] for sample in data.take(numbers)])


def contents(prepared: Prepared, storage: LocalStorage) -> dict[str, bytes]:
    root = storage.path(prepared.directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_texts(source: Path) -> list[str]:
    return [row.values[0] for row in read_rows(str(source), ["text"])]


DOCUMENTS = [f'Document number {number}, "quoted", with a comma, a tab\tand ünïcödé.' for number in range(120)]


def test_every_format_gives_the_same_samples(tmp_path: Path, storage: LocalStorage) -> None:
    made = {}
    for name, write in WRITERS.items():
        write(tmp_path / f"train.{name}", DOCUMENTS)
        made[name] = prepare(config_of(storage, tmp_path / f"train.{name}"), storage)
    assert len({item.fingerprint for item in made.values()}) == len(WRITERS), "other bytes, another fingerprint"
    for name, item in made.items():
        for split in ("train", "eval"):
            assert np.array_equal(samples(item, storage, split), samples(made["txt"], storage, split)), (name, split)
        assert item.num_rows == made["txt"].num_rows


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
def test_documents_of_several_lines(name: str, tmp_path: Path) -> None:
    """More of them than a reader's block, so that a document spans two blocks."""
    documents = [f"line one of {number}\n\nline three, " + "word " * 100 for number in range(5000)]
    WRITERS[name](tmp_path / f"train.{name}", documents)
    assert read_texts(tmp_path / f"train.{name}") == documents


@pytest.mark.parametrize("name", WRITERS)
def test_one_very_long_document(name: str, tmp_path: Path) -> None:
    """A book is a document."""
    documents = ["short", "word " * 1_000_000, "short again"]
    WRITERS[name](tmp_path / f"train.{name}", documents)
    assert read_texts(tmp_path / f"train.{name}") == documents


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("documents", [["12", "13"], ["2020-01-01", "2020-01-02"], ["true", "false"]], ids=str)
def test_text_that_looks_like_another_type_stays_text(name: str, documents: list[str], tmp_path: Path) -> None:
    WRITERS[name](tmp_path / f"train.{name}", documents)
    assert read_texts(tmp_path / f"train.{name}") == documents


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": "two"}, {"id": [3], "text": "c", "more": {}}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_texts(tmp_path / "train.jsonl") == ["a", "b", "c"]


def test_empty_lines_of_a_text_file_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\n\n  \ntwo\r\nthree")
    assert read_texts(tmp_path / "train.txt") == ["one", "two", "three"]


# -- what will not do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_reported_with_the_available_ones(name: str, tmp_path: Path, storage: LocalStorage) -> None:
    WRITERS[name](tmp_path / f"train.{name}", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"has no column 'body'; it has id, text") as caught:
        prepare(config_of(storage, tmp_path / f"train.{name}", text="body"), storage)
    assert "-s data.text=" in caught.value.hint
    assert storage.list(".data") == []


@pytest.mark.parametrize(
    ("row", "message"),
    [(None, "no value"), (5, "5, not text"), (["a"], r"\['a'\], not text")],
    ids=["null", "number", "list"],
)
def test_a_row_that_is_not_text_is_named(row: Any, message: str, tmp_path: Path, storage: LocalStorage) -> None:
    write_jsonl(tmp_path / "train.jsonl", ["one", "two", row, "four"])
    with pytest.raises(ConfigError, match=rf"train.jsonl, row 3: column 'text' holds {message}"):
        prepare(config_of(storage, tmp_path / "train.jsonl"), storage)


def test_a_parquet_row_without_text_is_named(tmp_path: Path, storage: LocalStorage) -> None:
    write_parquet(tmp_path / "train.parquet", [*DOCUMENTS, None])
    with pytest.raises(ConfigError, match=r"row 121: column 'text' holds no value"):
        prepare(config_of(storage, tmp_path / "train.parquet"), storage)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("train.txt", b"good\n\xff\xfe\n", "is not UTF-8 text"),
        ("train.jsonl", b"{", "cannot be read as .jsonl"),
        ("train.csv", b"", "is empty"),
        ("train.parquet", b"nothing", "cannot be read as .parquet"),
        ("train.doc", b"", "not '.doc'"),
    ],
)
def test_a_file_of_another_type_than_its_name(
    name: str, body: bytes, message: str, tmp_path: Path, storage: LocalStorage
) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(config_of(storage, tmp_path / name), storage)


def test_a_missing_file(tmp_path: Path, storage: LocalStorage) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt does not exist"):
        prepare(config_of(storage, tmp_path / "nowhere.txt"), storage)
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"nowhere\.txt does not exist"):
        prepare(config_of(storage, tmp_path / "train.txt", eval=str(tmp_path / "nowhere.txt")), storage)


def test_too_little_text(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", ["few words"] * 40)
    with pytest.raises(ConfigError, match=r"the train split has .* tokens, less than one sample .*4096") as caught:
        prepare(config_of(storage, tmp_path / "train.txt", max_length=4096), storage)
    assert "smaller data.max_length" in caught.value.hint
    write_txt(tmp_path / "train.txt", ["word " * 30] * 6)
    with pytest.raises(
        ConfigError, match=r"data\.eval: .*% of the rows of .* are held out, and the eval split has no usable row"
    ):
        prepare(config_of(storage, tmp_path / "train.txt", eval="0.001%"), storage)


# -- packing and splitting ---------------------------------------------------------------------------------------------


def test_packing_loses_nothing_but_the_tail(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    prepared = prepare(config_of(storage, tmp_path / "train.txt", eval=str(tmp_path / "train.txt")), storage)
    tokenizer = prepared.tokenizer(storage)
    expected = [token for tokens in tokenizer.encode(DOCUMENTS) for token in tokens]
    assert expected.count(tokenizer.inner.eos_token_id) == len(DOCUMENTS)
    for split in ("train", "eval"):
        packed = samples(prepared, storage, split)
        assert packed.shape[1] == 16
        assert packed.ravel().tolist() == expected[: packed.size]
        assert prepared.num_tokens[split] == len(expected)
        assert prepared.num_dropped_tokens[split] == len(expected) - packed.size < 16
        assert prepared.num_rows[split] == len(DOCUMENTS)
    assert prepared.num_samples == prepared.num_eval_samples == len(expected) // 16


def test_rows_of_any_number_over_several_batches(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS * 6)
    prepared = prepare(config_of(storage, tmp_path / "train.txt", max_length=4), storage)
    data = prepared.split(storage, "train")
    assert len(data) == prepared.num_samples > 2 * ROWS_PER_BATCH
    everything = ids(data, range(len(data)))
    indices = [len(data) - 1, 0, ROWS_PER_BATCH, ROWS_PER_BATCH - 1, 5, 5]
    assert np.array_equal(ids(data, indices), everything[indices])
    assert ids(data, [3]).dtype == np.int32


def held_out(prepared: Prepared, storage: LocalStorage) -> tuple[set[int], set[int]]:
    """Numbers of the documents in the train and in the eval split, parsed from their text."""
    tokenizer, splits = prepared.tokenizer(storage), []
    for split in ("train", "eval"):
        text = tokenizer.inner.decode(samples(prepared, storage, split).ravel().tolist())
        splits.append({int(number) for number in re.findall(r"number (\d+),", text)})
    return splits[0], splits[1]


def test_samples_of_any_length_and_name(tmp_path: Path) -> None:
    """Samples are read by index, from any batch, exactly as written; also an empty file."""
    random = np.random.default_rng(3)
    lengths = [0, 1, *random.integers(0, 40, 2 * ROWS_PER_BATCH + 5).tolist()]
    wanted = [
        {"input_ids": np.arange(length, dtype=np.int32), "scores": random.random(length // 2).astype(np.float32)}
        for length in lengths
    ]
    assert write_samples(iter(wanted), tmp_path / "some.arrow").num_tokens == sum(lengths)
    data = Samples(tmp_path / "some.arrow")
    assert len(data) == len(wanted)
    numbers = [len(data) - 1, 0, 1, ROWS_PER_BATCH, ROWS_PER_BATCH - 1, 7, 7]
    for number, sample in zip(numbers, data.take(numbers), strict=True):
        assert sample.keys() == wanted[number].keys()
        for name, values in sample.items():
            assert values.dtype == wanted[number][name].dtype
            assert np.array_equal(values, wanted[number][name])


# -- which columns -----------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_single_column_of_the_right_type_is_used_and_noted(tmp_path: Path, storage: LocalStorage) -> None:
    rows = [{"id": number, "body": document} for number, document in enumerate(DOCUMENTS)]
    prepared = prepare(config_of(storage, write_rows(tmp_path / "train.jsonl", rows)), storage)
    assert prepared.notes == ("no column 'text'; using 'body' as data.text",)
    write_jsonl(tmp_path / "plain.jsonl", DOCUMENTS)
    assert np.array_equal(
        samples(prepared, storage), samples(prepare(config_of(storage, tmp_path / "plain.jsonl"), storage), storage)
    )


def test_two_columns_of_the_right_type_are_ambiguous(tmp_path: Path, storage: LocalStorage) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"body": document, "title": "t"} for document in DOCUMENTS])
    with pytest.raises(ConfigError, match="has no column 'text'; it has body, title") as caught:
        prepare(config_of(storage, path), storage)
    assert "-s data.text=body" in caught.value.hint
    assert prepare(config_of(storage, path, text="body"), storage).notes == ()


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path, storage: LocalStorage) -> None:
    rows = [{"text": document} for document in DOCUMENTS]
    path = write_rows(tmp_path / "train.jsonl", [*rows[:50], {"text": 5}, {"text": None}, *rows[50:]])
    with pytest.raises(ConfigError, match="row 51: column 'text' holds 5"):
        prepare(config_of(storage, path), storage)
    prepared = prepare(config_of(storage, path, eval=str(path), max_bad_rows=4), storage)
    assert prepared.num_bad_rows == 4, "two in each split"
    assert prepared.num_rows == {"train": len(DOCUMENTS), "eval": len(DOCUMENTS)}
    assert "row 51: column 'text' holds 5" in prepared.notes[0]
    write_rows(tmp_path / "good.jsonl", rows)
    good = prepare(config_of(storage, tmp_path / "good.jsonl", eval=str(tmp_path / "good.jsonl")), storage)
    assert np.array_equal(samples(prepared, storage), samples(good, storage))


def test_the_limit_of_bad_rows_does_not_affect_the_fingerprint(tmp_path: Path, storage: LocalStorage) -> None:
    """So it may be raised for a resume. Prepared data with more bad rows than allowed is refused like new data."""
    path = write_rows(tmp_path / "train.jsonl", [*({"text": document} for document in DOCUMENTS), {"text": 5}])
    first = prepare(config_of(storage, path, max_bad_rows=1), storage)
    assert prepare(config_of(storage, path, max_bad_rows=7, prepare="cluster"), storage) == first
    with pytest.raises(ConfigError, match="row 121: column 'text' holds 5"):
        prepare(config_of(storage, path), storage)
    assert prepare(config_of(storage, path, max_bad_rows=1), storage) == first


def test_no_row_is_in_both_splits(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    train, evaluation = held_out(prepare(config_of(storage, tmp_path / "train.txt", eval="20%"), storage), storage)
    assert not train & evaluation
    assert len(train | evaluation) >= len(DOCUMENTS) - 2, "the tails lose one each at most"
    assert 8 <= len(evaluation) <= 40


def test_more_rows_keep_the_split_of_each_row_and_another_seed_does_not(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS[:100])
    write_txt(tmp_path / "more.txt", DOCUMENTS)
    before = held_out(prepare(config_of(storage, tmp_path / "train.txt", eval="20%"), storage), storage)
    after = held_out(prepare(config_of(storage, tmp_path / "more.txt", eval="20%"), storage), storage)
    assert before[0] <= after[0]
    assert before[1] <= after[1]
    other = held_out(prepare(config_of(storage, tmp_path / "more.txt", seed=12, eval="20%"), storage), storage)
    assert other[1] != after[1]


# -- made once ---------------------------------------------------------------------------------------------------------


def test_the_second_time_it_is_reused(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(storage, tmp_path / "train.txt")
    first = prepare(config, storage)
    files = {path: path.stat().st_ino for path in storage.path(first.directory).rglob("*") if path.is_file()}
    assert prepare(config, storage) == first
    assert {path: path.stat().st_ino for path in files} == files, "nothing was written again"


@pytest.mark.parametrize(
    ("where", "num_bytes", "is_elsewhere"),
    [("auto", 10_000, True), ("auto", 1_000_000, False), ("here", 0, False), ("cluster", 1_000_000, True)],
)
def test_large_data_is_encoded_on_the_cluster(
    where: str,
    num_bytes: int,
    is_elsewhere: bool,
    tmp_path: Path,
    storage: LocalStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The size is that of all files, those of the evaluation included. The encoder does not affect the result."""
    for name in ("train", "eval"):
        write_txt(tmp_path / f"{name}.txt", DOCUMENTS)  # 8 kB
    monkeypatch.setattr(data, "LARGE_BYTES", num_bytes)
    asked = []

    @contextmanager
    def elsewhere() -> Iterator[Encoder]:
        asked.append(True)
        yield encode_here

    config = config_of(storage, tmp_path / "train.txt", eval=str(tmp_path / "eval.txt"), prepare=where)
    made = prepare(config, storage, elsewhere)
    assert asked == [True] * is_elsewhere
    other = config_of(storage, tmp_path / "train.txt", eval=str(tmp_path / "eval.txt"))
    assert prepare(other, storage, elsewhere) == made
    assert asked == [True] * is_elsewhere, "existing data needs no encoder"


def test_location_and_date_of_files_do_not_matter(tmp_path: Path, storage: LocalStorage) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        write_txt(folder / "train.txt", DOCUMENTS)
    here, there = (
        prepare(config_of(storage, folder / "train.txt"), storage) for folder in (tmp_path, tmp_path / "elsewhere")
    )
    assert here == there


@pytest.mark.parametrize(
    "change",
    [{"max_length": 8}, {"eval": "10%"}, {"text": "body"}, {"seed": 12}],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_samples_changes_the_fingerprint(
    change: dict[str, Any], tmp_path: Path, storage: LocalStorage
) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    before = prepare(config_of(storage, tmp_path / "train.txt"), storage)
    assert prepare(config_of(storage, tmp_path / "train.txt", **change), storage).fingerprint != before.fingerprint


def test_a_run_goes_on_with_the_samples_of_an_earlier_version_of_its_task(
    tmp_path: Path, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(storage, tmp_path / "train.txt")
    first = prepare(config, storage)
    monkeypatch.setattr(CausalLM, "version", CausalLM.version + 1)
    later = prepare(config, storage)
    assert later.fingerprint != first.fingerprint
    assert prepare(config, storage, like=first.fingerprint) == first
    assert prepare(config, storage, like=later.fingerprint) == later
    with (tmp_path / "train.txt").open("a") as file:
        file.write("another document\n")
    assert prepare(config, storage, like=first.fingerprint).fingerprint not in (first.fingerprint, later.fingerprint)


def test_named_chat_templates_belong_to_the_fingerprint(tmp_path: Path, storage: LocalStorage) -> None:
    """The prepared data keeps them, and is made again when one of them changes."""
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "tokenizer"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    rows.write_text(json.dumps({"messages": messages, "tools": [{"name": "ls"}]}) + "\n")
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = train_bpe(iter(["hello world"]), 300).inner
    model = {"tokenizer": {"path": str(folder)}, "task": "chat"}
    sections = {"model": model, "data": {"max_length": 64, "eval": None}}
    config = tiny_config("run", storage.url, str(rows), sections=sections, eval_every=None)

    def save(tools: str | None) -> str:
        tokenizer.chat_template = {"default": plain, "tool_use": f"{tools}{plain}"} if tools else plain
        tokenizer.save_pretrained(folder)
        return data.data_fingerprint(config)

    alone = save(None)
    first = save("{{ tools | tojson }}A")
    assert (folder / "additional_chat_templates/tool_use.jinja").is_file()
    made = prepare(config, storage)
    inner = made.tokenizer(storage).inner
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tools=[{"name": "ls"}])["input_ids"]
    assert inner.apply_chat_template(messages, tools=[{"name": "ls"}])["input_ids"] == expected
    assert made.split(storage, "train").take([0])[0]["input_ids"].tolist() == list(expected)
    assert len({alone, first, save("{{ tools | tojson }}B")}) == 3
    assert data.data_fingerprint(config, alone) == alone, "a run of 0.1.0, which left them out, goes on"
    (folder / "source.spm").write_bytes(b"x")
    assert data.data_fingerprint(config) not in (alone, first)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, empty, Path.unlink], ids=["flip", "empty", "unlink"])
@pytest.mark.parametrize("file", ["train.arrow", "eval.arrow", "tokenizer/tokenizer.json", "data.json"])
def test_damaged_data_is_prepared_again(
    file: str, damage: Callable[[Path], None], tmp_path: Path, storage: LocalStorage
) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(storage, tmp_path / "train.txt")
    first = prepare(config, storage)
    before = contents(first, storage)
    damage(storage.path(first.directory) / file)
    assert prepare(config, storage) == first
    assert contents(first, storage) == before


def test_a_wrong_number_in_the_manifest_is_detected(tmp_path: Path, storage: LocalStorage) -> None:
    """It is still valid JSON, but the run would read other samples."""
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(storage, tmp_path / "train.txt")
    first = prepare(config, storage)
    path = storage.path(first.directory) / "data.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "num_samples": body["num_samples"] - 1}))
    assert prepare(config, storage) == first


def test_two_preparers_at_once_are_harmless(tmp_path: Path, storage: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(storage, tmp_path / "train.txt")
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: prepare(config, storage), range(3)))
    assert made[0] == made[1] == made[2]
    assert len(Samples(storage.path(f"{made[0].directory}/train.arrow"))) == made[0].num_samples
    files = contents(made[0], storage)
    assert prepare(config, storage) == made[0]
    assert contents(made[0], storage) == files
    assert not [name for name in files if name.endswith(".tmp")]


def test_a_preparation_that_died_leaves_no_valid_data(tmp_path: Path, storage: LocalStorage) -> None:
    """The manifest is written last: without it the files are written again."""
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(storage, tmp_path / "train.txt")
    first = prepare(config, storage)
    before = contents(first, storage)
    storage.delete(f"{first.directory}/data.json")
    storage.put(f"{first.directory}/train.arrow", [b"half"])
    assert prepare(config, storage) == first
    assert contents(first, storage) == before
