"""Readers: the same rows in the same order from every file type and every way to name files; bad rows are named."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.factory import open_storage
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.columns import Column, ColumnType, choose_columns
from outlast.trainers.data.readers import BadRowCounter, Row, first_row, read_rows, usable_rows
from outlast.trainers.data.sources import digest_sources, find_data_files
from tests.support.s3_server import s3_server

RECORDS = [{"id": number, "text": f'Row {number}, "quoted", ünïcödé.\nIts second line.'} for number in range(2500)]


def jsonl(path: Path, records: Sequence[Any] = RECORDS) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def json_list(path: Path, records: Sequence[Any] = RECORDS) -> None:
    path.write_text(json.dumps(records, indent=1))


def json_values(path: Path, records: Sequence[Any] = RECORDS) -> None:
    path.write_text("\n".join(json.dumps(record, indent=1) for record in records))


def separated(separator: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            rows = [("id", "text"), *((record["id"], record["text"]) for record in RECORDS)]
            csv.writer(file, delimiter=separator).writerows(rows)

    return write


def table() -> pa.Table:
    return pa.Table.from_pylist(RECORDS)


def arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=700)


def arrow_file(path: Path) -> None:
    with pa.ipc.new_file(str(path), table().schema) as writer:
        writer.write_table(table())


def compressed(write: Callable[[Path], None], codec: str) -> Callable[[Path], None]:
    def compress(path: Path) -> None:
        write(path)
        data = path.read_bytes()
        half = len(data) // 2  # two members, as from `cat a.gz b.gz`
        pack: Callable[[bytes], bytes] = gzip.compress if codec == "gzip" else lambda part: pa.compress(part, codec)
        path.write_bytes(bytes(pack(data[:half])) + bytes(pack(data[half:])))

    return compress


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", jsonl),
        ("a.json", json_list),
        ("b.json", json_values),
        ("a.csv", separated(",")),
        ("a.tsv", separated("\t")),
        ("a.parquet", lambda path: pq.write_table(table(), path, row_group_size=900)),
        ("a.arrow", arrow_stream),
        ("b.arrow", arrow_file),
        ("a.feather", lambda path: feather.write_feather(table(), str(path))),
        ("a.jsonl.gz", compressed(jsonl, "gzip")),
        ("a.csv.zst", compressed(separated(","), "zstd")),
        ("b.json.gz", compressed(json_list, "gzip")),
    ],
)
def test_every_file_type_gives_the_same_rows(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    rows = list(read_rows(str(tmp_path / name), ["text", "id"]))
    assert [row.values[0] for row in rows] == [record["text"] for record in RECORDS]
    assert [int(row.values[1]) for row in rows] == [record["id"] for record in RECORDS]
    assert rows[6].where.startswith(f"{tmp_path / name}, row 7")
    assert list(first_row(str(tmp_path / name))) == ["id", "text"]
    assert str(first_row(str(tmp_path / name))["id"]) == "0"


def test_values_are_raw(tmp_path: Path) -> None:
    values = [[{"role": "user", "content": "hi"}], 0.5, None, ["a", "b"]]
    jsonl(tmp_path / "a.jsonl", [{"value": value} for value in values])
    assert [row.values[0] for row in read_rows(str(tmp_path / "a.jsonl"), ["value"])] == values
    pq.write_table(pa.table({"value": pa.array([values[0]])}), tmp_path / "a.parquet")
    assert [row.values[0] for row in read_rows(str(tmp_path / "a.parquet"), ["value"])] == values[:1]


def test_json_in_chunks(tmp_path: Path) -> None:
    """Values longer than a chunk, and numbers that a chunk may split."""
    records = [{"text": "long " * 500_000, "number": 1.5}, {"text": "short", "number": 12345678}] * 3
    json_list(tmp_path / "a.json", records)
    assert [row.values for row in read_rows(str(tmp_path / "a.json"), ["text", "number"])] == [
        (record["text"], record["number"]) for record in records
    ]


# -- several files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three files of three rows, written in another order than that of their names."""
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for name, first in (("b.jsonl", 3), ("a.jsonl", 0), ("more/c.jsonl", 6)):
        jsonl(folder / name, [{"text": str(number)} for number in range(first, first + 3)])
    for name in (".hidden.jsonl", "_SUCCESS", "README.md", "empty.jsonl"):
        (folder / name).write_text("" if name.startswith(("_", "e")) else '{"text": "no"}\n')
    return folder


