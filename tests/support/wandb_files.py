"""Reads what Weights & Biases leaves offline: a LevelDB log (32 KiB blocks, records in pieces) of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEADER, _START = 32 * 1024, 7, 7


def records(path: Path) -> Iterator[bytes]:
    """The records of a log, which may end in the middle of one."""
    data, position, whole = path.read_bytes(), _START, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:  # the rest of a block is too small for a header
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + _HEADER : position + _HEADER + length]
        if len(piece) < length:
            return
        whole = piece if kind in (1, 2) else whole + piece  # whole, first; middle, last
        if kind in (1, 4):
            yield whole
        position += _HEADER + length


def history(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and values of each line of history below a folder, in the order written."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.rglob("run-*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
                values = {key: json.loads(text) for key, text in items.items()}
                found.append((int(values["_step"]), {key: value for key, value in values.items() if key[0] != "_"}))
    return found
