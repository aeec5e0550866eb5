"""Mutations of what a run's storage holds: bytes, and other content under digests and checksums that fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.support import forged
from tests.system.mutations.mutate import TEXTS, VALUES, mutate_bytes, mutate_value
from tests.system.mutations.stored_runs import OWN, TRAINED

DEPTHS = (20, 200, 700, 950)


def _nested(depth: int, inner: Any, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


#: More values, which only JSON from a stranger has.
HOSTILE: list[Any] = [
    *VALUES,
    *(2**62, 2**63 - 1, -(2**63), -(2**63) - 1, 2**64, 10**30, -1e308, float("-inf"), 1e-320),
    *("\ud800", "\x1b[2J", "a\nb", "NaN", "1e999", "..", "/", "x" * 300, "0001-00000001/checkpoint-1"),
    *([0] * 5000, ["a"] * 50, {str(number): number for number in range(300)}),
    *(_nested(depth, None, lambda inner: [inner]) for depth in DEPTHS),
    *(_nested(depth, 0, lambda inner: {"a": inner}) for depth in DEPTHS),
]


def _json(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.25:
        data = json.dumps(mutate_value(json.loads(data), chance)).encode()
    return json.dumps(mutate_value(json.loads(data), chance, HOSTILE)).encode()


def _jsonl(data: bytes, chance: random.Random) -> bytes:
    rows = json.loads(_json(b"[" + b",".join(data.splitlines()) + b"]", chance))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file: a value, its text, its length; or the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    match chance.randrange(6):
        case 0:
            header = mutate_bytes(header, chance)
        case 1:
            length = chance.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, length - 1, length + 1, len(data) - 8])
            return length.to_bytes(8, "little") + header + rest
        case 2:
            rest = mutate_bytes(rest, chance)
        case _:
            header = _json(header, chance)
            header += b" " * (-len(header) % 8 if chance.random() < 0.8 else 0)
    return len(header).to_bytes(8, "little") + header + rest


def _segment(data: bytes, chance: random.Random) -> bytes:
    """Change a compacted journal: its counts, a line, its columns or its rows."""
    table = parquet.read_table(pa.BufferReader(data))
    metadata = dict(table.schema.metadata)
    match chance.randrange(6):
        case 0:
            metadata = {key: _json(value, chance) for key, value in metadata.items()}
        case 1:
            metadata = chance.choice([{}, {b"outlast.counts": chance.choice([b"[37]", b"[1,2", b"37", b'["a"]'])}])
        case 2 | 3:
            lines = table["json"].to_pylist()
            places = [number for number, line in enumerate(lines) if line is not None]
            place = chance.choice(places if chance.random() < 0.8 else range(len(lines)))
            new = _json((lines[place] or '{"event": "step", "step": 3}').encode(), chance)
            lines[place] = new.decode() if chance.random() < 0.9 else mutate_bytes(new, chance).decode("latin-1")
            table = table.set_column(table.column_names.index("json"), "json", pa.array(lines, pa.string()))
        case _:
            table = _other_table(table, chance)
    sink = pa.BufferOutputStream()
    parquet.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _samples(data: bytes, chance: random.Random) -> bytes:
    """Change a file of samples: its columns, types, rows or batches."""
    table = _other_table(pa.ipc.open_file(pa.BufferReader(data)).read_all(), chance)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=chance.choice([1, 7, 1024]))
    return bytes(sink.getvalue())


def _other_table(table: pa.Table, chance: random.Random) -> pa.Table:
    column = chance.randrange(table.num_columns)
    name = table.column_names[column]
    match chance.randrange(8):
        case 0:
            return table.drop_columns([name])
        case 1:
            other = chance.choice(["x", "", table.column_names[0]])
            return table.rename_columns([other if old == name else old for old in table.column_names])
        case 2:
            kind = chance.choice([pa.null(), table[name].type])
            return table.set_column(column, name, pa.nulls(table.num_rows, kind))
        case 3:
            values = chance.choice(["a", 1, 1.5, True, [1], [-1] * 16, [2**31 - 1] * 16, {"a": 1}, 2**62, float("nan")])
            return table.set_column(column, name, pa.array([values] * table.num_rows))
        case 4:
            return table.slice(0, chance.choice([0, 1, table.num_rows - 1]))
        case 5:
            return pa.concat_tables([table, table])
        case 6:
            return table.append_column(chance.choice(["x", name]), table[name])
        case _:
            return table.take(chance.choices(range(table.num_rows), k=table.num_rows))


@dataclass(frozen=True)
class Target:
    """Files of one kind.

    Attributes:
        run: The run that has them.
        pattern: Their paths in the storage.
        change: Makes other content of them.
        keep: Writes it under digests that fit: a function of the path and the content; None where nothing has digests.
    """

    run: str
    pattern: str
    change: Callable[[bytes, random.Random], bytes]
    keep: Callable[[Path, bytes], None] | None = None


def _keep_manifest(path: Path, data: bytes) -> None:
    def change(body: dict[str, Any]) -> None:
        new = json.loads(data)
        body.clear()
        body.update(new if isinstance(new, dict) else {"format": new})

    forged.forge_manifest(path.parent, change)


def _keep_committed(path: Path, data: bytes) -> None:
    folder = next(parent for parent in path.parents if (parent / "manifest.json").exists())
    forged.add_file(folder, str(path.relative_to(folder)), data)


def _keep_data(path: Path, data: bytes) -> None:
    def change(body: dict[str, Any]) -> None:
        new = json.loads(data)
        body.clear()
        body.update(new if isinstance(new, dict) else {"files": new})

    forged.forge_data(path.parent, change)


def _keep_prepared(path: Path, data: bytes) -> None:
    folder = next(parent for parent in path.parents if (parent / "data.json").exists())
    forged.replace_data_file(folder, str(path.relative_to(folder)), data)


_AT = "attempts/*"
TARGETS = {
    "manifest": Target(OWN, f"{_AT}/checkpoint-*/manifest.json", _json, _keep_manifest),
    "manifest of a trained run": Target(TRAINED, f"{_AT}/checkpoint-*/manifest.json", _json, _keep_manifest),
    "manifest of a model": Target(TRAINED, f"{_AT}/model/manifest.json", _json, _keep_manifest),
    "claim": Target(OWN, f"{_AT}/claim.json", _json),
    "claim of a trained run": Target(TRAINED, f"{_AT}/claim.json", _json),
    "commits": Target(OWN, f"{_AT}/commits-*.jsonl", _jsonl),
    "events": Target(OWN, f"{_AT}/events-*.jsonl", _jsonl),
    "events of a trained run": Target(TRAINED, f"{_AT}/events-*.jsonl", _jsonl),
    "compacted events": Target(OWN, f"{_AT}/events-*.parquet", _segment),
    "prune": Target(OWN, "prunes/*/commits-*.jsonl", _jsonl),
    "pin": Target(OWN, "pins/*", mutate_bytes),
    "alive": Target(OWN, "launches/*/alive.json", _json),
    "launch events": Target(OWN, "launches/*/events-*.jsonl", _jsonl),
    "record": Target(TRAINED, "launches/*/record.json", _json),
    "loop state": Target(OWN, f"{_AT}/checkpoint-*/training_state/state.json", _json, _keep_committed),
    "weights": Target(OWN, f"{_AT}/checkpoint-*/model-*.safetensors", _header, _keep_committed),
    "optimizer": Target(OWN, f"{_AT}/checkpoint-*/training_state/*.safetensors", _header, _keep_committed),
    "index": Target(OWN, f"{_AT}/checkpoint-*/*.index.json", _json, _keep_committed),
    "state of a trained run": Target(TRAINED, f"{_AT}/checkpoint-*/training_state/state.json", _json, _keep_committed),
    "config": Target(TRAINED, f"{_AT}/*/config.json", _json, _keep_committed),
    "tokenizer": Target(TRAINED, f"{_AT}/*/tokenizer*.json", _json, _keep_committed),
    "data": Target(".data", "*/data.json", _json, _keep_data),
    "samples": Target(".data", "*/*.arrow", _samples, _keep_prepared),
    "prepared tokenizer": Target(".data", "*/tokenizer/*.json", _json, _keep_prepared),
}


@dataclass(frozen=True)
class Mutation:
    """One file, changed.

    Attributes:
        run: The run, or `.data`.
        path: The file, relative to the run.
        is_digested: Whether a digest covers it.
        is_forged: Whether it holds other content, under digests that fit.
        is_changed: Whether its bytes differ.
    """

    run: str
    path: str
    is_digested: bool
    is_forged: bool
    is_changed: bool = True

    @property
    def names(self) -> list[str]:
        """What an error may call it: the file, its checkpoint, its attempt or launch."""
        parts = [part for part in self.path.split("/") if part not in ("attempts", "launches", "training_state")]
        steps = [part.replace("-", " ") for part in parts if part.startswith("checkpoint-")]
        lost = ["committed and never deleted"] if "commits-" in self.path else []  # what a journal no longer shows
        refused = [f"run {self.run!r}", "that the run was started with"] if self.is_forged else []
        return [*parts, *steps, *lost, *refused]


def mutate_storage(root: Path, target: str, seed: int) -> Mutation:
    """Change a file of this kind in the storage at `root`."""
    kind, chance = TARGETS[target], random.Random(f"{target} {seed}")
    files = sorted((root / kind.run).glob(kind.pattern))
    path = files[-1] if chance.random() < 0.5 else chance.choice(files)
    where, is_digested = str(path.relative_to(root / kind.run)), kind.keep is not None
    if seed in EXTREMES:
        _make_extreme(path, EXTREMES[seed])
        return Mutation(kind.run, where, is_digested, is_forged=False)
    if target == "pin":
        _rename(path, chance)
        return Mutation(kind.run, where, is_digested=False, is_forged=True)
    before = path.read_bytes()
    if chance.random() < 0.35:
        path.write_bytes(after := mutate_bytes(before, chance))
        return Mutation(
            kind.run, where, is_digested, is_forged=False, is_changed=_content(kind, after) != _content(kind, before)
        )
    after = kind.change(before, chance)
    if kind.keep is None:
        path.write_bytes(after)
    else:
        kind.keep(path, after)
    return Mutation(kind.run, where, is_digested, is_forged=True)


#: Content that no chance finds, by seed: bytes, or a number of zeros.
EXTREMES: dict[int, int | bytes] = {
    -1: 0,
    -2: 2**30,
    -3: b"[" * 1_000_000,
    -4: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    -5: b"[" + b"1," * 500_000 + b"1]",
    -6: (2**63 - 1).to_bytes(8, "little") + b"{}",
    -7: b'{"event": "step", "step": ' + b"9" * 4000 + b"}\n",
}


def _make_extreme(path: Path, content: int | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    with path.open("wb") as file:
        file.truncate(content)  # sparse


def _content(kind: Target, data: bytes) -> Any:
    """Return what counts of a file's bytes: of one with a digest of its own, the values."""
    if kind.keep in (_keep_manifest, _keep_data):
        with suppress(ValueError, RecursionError):
            return json.dumps(json.loads(data), sort_keys=True)
    return data


def _rename(path: Path, chance: random.Random) -> None:
    name = mutate_bytes(path.name.encode(), chance).replace(b"/", b"-").replace(b"\x00", b"")[:250]
    if chance.random() < 0.2:
        name = chance.choice(TEXTS) + b"@" + chance.choice(TEXTS)
        name = name.replace(b"/", b"-").replace(b"\x00", b"")
    if name in (b"", b".", b".."):
        path.unlink()
    else:
        path.rename(path.parent / name.decode("utf-8", "surrogateescape"))
