"""The safetensors container, written and read as streams of buffers.

Written here rather than by the library, because the library wants all bytes at once and digests nothing; the format is
the library's (github.com/huggingface/safetensors): eight bytes of header length, a JSON header, then the tensors
without holes. Everything a header claims is checked before it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod

import torch

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
    """The bytes are not a whole safetensors file."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order; a view where the tensor is a contiguous one on the host."""
    host = tensor.detach().to("cpu").contiguous()
    return bytes_view(host.reshape(-1).view(torch.uint8))


def bytes_view(buffer: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host."""
    return memoryview(buffer.numpy().data) if buffer.numel() else memoryview(b"")


def encode(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The file as buffers: the header, then each tensor, widest elements first so that all are aligned.

    Args:
        tensors: Name to tensor, of any shape (0-dim and empty too) and any dtype in `DTYPES`.

    Raises:
        TypeError: A dtype that the format does not know.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"safetensors cannot hold {name}: {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield tensor_bytes(tensors[name])


def decode(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in a file's bytes, as views of them.

    Args:
        buffer: A contiguous uint8 tensor holding the whole file.

    Raises:
        SafetensorsError: The header does not describe these bytes.
    """
    data = bytes_view(buffer)
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        body = buffer[8 + length :]
        tensors, expected = {}, 0
        entries = ((name, item) for name, item in header.items() if name != "__metadata__")
        for name, item in sorted(entries, key=lambda pair: pair[1]["data_offsets"]):
            dtype, shape, (start, end) = DTYPES[item["dtype"]], item["shape"], item["data_offsets"]
            if not all(isinstance(length, int) and length >= 0 for length in shape):
                raise SafetensorsError(f"tensor {name} has the shape {shape}")
            if start != expected or end - start != prod(shape) * dtype.itemsize or end > body.numel():
                raise SafetensorsError(f"tensor {name} does not fit its place")
            tensors[name] = _view(body[start:end], dtype).reshape(shape)
            expected = end
    except SafetensorsError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"the header is not readable ({type(error).__name__}: {error})") from error
    if expected != body.numel():
        raise SafetensorsError(f"{body.numel() - expected} bytes belong to no tensor")
    return tensors


def _view(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    crooked = part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize
    aligned = part.clone() if crooked else part
    return aligned.view(dtype)
