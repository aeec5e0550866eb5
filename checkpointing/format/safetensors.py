"""Streaming reader and writer of the safetensors format (github.com/huggingface/safetensors).

A file is eight bytes of header length, a JSON header, then the tensors without gaps. The safetensors library needs all
bytes at once and computes no digests, so this module encodes buffer by buffer. A header is input: nothing in it is used
before it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import torch

from outlast.checkpointing.storage.base import Buffer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # of the safetensors library
_MAX_DIGITS = 20  # of a number below 2**63, and one
_MAX_ELEMENTS = 2**60  # so that their bytes are below 2**63
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsError(ValueError):
    """The bytes are not an intact safetensors file."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements in row-major order; a view if the tensor is contiguous and on the host."""
    host = tensor.detach().to("cpu").contiguous()
    if host.numel() == 1:  # contiguous with any stride, and the view below needs 1
        host = host.as_strided((1,), (1,))
    return bytes_view(host.reshape(-1).view(torch.uint8))


def bytes_view(buffer: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous uint8 tensor on the host."""
    return memoryview(buffer.numpy().data) if buffer.numel() else memoryview(b"")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names in the order of the file: widest elements first, so that all are aligned."""
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """Encode a file as buffers: the header, then each tensor. Raises TypeError for what the format cannot hold."""
    return stream({name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__, metadata)


def stream(
    specs: Mapping[str, TensorSpec], fetch: Callable[[str], torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """Encode tensors that are fetched one by one, in the order of `order`; see `encode`."""
    names = order(specs)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in names:
        spec = specs[name]
        if spec.dtype not in _NAMES:
            raise TypeError(f"safetensors cannot hold {name}: {spec.dtype}")
        if name == "__metadata__" or not _is_unicode(name):
            raise TypeError(f"safetensors cannot hold a tensor of the name {name!r}")
        end = offset + spec.num_bytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise TypeError(
            f"safetensors cannot hold {len(names):,} tensors in a file: their header has {len(text):,} bytes"
        )
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield tensor_bytes(fetch(name))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def header_bytes(data: Buffer) -> int:
    """Return how many bytes `parse_header` needs, from a file's first eight.

    Raises SafetensorsError beyond the format's limit, so that a damaged length is never read into memory.
    """
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise SafetensorsError(f"its header has {length:,} bytes; the format allows {_MAX_HEADER_BYTES:,}")
    return 8 + length


def parse_header(data: Buffer, num_bytes: int) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
    """Parse the start of a file, at least `header_bytes`; return each tensor's spec and first byte, and the metadata.

    Accepts nothing that the safetensors library refuses. Raises SafetensorsError if the header does not describe a file
    of `num_bytes`.
    """
    begin = header_bytes(data)
    if min(len(data), num_bytes) < begin:
        raise SafetensorsError("it ends within its header")
    header = _parse_json(bytes(data[8:begin]))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError("its metadata is not text by name")
    ranges = {name: _parse_tensor(name, item) for name, item in header.items()}
    offsets, expected = {}, 0
    for name, (spec, start, end) in sorted(ranges.items(), key=lambda pair: pair[1][1:]):
        if start != expected or end - start != spec.num_bytes or begin + end > num_bytes:
            raise SafetensorsError(f"tensor {name} does not match its byte range")
        offsets[name] = (spec, begin + start)
        expected = end
    if begin + expected != num_bytes:
        raise SafetensorsError(f"{num_bytes - begin - expected} bytes belong to no tensor")
    return offsets, metadata


def _parse_json(text: bytes) -> dict[str, Any]:
    """Parse a header where Python's parser would be more tolerant than the format."""
    if not text.startswith(b"{"):
        raise SafetensorsError("its header does not begin with an object")
    try:
        decoded = text.decode()
        header: dict[str, Any] = json.loads(
            decoded, object_pairs_hook=_unique, parse_int=_parse_natural, parse_float=_refuse, parse_constant=_refuse
        )
        json.dumps(header, ensure_ascii=False).encode()  # fails for halves of surrogates
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"its header is not readable ({type(error).__name__}: {error})") from error
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise SafetensorsError("its header has a name twice")
    return found


def _parse_natural(text: str) -> int:
    return int(text) if text.isdigit() and len(text) < _MAX_DIGITS else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise SafetensorsError(f"its header has the number {text[:_MAX_DIGITS]}")


def _parse_tensor(name: str, item: Any) -> tuple[TensorSpec, int, int]:
    """Return a tensor's spec and the range of its bytes."""
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"tensor {name} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SafetensorsError(f"tensor {name} has the unknown dtype {dtype!r}")
    if not _are_numbers(shape) or prod(max(1, length) for length in shape) >= _MAX_ELEMENTS:
        raise SafetensorsError(f"tensor {name} has the shape {shape}")
    if not _are_numbers(offsets) or len(offsets) != 2:
        raise SafetensorsError(f"tensor {name} has the byte range {offsets}")
    return TensorSpec(DTYPES[dtype], tuple(shape)), offsets[0], offsets[1]


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
