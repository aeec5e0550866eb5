"""Text becomes samples: the same ones from any format, made once, found again, and made again when damaged."""

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

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import ROWS_PER_BATCH, Samples, write_samples
from outlast.trainers.data.readers import read_rows
from outlast.trainers.preparation import prepare as data
from outlast.trainers.preparation.encode import Encoder, encode_here
from outlast.trainers.preparation.prepare import Prepared, prepare
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
def place(tmp_path: Path) -> LocalStorage:
    """A storage of its own, so that nothing was prepared before."""
    return LocalStorage(tmp_path / "runs")


def config_of(place: LocalStorage, train: Path, *, seed: int = 11, **data: Any) -> TrainingConfig:
    return tiny_config("run", place.url, str(train), sections={"data": data, "seed": seed})


def samples(prepared: Prepared, place: LocalStorage, split: str = "train") -> npt.NDArray[np.int32]:
    data = prepared.split(place, split)
    return ids(data, range(len(data)))


def ids(data: Samples, numbers: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.stack([sample["input_ids"] for sample in data.take(numbers)])


def contents(prepared: Prepared, place: LocalStorage) -> dict[str, bytes]:
    root = place.path(prepared.directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_texts(source: Path) -> list[str]:
    return [row.values[0] for row in read_rows(str(source), ["text"])]


DOCUMENTS = [f'Document number {number}, "quoted", with a comma, a tab\tand ünïcödé.' for number in range(120)]


def test_every_format_gives_the_same_samples(tmp_path: Path, place: LocalStorage) -> None:
    made = {}
    for name, write in WRITERS.items():
        write(tmp_path / f"train.{name}", DOCUMENTS)
        made[name] = prepare(config_of(place, tmp_path / f"train.{name}"), place)
    assert len({item.fingerprint for item in made.values()}) == len(WRITERS), "other bytes, another fingerprint"
    for name, item in made.items():
        for split in ("train", "eval"):
            assert np.array_equal(samples(item, place, split), samples(made["txt"], place, split)), (name, split)
        assert item.num_rows == made["txt"].num_rows


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
def test_documents_of_several_lines(name: str, tmp_path: Path) -> None:
    """More than a reader's block of them, so that a document lies across two blocks."""
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
def test_text_that_looks_like_something_else_is_text(name: str, documents: list[str], tmp_path: Path) -> None:
    WRITERS[name](tmp_path / f"train.{name}", documents)
    assert read_texts(tmp_path / f"train.{name}") == documents


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": "two"}, {"id": [3], "text": "c", "more": {}}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_texts(tmp_path / "train.jsonl") == ["a", "b", "c"]


def test_empty_lines_of_a_text_file_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\n\n  \ntwo\r\nthree")
    assert read_texts(tmp_path / "train.txt") == ["one", "two", "three"]


# -- what will not do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_answered_with_those_there(name: str, tmp_path: Path, place: LocalStorage) -> None:
    WRITERS[name](tmp_path / f"train.{name}", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"has no column 'body'; it has id, text") as caught:
        prepare(config_of(place, tmp_path / f"train.{name}", text="body"), place)
    assert "-s data.text=" in caught.value.hint
    assert place.list(".data") == []


@pytest.mark.parametrize(
    ("row", "said"), [(None, "None"), (5, "5"), (["a"], r"\['a'\]")], ids=["null", "number", "list"]
)
def test_a_row_that_is_not_text_is_named(row: Any, said: str, tmp_path: Path, place: LocalStorage) -> None:
    write_jsonl(tmp_path / "train.jsonl", ["one", "two", row, "four"])
    with pytest.raises(ConfigError, match=rf"train.jsonl, row 3: column 'text' holds {said}, not text"):
        prepare(config_of(place, tmp_path / "train.jsonl"), place)


def test_a_parquet_row_without_text_is_named(tmp_path: Path, place: LocalStorage) -> None:
    write_parquet(tmp_path / "train.parquet", [*DOCUMENTS, None])
    with pytest.raises(ConfigError, match=r"row 121: column 'text' holds None, not text"):
        prepare(config_of(place, tmp_path / "train.parquet"), place)


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("train.txt", b"good\n\xff\xfe\n", "is not UTF-8 text"),
        ("train.jsonl", b"{", "cannot be read as .jsonl"),
        ("train.csv", b"", "is empty"),
        ("train.parquet", b"nothing", "cannot be read as .parquet"),
        ("train.doc", b"", "not '.doc'"),
    ],
)
def test_a_file_that_is_not_what_it_says(
    name: str, body: bytes, said: str, tmp_path: Path, place: LocalStorage
) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ConfigError, match=re.escape(said)):
        prepare(config_of(place, tmp_path / name), place)


def test_a_file_that_is_not_there(tmp_path: Path, place: LocalStorage) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt is not there"):
        prepare(config_of(place, tmp_path / "nowhere.txt"), place)
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"nowhere\.txt is not there"):
        prepare(config_of(place, tmp_path / "train.txt", eval=str(tmp_path / "nowhere.txt")), place)


