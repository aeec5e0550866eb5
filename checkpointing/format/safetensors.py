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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsError(ValueError):
    """The bytes are not an intact safetensors file."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements in row-major order; a view if the tensor is contiguous and on the host."""
    host = tensor.detach().to("cpu").contiguous()
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
    """Encode a file as buffers: the header, then each tensor. Raises TypeError for a dtype not in `DTYPES`."""
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
        end = offset + spec.num_bytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield tensor_bytes(fetch(name))


def header_bytes(data: Buffer) -> int:
    """Return how many bytes `parse_header` needs, from a file's first eight."""
    return 8 + int.from_bytes(data[:8], "little")


def parse_header(data: Buffer, num_bytes: int) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
    """Parse the start of a file, at least `header_bytes`; return each tensor's spec and first byte, and the metadata.

    Raises SafetensorsError if the header does not describe a file of `num_bytes`.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        begin = 8 + length
        offsets, expected = {}, 0
        metadata = header.pop("__metadata__", {})
        entries = header.items()
        for name, item in sorted(entries, key=lambda pair: pair[1]["data_offsets"]):
            dtype, shape, (start, end) = DTYPES[item["dtype"]], item["shape"], item["data_offsets"]
            is_plausible = all(isinstance(length, int) and length >= 0 for length in shape)
            if not is_plausible or prod(max(1, length) for length in shape) >= 2**63:
                raise SafetensorsError(f"tensor {name} has the shape {shape}")
            spec = TensorSpec(dtype, tuple(shape))
            if start != expected or end - start != spec.num_bytes or begin + end > num_bytes:
                raise SafetensorsError(f"tensor {name} does not match its byte range")
            offsets[name] = (spec, begin + start)
            expected = end
    except SafetensorsError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"the header is not readable ({type(error).__name__}: {error})") from error
    if begin + expected != num_bytes:
        raise SafetensorsError(f"{num_bytes - begin - expected} bytes belong to no tensor")
    return offsets, metadata
