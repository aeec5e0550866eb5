"""The container: what we write the library reads, what the library writes we read, and lies are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpointing.format.safetensors import DTYPES, SafetensorsError, encode, tensor_bytes
from tests.support.decoded_safetensors import decode


def joined(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(encode(tensors))


def as_buffer(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits; NaNs included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and tensor_bytes(left[name]) == tensor_bytes(right[name])
        for name in left
    )


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Every bit is random, so NaNs, infinities and denormals come as they will; bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


SHAPES = [(), (0,), (0, 3), (1,), (7,), (3, 5), (2, 3, 4)]


def every_kind() -> dict[str, torch.Tensor]:
    return {
        f"{name}.{'x'.join(map(str, shape)) or 'scalar'}": random_tensor(dtype, shape, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for shape in SHAPES
    }


def test_the_library_reads_what_we_write() -> None:
    tensors = every_kind()
    assert same(safetensors.torch.load(joined(tensors)), tensors)


def test_we_read_what_the_library_writes() -> None:
    tensors = every_kind()
    assert same(decode(as_buffer(safetensors.torch.save(tensors))), tensors)


def test_we_read_what_we_write() -> None:
    tensors = every_kind()
    assert same(decode(as_buffer(joined(tensors))), tensors)


def test_nothing_at_all_is_a_file_too() -> None:
    assert decode(as_buffer(joined({}))) == {}
    assert safetensors.torch.load(joined({})) == {}


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    seed=st.integers(0, 100),
)
def test_any_names_shapes_and_dtypes(shapes: dict[str, tuple[str, list[int]]], seed: int) -> None:
    tensors = {name: random_tensor(DTYPES[kind], tuple(shape), seed) for name, (kind, shape) in shapes.items()}
    assert same(decode(as_buffer(joined(tensors))), tensors)
    assert same(safetensors.torch.load(joined(tensors)), tensors)


def test_views_are_written_as_what_they_show() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "transposed": base.t(),
        "column": base[:, 1],
        "every-other": base[::2],
        "expanded": base[:1].expand(5, 4),
    }
    back = decode(as_buffer(joined(tensors)))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_parameters_that_need_gradients_are_written() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert torch.equal(decode(as_buffer(joined({"w": weight})))["w"], torch.ones(2))


def test_writing_does_not_copy_a_contiguous_tensor() -> None:
    tensor = torch.zeros(4)
    chunks = list(encode({"a": tensor}))
    tensor.fill_(1.0)
    assert bytes(chunks[1]) == bytes(tensor_bytes(torch.ones(4)))


def test_the_bytes_follow_from_the_tensors_alone() -> None:
    tensors = every_kind()
    backwards = dict(reversed(tensors.items()))
    assert joined(tensors) == joined(backwards)


def test_tensors_are_aligned() -> None:
    data = joined({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.float64)})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"]["data_offsets"][0] == 0


def test_a_dtype_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot hold z: torch\.complex64"):
        joined({"z": torch.zeros(1, dtype=torch.complex64)})


# -- other people's files ----------------------------------------------------------------------------------------------


def container(header: Any, body: bytes = b"", *, pad: bool = True) -> torch.Tensor:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return as_buffer(len(text).to_bytes(8, "little") + text + body)


def item(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_of_any_length_is_read() -> None:
    """Padding is a habit, not a rule: tensors may lie at any byte."""
    for name in ("a", "ab", "abc", "abcd"):
        header = {name: item(), "empty": item(shape=(0,), offsets=(16, 16)), "last": item("U8", (1,), (16, 17))}
        found = decode(container(header, bytes(16) + b"\7", pad=False))
        assert found[name].tolist() == [[0, 0], [0, 0]]
        assert found["empty"].shape == (0,)
        assert found["last"].tolist() == [7]


MALFORMED = {
    "not-json": b"{",
    "not-utf8": b"\xff\xfe\xff",
    "a-list": [],
    "a-number": 1,
    "null": None,
    "an-entry-that-is-a-number": {"a": 1},
    "an-entry-without-offsets": {"a": {"dtype": "F32", "shape": [2, 2]}},
    "an-unknown-dtype": {"a": item("F33")},
    "a-dtype-that-is-a-list": {"a": item([])},
    "a-shape-that-is-text": {"a": item(shape="22")},
    "a-shape-of-text": {"a": item(shape=["2", "2"])},
    "a-shape-of-fractions": {"a": item(shape=[2.0, 2.0])},
    "a-shape-with-nothing": {"a": item(shape=[None])},
    "a-shape-that-is-a-number": {"a": item(shape=4)},
    "two-negative-sizes": {"a": item(shape=[-2, -2])},
    "a-negative-size": {"a": item(shape=[-4], offsets=[0, -16])},
    "nothing-times-minus-one": {"a": item(shape=[0, -1], offsets=[0, 0]), "b": item()},
    "nothing-times-too-much": {"a": item(shape=[0, 2**70], offsets=[0, 0]), "b": item()},
    "a-size-too-large": {"a": item(shape=[2, 3])},
    "one-offset": {"a": item(offsets=[0])},
    "three-offsets": {"a": item(offsets=[0, 8, 16])},
    "offsets-of-text": {"a": item(offsets=["0", "16"])},
    "offsets-backwards": {"a": item(offsets=[16, 0])},
    "offsets-past-the-end": {"a": item(shape=[4, 2], offsets=[0, 32])},
    "a-hole": {"a": item("F32", [2], [0, 8]), "b": item("F32", [1], [12, 16])},
    "an-overlap": {"a": item("F32", [3], [0, 12]), "b": item("F32", [2], [8, 16])},
    "a-late-start": {"a": item("F32", [3], [4, 16])},
    "bytes-left-over": {"a": item("F32", [3], [0, 12])},
    "no-tensor-for-the-bytes": {},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_header_that_lies_is_refused(name: str) -> None:
    with pytest.raises(SafetensorsError):
        decode(container(MALFORMED[name], bytes(16)))


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\xff" * 64])
def test_a_file_without_a_header_is_refused(data: bytes) -> None:
    with pytest.raises(SafetensorsError):
        decode(as_buffer(data))


GOOD = joined({"weight": torch.ones(2, 3), "bias": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(7)})
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


@settings(max_examples=500)
@given(changes=st.dictionaries(st.integers(0, HEADER_END - 1), st.integers(0, 255), min_size=1, max_size=4))
def test_a_flipped_header_is_refused_or_still_fits(changes: dict[int, int]) -> None:
    """No other error comes out, and whatever is accepted covers the bytes exactly."""
    data = bytearray(GOOD)
    for position, value in changes.items():
        data[position] = value
    try:
        found = decode(as_buffer(bytes(data)))
    except SafetensorsError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) == len(GOOD) - HEADER_END


@settings(max_examples=300)
@given(
    numbers=st.lists(st.sampled_from([-4, -3, -2, -1, 0, 1, 2, 3, 4, 2**31, 2**63, 2**70]), max_size=4),
    offsets=st.one_of(st.just((0, 16)), st.just((0, 0)), st.tuples(st.integers(-16, 32), st.integers(-16, 32))),
)
def test_any_numbers_in_a_header(numbers: list[int], offsets: tuple[int, int]) -> None:
    try:
        found = decode(container({"a": item(shape=numbers, offsets=offsets)}, bytes(16)))
    except SafetensorsError:
        return
    assert found["a"].nbytes == 16


@given(length=st.integers(0, len(GOOD) - 1))
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(SafetensorsError):
        decode(as_buffer(GOOD[:length]))


# -- never more tolerant than the library ------------------------------------------------------------------------------


def accepted_by_both(data: bytes) -> bool:
    """Whether we accept a file; then the library must, with the same tensors."""
    try:
        ours = decode(as_buffer(data))
    except SafetensorsError:
        return False
    assert same(ours, safetensors.torch.load(data))
    return True


def raw(header: str | bytes, body: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


A = '{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
TOLERATED = {
    "plain": raw(f'{{"a":{A}}}'),
    "spaces": raw(f'{{ "a" : {A} }}   '),
    "metadata": raw(f'{{"__metadata__":{{"k":"v"}},"a":{A}}}'),
    "an escape": raw(f'{{"\\u00e9\\ud83d\\ude00":{A}}}'),
    "nothing": raw("{}", b""),
}
#: Python's parser accepts each of these; most of them the library refuses.
STRICT = {
    "a space before it": raw(f' {{"a":{A}}}'),
    "a byte order mark": raw(b"\xef\xbb\xbf" + f'{{"a":{A}}}'.encode()),
    "utf-16": raw(f'{{"a":{A}}}'.encode("utf-16")),
    "utf-16 without a mark": raw(f'{{"a":{A}}}'.encode("utf-16-le")),
    "a name twice": raw(f'{{"a":{A},"a":{A}}}'),
    "a key twice": raw('{"a":{"dtype":"F32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "half a character": raw(f'{{"\\ud800":{A}}}'),
    "metadata of numbers": raw(f'{{"__metadata__":{{"k":1}},"a":{A}}}'),
    "metadata of nothing": raw(f'{{"__metadata__":null,"a":{A}}}'),
    "metadata that is nested": raw(f'{{"__metadata__":{{"k":{{}}}},"a":{A}}}'),
    "one more key": raw(f'{{"a":{A[:-1]},"more":1}}}}'),
    "deep nesting": raw(f'{{"a":{A[:-1]},"more":{"[" * 500}{"]" * 500}}}}}'),
    "deeper nesting": raw(f'{{"a":{A[:-1]},"more":{"[" * 100_000}'),
    "deepest nesting": raw('{"a":' * 100_000),
    "NaN": raw(f'{{"a":{A[:-1]},"more":NaN}}}}'),
    "a minus": raw(f'{{"a":{A.replace("[0,", "[-0,")}}}'),
    "true": raw('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,true]}}', b"\0"),
    "a fraction": raw(f'{{"a":{A.replace("[2,2]", "[2.0,2]")}}}'),
    "an exponent": raw(f'{{"a":{A.replace("[2,2]", "[2e0,2]")}}}'),
    "a number of 5,000 digits": raw(f'{{"a":{A.replace("[2,2]", f"[{9:05000}]")}}}'),
    "2^63": raw('{"a":{"dtype":"U8","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', b""),
    "2^63 bytes": raw('{"a":{"dtype":"F64","shape":[0,1152921504606846976],"data_offsets":[0,0]}}', b""),
    "2^64 in all": raw('{"a":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}', b""),
    "bytes behind it": raw(f'{{"a":{A}}}', bytes(17)),
    "text behind it": raw(f'{{"a":{A}}}{{}}'),
    "zeros behind it": raw(f'{{"a":{A}}}'.encode() + bytes(8)),
    "a header beyond the file": raw(f'{{"a":{A}}}', length=10_000),
    "a header beyond the limit": raw("{}", b"", length=100_000_001),
    "a header beyond all memory": raw("{}", b"", length=2**63),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_the_format_allows_is_read(name: str) -> None:
    assert accepted_by_both(TOLERATED[name])


@pytest.mark.parametrize("name", STRICT)
def test_what_python_would_read_and_the_format_does_not_allow_is_refused(name: str) -> None:
    assert not accepted_by_both(STRICT[name])


@settings(max_examples=500)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, HEADER_END), st.integers(0, 2), st.sampled_from(b'0123456789-.,:"[]{} e\\u\0\x80')),
        min_size=1,
        max_size=4,
    )
)
def test_what_we_accept_the_library_accepts(changes: list[tuple[int, int, int]]) -> None:
    """Bytes are replaced, inserted and removed; the length is made to fit."""
    data = bytearray(GOOD[8:])
    for position, num_removed, byte in changes:
        data[position : position + num_removed] = bytes([byte])
    length = max(0, HEADER_END - 8 + len(data) - len(GOOD[8:]))
    accepted_by_both(length.to_bytes(8, "little") + bytes(data))


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_no_header_can_hold_is_refused_when_written(name: str) -> None:
    with pytest.raises(TypeError, match="safetensors cannot hold"):
        joined({name: torch.ones(1)})