def test_too_little_text(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", ["few words"] * 40)
    with pytest.raises(ConfigError, match=r"the train split has .* tokens, less than one sample .*4096") as caught:
        prepare(config_of(place, tmp_path / "train.txt", max_length=4096), place)
    assert "smaller data.max_length" in caught.value.hint
    write_txt(tmp_path / "train.txt", ["word " * 30] * 6)
    with pytest.raises(ConfigError, match="the eval split has 0 tokens"):
        prepare(config_of(place, tmp_path / "train.txt", eval="0.001%"), place)


# -- packing and splitting ---------------------------------------------------------------------------------------------


def test_packing_loses_nothing_but_the_tail(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    prepared = prepare(config_of(place, tmp_path / "train.txt", eval=str(tmp_path / "train.txt")), place)
    tokenizer = prepared.tokenizer(place)
    expected = [token for tokens in tokenizer.encode(DOCUMENTS) for token in tokens]
    assert expected.count(tokenizer.inner.eos_token_id) == len(DOCUMENTS)
    for split in ("train", "eval"):
        found = samples(prepared, place, split)
        assert found.shape[1] == 16
        assert found.ravel().tolist() == expected[: found.size]
        assert prepared.num_tokens[split] == len(expected)
        assert prepared.num_dropped_tokens[split] == len(expected) - found.size < 16
        assert prepared.num_rows[split] == len(DOCUMENTS)
    assert prepared.num_samples == prepared.num_eval_samples == len(expected) // 16


def test_rows_of_any_number_over_several_batches(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS * 6)
    prepared = prepare(config_of(place, tmp_path / "train.txt", max_length=4), place)
    data = prepared.split(place, "train")
    assert len(data) == prepared.num_samples > 2 * ROWS_PER_BATCH
    whole = ids(data, range(len(data)))
    wanted = [len(data) - 1, 0, ROWS_PER_BATCH, ROWS_PER_BATCH - 1, 5, 5]
    assert np.array_equal(ids(data, wanted), whole[wanted])
    assert ids(data, [3]).dtype == np.int32


def held_out(prepared: Prepared, place: LocalStorage) -> tuple[set[int], set[int]]:
    """Numbers of the documents in the train and in the eval split, read from their text."""
    tokenizer, found = prepared.tokenizer(place), []
    for split in ("train", "eval"):
        text = tokenizer.inner.decode(samples(prepared, place, split).ravel().tolist())
        found.append({int(number) for number in re.findall(r"number (\d+),", text)})
    return found[0], found[1]


def test_samples_of_any_length_and_name(tmp_path: Path) -> None:
    """Read by number, from any batch, each as it was written; also an empty one."""
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


def test_a_single_column_that_fits_is_taken_and_told(tmp_path: Path, place: LocalStorage) -> None:
    rows = [{"id": number, "body": document} for number, document in enumerate(DOCUMENTS)]
    prepared = prepare(config_of(place, write_rows(tmp_path / "train.jsonl", rows)), place)
    assert prepared.notes == ("no column 'text'; taking 'body' as data.text",)
    write_jsonl(tmp_path / "plain.jsonl", DOCUMENTS)
    assert np.array_equal(
        samples(prepared, place), samples(prepare(config_of(place, tmp_path / "plain.jsonl"), place), place)
    )


def test_two_that_fit_are_not_guessed_between(tmp_path: Path, place: LocalStorage) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"body": document, "title": "t"} for document in DOCUMENTS])
    with pytest.raises(ConfigError, match="has no column 'text'; it has body, title") as caught:
        prepare(config_of(place, path), place)
    assert "-s data.text=body" in caught.value.hint
    assert prepare(config_of(place, path, text="body"), place).notes == ()


def test_bad_rows_are_left_out_counted_and_named(tmp_path: Path, place: LocalStorage) -> None:
    rows = [{"text": document} for document in DOCUMENTS]
    path = write_rows(tmp_path / "train.jsonl", [*rows[:50], {"text": 5}, {"text": None}, *rows[50:]])
    with pytest.raises(ConfigError, match="row 51: column 'text' holds 5"):
        prepare(config_of(place, path), place)
    prepared = prepare(config_of(place, path, eval=str(path), max_bad_rows=4), place)
    assert prepared.num_bad_rows == 4, "two in each split"
    assert prepared.num_rows == {"train": len(DOCUMENTS), "eval": len(DOCUMENTS)}
    assert "row 51: column 'text' holds 5" in prepared.notes[0]
    write_rows(tmp_path / "good.jsonl", rows)
    good = prepare(config_of(place, tmp_path / "good.jsonl", eval=str(tmp_path / "good.jsonl")), place)
    assert np.array_equal(samples(prepared, place), samples(good, place))


def test_the_limit_of_bad_rows_is_no_part_of_what_comes_out(tmp_path: Path, place: LocalStorage) -> None:
    """So it may be raised while a run goes on; data with more of them than may be is refused as if it were new."""
    path = write_rows(tmp_path / "train.jsonl", [*({"text": document} for document in DOCUMENTS), {"text": 5}])
    first = prepare(config_of(place, path, max_bad_rows=1), place)
    assert prepare(config_of(place, path, max_bad_rows=7, prepare="cluster"), place) == first
    with pytest.raises(ConfigError, match="row 121: column 'text' holds 5"):
        prepare(config_of(place, path), place)
    assert prepare(config_of(place, path, max_bad_rows=1), place) == first