def texts(source: str | list[str]) -> str:
    return "".join(row.values[0] for row in read_rows(source, ["text"]))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ("", "012345"),
        ("*.jsonl", "012345"),
        ("**/*.jsonl", "012345678"),
        ("[ab].jsonl", "012345"),
        ("more/?.jsonl", "678"),
        ("m*/c.jsonl", "678"),
        ("*", "012345678"),
        (["b.jsonl", "a.jsonl"], "345012"),
        (["more", "b.jsonl", "b.jsonl"], "678345345"),
    ],
    ids=str,
)
def test_ways_to_name_files(places: str | list[str], expected: str, shards: Path) -> None:
    source = f"{shards}/{places}" if isinstance(places, str) else [f"{shards}/{place}" for place in places]
    assert texts(source) == expected


def test_a_literal_name_takes_precedence_over_a_pattern(shards: Path) -> None:
    (shards / "a[1]").mkdir()
    jsonl(shards / "a[1]/b*.jsonl", [{"text": "literal"}])
    jsonl(shards / "a[1]/bb.jsonl", [{"text": "other"}])
    assert texts(f"{shards}/a[1]/b*.jsonl") == "literal"
    assert texts(f"{shards}/a[1]/bb*.jsonl") == "other"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("z*.jsonl", r"no data file matches the pattern .*z\*\.jsonl"),
        ("gone/a.jsonl", "does not exist"),
        ("README.md", "not '.md'"),
        ("R*", "not '.md'"),
        ("empty.jsonl", "is empty"),
        ("bare", "has no file of a type"),
        ("mixed", r"files of several types: .csv, .txt"),
    ],
)
def test_unusable_sources(place: str, message: str, shards: Path) -> None:
    (shards / "bare/deep").mkdir(parents=True)
    (shards / "mixed").mkdir()
    (shards / "mixed/a.csv").write_text("text\na\n")
    (shards / "mixed/license.txt").write_text("MIT\n")
    with pytest.raises(ConfigError, match=message) as caught:
        find_data_files(f"{shards}/{place}")
    assert caught.value.hint


def test_of_several_types_one_is_proposed_compressed_or_not(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}'))
    (tmp_path / "notes.txt").write_text("c")
    with pytest.raises(ConfigError, match=r"several types: \.jsonl, \.txt") as caught:
        find_data_files(str(tmp_path))
    proposed = caught.value.hint.split("[")[1].rstrip("]").split(", ")
    assert [row.values[0] for row in read_rows(proposed, ["text"])] == ["a", "b"]


def test_a_data_set_that_was_saved_by_the_datasets_library(tmp_path: Path) -> None:
    """Its metadata names its files, and the data sets of a directory."""
    split = tmp_path / "saved/train"
    split.mkdir(parents=True)
    for number in range(2):
        with pa.ipc.new_stream(str(split / f"data-{number:05}-of-00002.arrow"), pa.schema([("text", "string")])) as out:
            out.write_table(pa.table({"text": [f"{number}", "x"]}))
    names = [{"filename": f"data-{number:05}-of-00002.arrow"} for number in (1, 0)]
    (split / "state.json").write_text(json.dumps({"_data_files": names}))
    (split / "dataset_info.json").write_text("{}")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts(str(split)) == "1x0x"
    with pytest.raises(ConfigError, match="several data sets: train") as caught:
        find_data_files(str(tmp_path / "saved"))
    assert caught.value.hint.endswith("saved/train")
    (split / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"lacks its file data-00000-of-00002\.arrow"):
        find_data_files(str(split))


