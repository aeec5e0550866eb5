"""Decoder of a whole safetensors file, by the header parser of the product."""

from __future__ import annotations

import torch

from outlast.checkpointing.format.safetensors import TensorSpec, bytes_view, parse_header


def decode(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors in a file as views of `buffer`, a contiguous uint8 tensor. Raises SafetensorsError."""
    offsets, _ = parse_header(bytes_view(buffer), buffer.numel())
    return {name: _as_tensor(buffer[begin : begin + spec.num_bytes], spec) for name, (spec, begin) in offsets.items()}


def _as_tensor(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Reinterpret a one-dimensional uint8 tensor as `spec`; a view, unless it is misaligned."""
    is_misaligned = data.storage_offset() % spec.dtype.itemsize or data.data_ptr() % spec.dtype.itemsize
    aligned = data.clone() if is_misaligned else data
    return aligned.view(spec.dtype).reshape(spec.shape)
