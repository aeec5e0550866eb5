"""Mutations of files: bytes, lines, and values in JSON or YAML. Each is a function of its seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

#: What is inserted or put in the place of a value.
TEXTS = [
    *(b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\r\n", b"  ", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\\"),
    *(b"{", b"}", b"[", b"]", b":", b"-", b"#", b"%", b"&a", b"*a", b"!!python/object:os.system"),
    *(b"null", b"NaN", b"1e999", b"\\u0000", b"\\ud800", "é\u2028😀".encode()),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "\x00", "é", "../x", "a" * 5000),
    *([], [None], [[]], [1, "a"], {}, {"": {}}, {"a": None}),
]


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes anywhere: flipped, inserted, removed, doubled, cut off, or lines exchanged."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        place, length = chance.randrange(len(data) + 1), chance.choice([1, 1, 2, 8, 64])
        match chance.randrange(7):
            case 0 if data:
                place = min(place, len(data) - 1)
                data = data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
            case 1:
                data = data[:place] + chance.choice(TEXTS) + data[place:]
            case 2:
                data = data[:place] + data[place + length :]
            case 3:
                data = data[:place] + data[place : place + length] * 2 + data[place + length :]
            case 4 if chance.random() < 0.3:
                data = data[:place]
            case 5:
                lines = data.split(b"\n")
                one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
                lines[one], lines[other] = lines[other], lines[one]
                data = b"\n".join(lines)
            case _:
                data = data[:place] + chance.choice(TEXTS) + data[place + length :]
    return data


def mutate_value(value: Any, chance: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """Change one value anywhere in nested lists and dicts: another value, removed, doubled, or under another name."""
    places = list(_places(value))
    if not places:
        return chance.choice(values)
    holder, key = chance.choice(places)
    match chance.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(["", "x", f"{key}s", str(key).upper(), "0"])] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.append(holder[key])
        case 3:
            holder[key] = [holder[key]] if chance.random() < 0.5 else {"x": holder[key]}
        case 4 if isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = chance.choice(
                [holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000, str(holder[key])]
            )
        case _:
            holder[key] = chance.choice(values)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _json(data: bytes, chance: random.Random) -> bytes:
    return json.dumps(mutate_value(json.loads(data), chance)).encode()


def _jsonl(data: bytes, chance: random.Random) -> bytes:
    rows = [json.loads(line) for line in data.splitlines()]
    mutate_value(rows, chance)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _yaml(data: bytes, chance: random.Random) -> bytes:
    return yaml.safe_dump(mutate_value(yaml.safe_load(data), chance), allow_unicode=True).encode()


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {".json": _json, ".jsonl": _jsonl, ".yaml": _yaml}


def mutate(data: bytes, suffix: str, seed: int) -> bytes:
    """Change a file's bytes; half of the files with values that are known here get another value instead."""
    chance = random.Random(f"{suffix} {seed}")
    if suffix in _STRUCTURED and chance.random() < 0.6:
        return _STRUCTURED[suffix](data, chance)
    return mutate_bytes(data, chance)