def test_no_row_is_in_both_splits(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    train, evaluation = held_out(prepare(config_of(place, tmp_path / "train.txt", eval="20%"), place), place)
    assert not train & evaluation
    assert len(train | evaluation) >= len(DOCUMENTS) - 2, "the tails lose one each at most"
    assert 8 <= len(evaluation) <= 40


def test_more_rows_change_nobodys_split_and_another_seed_does(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS[:100])
    write_txt(tmp_path / "more.txt", DOCUMENTS)
    before = held_out(prepare(config_of(place, tmp_path / "train.txt", eval="20%"), place), place)
    after = held_out(prepare(config_of(place, tmp_path / "more.txt", eval="20%"), place), place)
    assert before[0] <= after[0]
    assert before[1] <= after[1]
    other = held_out(prepare(config_of(place, tmp_path / "more.txt", seed=12, eval="20%"), place), place)
    assert other[1] != after[1]


# -- made once ---------------------------------------------------------------------------------------------------------


def test_the_second_time_it_is_found(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(place, tmp_path / "train.txt")
    first = prepare(config, place)
    files = {path: path.stat().st_ino for path in place.path(first.directory).rglob("*") if path.is_file()}
    assert prepare(config, place) == first
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
    place: LocalStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the bytes of all files, the evaluation's too. Where it is done is no part of what comes out."""
    for name in ("train", "eval"):
        write_txt(tmp_path / f"{name}.txt", DOCUMENTS)  # 8 kB
    monkeypatch.setattr(data, "LARGE_BYTES", num_bytes)
    asked = []

    @contextmanager
    def elsewhere() -> Iterator[Encoder]:
        asked.append(True)
        yield encode_here

    config = config_of(place, tmp_path / "train.txt", eval=str(tmp_path / "eval.txt"), prepare=where)
    made = prepare(config, place, elsewhere)
    assert asked == [True] * is_elsewhere
    other = config_of(place, tmp_path / "train.txt", eval=str(tmp_path / "eval.txt"))
    assert prepare(other, place, elsewhere) == made
    assert asked == [True] * is_elsewhere, "it is found, and nobody is asked"


def test_the_files_place_and_date_do_not_matter(tmp_path: Path, place: LocalStorage) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        write_txt(folder / "train.txt", DOCUMENTS)
    here, there = (
        prepare(config_of(place, folder / "train.txt"), place) for folder in (tmp_path, tmp_path / "elsewhere")
    )
    assert here == there


@pytest.mark.parametrize(
    "change",
    [{"max_length": 8}, {"eval": "10%"}, {"text": "body"}, {"seed": 12}],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_samples_changes_the_fingerprint(
    change: dict[str, Any], tmp_path: Path, place: LocalStorage
) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    before = prepare(config_of(place, tmp_path / "train.txt"), place)
    assert prepare(config_of(place, tmp_path / "train.txt", **change), place).fingerprint != before.fingerprint


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, empty, Path.unlink], ids=["flip", "empty", "unlink"])
@pytest.mark.parametrize("file", ["train.arrow", "eval.arrow", "tokenizer/tokenizer.json", "data.json"])
def test_damage_is_found_and_the_data_made_again(
    file: str, damage: Callable[[Path], None], tmp_path: Path, place: LocalStorage
) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(place, tmp_path / "train.txt")
    first = prepare(config, place)
    before = contents(first, place)
    damage(place.path(first.directory) / file)
    assert prepare(config, place) == first
    assert contents(first, place) == before


def test_a_wrong_number_in_the_data_manifest_is_found(tmp_path: Path, place: LocalStorage) -> None:
    """It still is JSON, and the run would walk through other samples."""
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(place, tmp_path / "train.txt")
    first = prepare(config, place)
    path = place.path(first.directory) / "data.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "num_samples": body["num_samples"] - 1}))
    assert prepare(config, place) == first


def test_two_preparers_at_once_are_harmless(tmp_path: Path, place: LocalStorage) -> None:
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(place, tmp_path / "train.txt")
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: prepare(config, place), range(3)))
    assert made[0] == made[1] == made[2]
    assert len(Samples(place.path(f"{made[0].directory}/train.arrow"))) == made[0].num_samples
    files = contents(made[0], place)
    assert prepare(config, place) == made[0]
    assert contents(made[0], place) == files
    assert not [name for name in files if name.endswith(".tmp")]


def test_a_preparation_that_died_leaves_nothing_that_counts(tmp_path: Path, place: LocalStorage) -> None:
    """The manifest is written last: without it the files are made again."""
    write_txt(tmp_path / "train.txt", DOCUMENTS)
    config = config_of(place, tmp_path / "train.txt")
    first = prepare(config, place)
    before = contents(first, place)
    place.delete(f"{first.directory}/data.json")
    place.put(f"{first.directory}/train.arrow", [b"half"])
    assert prepare(config, place) == first
    assert contents(first, place) == before
