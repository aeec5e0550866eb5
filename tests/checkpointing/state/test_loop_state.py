"""The loop state comes back exactly as it was given, or is refused when it is saved."""

from __future__ import annotations

import datetime
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.state.loop_state import decode_state, encode_state
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import small_model


def back(state: dict[str, Any]) -> dict[str, Any]:
    return decode_state(encode_state(state).encode(), "state.json")


def is_same(left: Any, right: Any) -> bool:
    """Equal in type, value and order; NaN is NaN, and -0.0 is not 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, set | frozenset):
        return bool(left == right)
    if isinstance(left, dict):
        return is_same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple | deque):
        same_limit = getattr(left, "maxlen", None) == getattr(right, "maxlen", None)
        return same_limit and len(left) == len(right) and all(map(is_same, left, right))
    return repr(left) == repr(right)


KEPT: dict[str, Any] = {
    "int keys": {1: "a", "1": "b", None: 0, (1, 2): [], 0.5: 1},
    "tuples": (1, [(2,), ()], {"a": (3,)}),
    "not finite": [math.nan, math.inf, -math.inf, -0.0],
    "large": [2**70, -(2**63), 1e-320, 0.1 + 0.2],
    "text": ["é", "\U0001f600", "\0", "$"],
    "tags": {"$tuple": [1]},
    "an envelope": {"$encoding": 1, "state": {"$tuple": []}},
    "sets": [{1, "a", (2,)}, frozenset("xyz"), set()],
    "bytes": b"\0\xff",
    "complex": complex(-0.0, 2),
    "dicts": [OrderedDict(z=1, a=2), Counter({5: 2, "b": 1}), {"z": 1, "a": 2}],
    "deque": [deque([1.5, 2.5], maxlen=2), deque()],
    "numpy": [np.int64(-3), np.uint8(255), np.float32(0.1), np.float64(0.1), np.float16(0.1), np.bool_(True)],
    "arrays": [np.arange(6).reshape(2, 3), np.zeros((0, 3), np.float32), np.array(3.5), np.array([1, 2], ">i4")],
    "tensors": [torch.arange(3), torch.tensor(0.5, dtype=torch.bfloat16), torch.zeros(2, 0), torch.tensor([True])],
    "complex tensor": torch.tensor([1 + 2j, 3]).conj(),
    "generators": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
    "plain": [None, True, 1, 0.5, "x", [], {}],
}


@pytest.mark.parametrize("name", KEPT)
def test_a_value_comes_back_as_it_was_given(name: str) -> None:
    state = {name: KEPT[name]}
    assert is_same(back(state), state)


def test_it_does_so_through_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = small_model()
    assert Checkpointer(LocalStorage(tmp_path), "run").save(1, model, optimizer, KEPT)
    assert is_same(Checkpointer(LocalStorage(tmp_path), "run").resume(model, optimizer), KEPT)


def test_what_comes_back_can_be_changed() -> None:
    found = back({"array": np.zeros(2), "tensor": torch.zeros(2)})
    found["array"][0] = found["tensor"][0] = 1


keys = st.one_of(st.text(max_size=3), st.sampled_from(["$tuple", "$encoding", "state", "$"]))
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), keys)
hashable = st.one_of(plain, st.tuples(plain, plain), st.binary(max_size=4), st.frozensets(plain, max_size=2))


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.one_of(st.dictionaries(keys, inner, max_size=3), st.dictionaries(hashable, inner, max_size=3))
    return st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), dicts)


@settings(max_examples=300)
@given(state=st.dictionaries(keys, st.recursive(hashable, nested, max_leaves=8), max_size=3))
def test_any_state_comes_back_as_it_was_given(state: dict[str, Any]) -> None:
    assert is_same(back(state), state)


def test_what_json_holds_is_plain_json_as_in_0_1_0() -> None:
    state = {"step": 3, "log": [{"loss": 0.5, "lr": math.nan}], "scaler": {}, "name": "é", "none": None}
    assert encode_state(state) == json.dumps(state, indent=1) + "\n"
    older = json.dumps({"$tuple": [1], "b": {"$dict": 2}}, sort_keys=True).encode()
    assert decode_state(older, "state.json") == {"$tuple": [1], "b": {"$dict": 2}}


class Color(IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")
LOOP: list[Any] = []
LOOP.append(LOOP)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
REFUSED: dict[str, Any] = {
    "an object": object(),
    "a function": print,
    "an enum": Color.RED,
    "a named tuple": Pair(1, 2),
    "a size": torch.Size([1]),
    "a path": Path("x"),
    "a date": datetime.date(2026, 1, 1),
    "numpy's date": np.datetime64("2026"),
    "a long double": np.longdouble(1),
    "objects": np.array([object()]),
    "a default dict": defaultdict(list),
    "a parameter": torch.nn.Parameter(torch.ones(1)),
    "a gradient": torch.ones(1, requires_grad=True),
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a meta tensor": torch.ones(1, device="meta"),
    "half a character": "\ud800",
    "a loop": LOOP,
    "too deep": DEEP,
    "too long": 10**5000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_would_come_back_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be saved"):
        encode_state({"value": REFUSED[name]})


@pytest.mark.parametrize("wrap", [lambda item: (item,), lambda item: OrderedDict(a=item), lambda item: {1: item}])
def test_what_is_nested_too_deeply_to_be_read_is_refused(wrap: Callable[[Any], Any]) -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(depth):
            value = wrap(value)
        return {"a": value}

    def read(text: str, frames: int) -> dict[str, Any]:
        return read(text, frames - 1) if frames else decode_state(text.encode(), "state.json")

    assert read(encode_state(nested(90)), 300) == nested(90)
    for depth in (150, 245, 495, 5000):
        with pytest.raises(ConfigError, match="nested too deeply"):
            encode_state(nested(depth))


def test_a_tensor_of_one_element_with_a_stride() -> None:
    assert torch.equal(back({"a": torch.arange(8.0)[3::8]})["a"], torch.tensor([3.0]))


@pytest.mark.parametrize("several", [{math.nan, float("nan")}, {math.nan: 1, float("nan"): 2}])
def test_nan_is_refused_as_a_key_more_than_once(several: Any) -> None:
    with pytest.raises(ConfigError, match="more than once"):
        encode_state({"a": several})


@pytest.mark.parametrize("state", [5, "text", [], [("step", 1)], ""])
def test_a_state_that_is_no_dict_is_refused(tmp_path: Path, state: Any) -> None:
    model, optimizer = small_model()
    with Checkpointer(LocalStorage(tmp_path), "run") as checkpointer:
        checkpointer.resume(model, optimizer)
        with pytest.raises(ConfigError, match=r"state cannot be saved: it is of the type .*, not a dict"):
            checkpointer.save(1, model, optimizer, state)


def test_the_refusal_of_an_array_names_its_dtype() -> None:
    with pytest.raises(ConfigError, match=r"state\['value'\] cannot be saved: it is an array of the dtype object"):
        encode_state({"value": np.array([None])})


def test_the_refusal_names_the_place_and_costs_nothing(tmp_path: Path) -> None:
    model, optimizer = small_model()
    checkpointer = Checkpointer(LocalStorage(tmp_path), "run")
    for save in (checkpointer.save, checkpointer.async_save):
        with pytest.raises(
            ConfigError, match=r"state\['a'\]\[1\]\[2\] cannot be saved: .*type builtins\.object"
        ) as caught:
            save(1, model, optimizer, {"a": [0, {2: object()}]})
        assert "state_dict()" in caught.value.hint
    assert checkpointer.save(1, model, optimizer, {"a": 0})


DAMAGED = [
    b"",
    b"[]",
    b"\xff",
    b"{" * 100_000,
    b'{"a":' * 100_000,
    *(
        json.dumps({"$encoding": 1, "state": {"a": value}}).encode()
        for value in (
            {"$unknown": 1},
            {"$tuple": 1},
            {"$tuple": [], "b": 1},
            {"$dict": [[[1], 2]]},
            {"$dict": [[1]]},
            {"$set": [[1]]},
            {"$bytes": "?"},
            {"$complex": ["x"]},
            {"$number": ["object", 1]},
            {"$number": ["int8", 300]},
            {"$array": ["|O", [1], ""]},
            {"$array": ["<i8", [2], "AAAA"]},
            {"$tensor": ["float32", [2**62], "AAAA"]},
            {"$tensor": ["nn.Module", [1], "AAAA"]},
            {"$tensor": ["float32", [-1], ""]},
            {"$deque": [[], -1]},
        )
    ),
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_text_that_is_no_state_is_damage(text: bytes) -> None:
    with pytest.raises(DamagedError, match=r"state\.json: not readable"):
        decode_state(text, "state.json")


def test_a_newer_encoding_is_not_damage() -> None:
    with pytest.raises(ConfigError, match="has encoding 2, which this release"):
        decode_state(b'{"$encoding": 2, "state": {}}', "state.json")