def test_the_digest_covers_bytes_types_and_order(shards: Path) -> None:
    before = digest_sources(str(shards))
    elsewhere = shards.with_name("elsewhere")
    shards.rename(elsewhere)
    assert digest_sources(str(elsewhere)) == before
    first, second = f"{elsewhere}/a.jsonl", f"{elsewhere}/b.jsonl"
    assert digest_sources([first, second]) == before
    assert digest_sources([second, first]) != before
    assert digest_sources([first]) != before
    (elsewhere / "a.txt").write_bytes((elsewhere / "a.jsonl").read_bytes())
    assert digest_sources(f"{elsewhere}/a.txt") != digest_sources(first), "the same bytes are other rows"


def test_on_an_object_store(shards: Path) -> None:
    with s3_server() as bucket:
        remote = open_storage(bucket)
        pq.write_table(table(), shards / "t.parquet")
        arrow_file(shards / "t.arrow")
        compressed(jsonl, "gzip")(shards / "t.jsonl.gz")
        for path in shards.rglob("*.*"):
            remote.put(f"data/{path.relative_to(shards)}", [path.read_bytes()])
        assert texts(f"{bucket}/data/*.jsonl") == texts(f"{bucket}/data/[ab].jsonl") == "012345"
        assert texts(f"{bucket}/data/more") == "678"
        assert texts([f"{bucket}/data/**/c.jsonl", str(shards / "a.jsonl")]) == "678012"
        assert digest_sources(f"{bucket}/data/*.jsonl") == digest_sources(f"{shards}/*.jsonl")
        for name in ("t.parquet", "t.arrow", "t.jsonl.gz"):
            assert texts(f"{bucket}/data/{name}") == "".join(str(record["text"]) for record in RECORDS), name
        assert next(read_rows(f"{bucket}/data/a.jsonl", ["text"])).where == f"{bucket}/data/a.jsonl, row 1"
        with pytest.raises(ConfigError, match=r"nothing\.jsonl does not exist"):
            find_data_files(f"{bucket}/data/nothing.jsonl")


def test_a_url_with_credentials_is_refused_and_not_printed() -> None:
    with pytest.raises(ConfigError, match="must not carry credentials") as caught:
        find_data_files("s3://key:secret@bucket/data.jsonl")
    assert "secret@" not in str(caught.value)


# -- bad rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "faults"),
    [
        ("a.jsonl", b'{"text": "1"}\n\n{"text"\n[1]\n{"id": 1}\n{"text": "\xff"}\n{"text": "\\udc00"}\n{"text": "2"}',
         {2: "cannot be read as .jsonl", 3: "not a JSON object", 4: "no column 'text'", 5: "not UTF-8", 6: "unpaired"}),
        ("a.json", b'[{"text": "1"}, 7, {"id": 1}, {"text": "2"}]', {2: "not a JSON object", 3: "no column 'text'"}),
        ("a.csv", b'id,text\n1,1\n\n1\n1,2,3\n1,"a"b\n1,\xff\n1,2\n',
         {2: "has 1 fields but the header has 2", 3: "has 3 fields", 4: "must be doubled", 5: "not UTF-8"}),
        ("a.txt", b"1\n\xff\n2\n", {2: "not UTF-8"}),
    ],
)  # fmt: skip
def test_a_broken_row_is_a_fault_and_the_rest_is_read(
    name: str, body: bytes, faults: dict[int, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(body)
    rows = list(read_rows(str(tmp_path / name), ["text"]))
    assert [row.values for row in rows if not row.fault] == [("1",), ("2",)]
    actual = {number: row.fault for number, row in enumerate(rows, 1) if row.fault}
    assert actual.keys() == faults.keys()
    for number, message in faults.items():
        assert message in str(actual[number])
        assert rows[number - 1].values == ()
        assert f"{name}, row {number}" in rows[number - 1].where
    if name in ("a.jsonl", "a.csv"):
        assert rows[-1].where.endswith(f"row {len(rows)} (line {len(rows) + (1 if name == 'a.jsonl' else 2)})")


@pytest.mark.parametrize(
    ("name", "write", "cut"),
    [
        ("a.json", json_list, 2),
        ("a.jsonl.gz", compressed(jsonl, "gzip"), 9),
        ("a.csv.zst", compressed(separated(","), "zstd"), 9),
        ("a.parquet", lambda path: pq.write_table(table(), path), 9),
        ("a.arrow", arrow_stream, 500),
    ],
)
def test_a_truncated_file_is_refused(name: str, write: Callable[[Path], None], cut: int, tmp_path: Path) -> None:
    write(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-cut])
    with pytest.raises(ConfigError, match=r"cannot be read as \.(json|csv|parquet|arrow)"):
        texts(str(tmp_path / name))


def test_a_column_that_some_rows_lack_is_not_missing(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"id": 1}, {"id": 2}, {"text": "3"}])
    assert [bool(row.fault) for row in read_rows(str(tmp_path / "a.jsonl"), ["text"])] == [True, True, False]
    jsonl(tmp_path / "a.jsonl", [{"id": 1}, {"id": 2}])
    with pytest.raises(ConfigError, match="has no column 'text'; it has id"):
        texts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_keys_of_objects_in_a_column(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    rows = [{"id": 1, "pair": {"en": "one", "de": "eins"}}, {"id": 2, "pair": {"en": "two", "de": None}}]
    table = pa.Table.from_pylist(rows)
    match kind:
        case "parquet":
            pq.write_table(table, path)
        case "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        case _:
            path.write_text("\n".join(map(json.dumps, rows)))
    names = ["pair.de", "id", "pair.en", "pair.fr"]
    assert [row.values for row in read_rows(str(path), names)] == [("eins", 1, "one", None), (None, 2, "two", None)]
    columns = [Column("source", ColumnType.TEXT), Column("target", ColumnType.TEXT)]
    with pytest.raises(ConfigError) as caught:
        choose_columns(columns, DataSettings(train=str(path)))
    assert "-s data.source=pair." in caught.value.hint
    chosen = choose_columns(columns, DataSettings(train=str(path), source="pair.en", target="pair.de"))
    assert (chosen.used, chosen.unused) == ({"source": "pair.en", "target": "pair.de"}, ["id"])


def test_a_column_whose_name_has_a_dot(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"a.b": "1", "a": {"b": "2"}}])
    assert [row.values for row in read_rows(str(tmp_path / "a.jsonl"), ["a.b", "a"])] == [("1", {"b": "2"})]


def rows_with(faults: dict[int, str], count: int = 10) -> list[Row]:
    return [Row((number,), f"a.jsonl, row {number}", faults.get(number)) for number in range(1, count + 1)]


def test_bad_rows_are_counted_and_skipped() -> None:
    bad = BadRowCounter(limit=2)
    rows = list(usable_rows(rows_with({3: "torn"}), bad, lambda values: "is nine" if values[0] == 9 else None))
    assert [row.values[0] for row in rows] == [1, 2, 4, 5, 6, 7, 8, 10]
    assert (bad.count, bad.first) == (2, ["a.jsonl, row 3: torn", "a.jsonl, row 9: is nine"])
    with pytest.raises(ConfigError, match=r"3 of the first 20 rows are unusable \(data\.max_bad_rows is 2\); "):
        list(usable_rows(rows_with({1: "torn"}), bad))


def test_too_many_bad_rows_name_the_first_three() -> None:
    faults = dict.fromkeys([2, 4, 8, 9], "torn")
    taken: list[Row] = []
    with pytest.raises(ConfigError) as caught:
        taken.extend(usable_rows(rows_with(faults), BadRowCounter(limit=0)))
    assert [row.values[0] for row in taken] == [1], "nothing is given after the one that is too many"
    assert [f"row {number}: torn" in str(caught.value) for number in (2, 4, 8, 9)] == [True, True, True, False]
    assert "data.max_bad_rows" in caught.value.message + caught.value.hint
    with pytest.raises(ConfigError, match=r"^a.jsonl, row 2: torn") as caught:
        list(usable_rows(rows_with({2: "torn"}), BadRowCounter(limit=0)))
    assert "data.max_bad_rows" in caught.value.hint


# -- constant memory ---------------------------------------------------------------------------------------------------

READ = """
    import sys
    from pathlib import Path
    from outlast.trainers.data.readers import read_rows

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    next(read_rows(sys.argv[1], ["text"]))
    before = peak()
    num_bytes = sum(len(row.values[0]) for row in read_rows(sys.argv[1], ["text"]))
    print(num_bytes, peak() - before)
"""


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """300 MB of rows are read with less than 48 MB more than the first row takes. A second or two each."""
    text, num_rows = "word " * 1000, 60_000
    path = tmp_path / f"big.{kind}"
    if kind == "parquet":
        with pq.ParquetWriter(path, pa.schema([("text", "string")]), use_dictionary=False) as writer:
            for _ in range(num_rows // 10_000):
                writer.write_table(pa.table({"text": [text] * 10_000}))
    else:
        line = json.dumps({"text": text}) if "json" in kind else text
        begin, end = {"json": ("[", "{}]"), "csv": ("text\n", "")}.get(kind, ("", ""))
        with gzip.open(path, "wt", 1) if kind.endswith("gz") else path.open("w") as file:
            file.write(begin)
            for _ in range(num_rows):
                file.write(line + (",\n" if kind == "json" else "\n"))
            file.write(end.replace("{}", line))
    command = [sys.executable, "-c", textwrap.dedent(READ), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    num_bytes, grown = map(int, ended.stdout.split())
    assert num_bytes >= num_rows * len(text) - num_rows
    assert grown < 48 * 2**20


def test_a_line_that_is_a_text_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n"abc"\n""\n3\n')
    faults = [row.fault for row in read_rows(str(tmp_path / "rows.jsonl"), ["text"])]
    assert faults == [None, *["is not a JSON object"] * 3]


def test_the_share_of_unusable_rows_is_told() -> None:
    rows = rows_with({number: "torn" for number in range(1, 10_000) if number % 5}, 10_000)
    with pytest.raises(
        ConfigError, match=r"80 of the first 100 rows are unusable \(data\.max_bad_rows is 0\)"
    ) as caught:
        list(usable_rows(rows, BadRowCounter(limit=0)))
    assert "data.max_bad_rows" in caught.value.hint
    with pytest.raises(ConfigError, match=r"40 of the first 40 rows are unusable") as caught:
        list(usable_rows(rows_with(dict.fromkeys(range(1, 41), "torn"), 40), BadRowCounter(limit=3)))
    assert caught.value.hint == "fix them", "no row would be left"


@pytest.mark.parametrize(("num_bad", "hint"), [(1, "fix it, or skip it: "), (2, "fix them, or skip such rows: ")])
def test_the_advice_is_for_as_many_rows(num_bad: int, hint: str) -> None:
    bad = BadRowCounter(0)
    bad.see(3, dict.fromkeys(range(num_bad), "is wrong"))
    with pytest.raises(ConfigError) as caught:
        bad.end()
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("given", "near"), [("trian.csv", "train.csv"), ("TRAIN.csv", "train.csv"), ("gone/train.csv", ""), ("zzz", "")]
)
def test_a_missing_file_suggests_the_most_similar_one(given: str, near: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\na\n")
    (tmp_path / ".trian.csv").write_text("text\na\n")
    with pytest.raises(ConfigError, match="does not exist") as caught:
        find_data_files(str(tmp_path / given))
    assert (f"did you mean {tmp_path / near}?" in str(caught.value.hint)) == bool(near)
