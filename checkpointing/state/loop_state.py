"""The loop state as JSON text that comes back exactly as it was given.

What JSON can hold is plain JSON, as in 0.1.0. Any other value is tagged, such as `{"$tuple": [1, 2]}`, and the state is
then in an envelope, `{"$encoding": 1, "state": …}`, so that a plain state is never taken for a tagged one. Nothing is
pickled: reading runs no code, and a value without a tag is refused when it is saved.
"""

import base64
import json
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.format.safetensors import DTYPES, tensor_bytes

_ENCODING = 1
_TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES.values(), torch.complex64)}
_PLAIN = frozenset({type(None), bool, int, float})
#: Of containers in containers. Decoding takes more of Python's stack than encoding, and may begin deeper in it.
_MAX_DEPTH = 100
_MAX_NUMBER_BYTES = 8  # of numpy: longer ones differ by machine
_HELD = (
    "None, bool, int, float, complex, str, bytes, list, tuple, dict, OrderedDict, Counter, set, frozenset, deque, "
    "numpy numbers and arrays, and tensors on the CPU"
)


def encode_state(state: Mapping[str, Any], what: str = "state") -> str:
    """Encode a mapping as JSON text. Raises ConfigError for a value that would not come back as it is."""
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"{what} cannot be saved: it is of the type {type(state).__name__}, not a dict",
            hint='pass a dict, such as {"step": step}',
        )
    encoder = _Encoder()
    try:
        body = encoder.pairs(dict(state))
        body = {"$encoding": _ENCODING, "state": body} if encoder.has_tags else body
        return json.dumps(body, indent=1) + "\n"
    except _RefusedError as error:
        where, problem = what + "".join(f"[{key!r}]" for key in reversed(error.path)), error.problem
    except RecursionError:
        where, problem = what, "it is nested too deeply, or contains itself"
    except ValueError as error:  # an int of more digits than Python writes
        where, problem = what, str(error)
    raise ConfigError(
        f"{where} cannot be saved: {problem}",
        hint=f"a state may hold {_HELD}; of other objects save what rebuilds them, such as `state_dict()`",
    )


def decode_state(text: bytes, path: str) -> dict[str, Any]:
    """Decode `encode_state`.

    Raises:
        DamagedError: It is not such a text; `path` names the file.
        ConfigError: A newer release of outlast wrote it.
    """
    try:
        body = json.loads(text.decode())
        if not isinstance(body, dict):
            raise TypeError(f"{type(body).__name__} in place of an object")
        if body.keys() != {"$encoding", "state"}:
            return body
        if body["$encoding"] == _ENCODING:
            decoded: dict[str, Any] = _decode(body["state"])
            return decoded
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{path}: not readable ({type(error).__name__}: {error})") from error
    raise ConfigError(
        f"{path} has encoding {body['$encoding']!r}, which this release of outlast cannot read",
        hint="use the release that wrote it, or a newer one",
    )


class _RefusedError(Exception):
    """A value without an encoding, and the keys that lead to it, innermost first."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem, self.path = problem, list[Any]()


class _Encoder:
    """Encodes values; `has_tags` is whether plain JSON was not enough."""

    def __init__(self) -> None:
        self.has_tags = False
        self._depth = 0

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is str:
            return _checked_text(value)
        if kind is list:
            return self._items(enumerate(value))
        if kind is dict:
            return self.pairs(value)
        self.has_tags = True
        if kind is tuple:
            return {"$tuple": self._items(enumerate(value))}
        if kind in (OrderedDict, Counter):
            return {f"${kind.__name__}": self._key_values(value)}
        if kind in (set, frozenset):  # their order differs from process to process
            _check_keys(value)
            return {f"${kind.__name__}": sorted(self._items((item, item) for item in value), key=json.dumps)}
        if kind is deque:
            return {"$deque": [self._items(enumerate(value)), value.maxlen]}
        if kind is bytes:
            return {"$bytes": _base64(value)}
        if kind is complex:
            return {"$complex": [value.real, value.imag]}
        return _encode_numbers(value)

    def pairs(self, value: Mapping[Any, Any]) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            values = self._items(value.items())
            return dict(zip(map(_checked_text, value), values, strict=True))
        self.has_tags = True
        return {"$dict": self._key_values(value)}

    def _key_values(self, value: Mapping[Any, Any]) -> list[list[Any]]:
        _check_keys(value)
        keys, values = self._items((key, key) for key in value), self._items(value.items())
        return [list(pair) for pair in zip(keys, values, strict=True)]

    def _items(self, items: Iterable[tuple[Any, Any]]) -> list[Any]:
        encoded, key = [], None
        if self._depth > _MAX_DEPTH:
            raise RecursionError
        self._depth += 1
        try:
            for key, item in items:  # noqa: B007 - the error needs it
                encoded.append(item if type(item) in _PLAIN else self.encode(item))
        except _RefusedError as error:
            error.path.append(key)
            raise
        self._depth -= 1
        return encoded


def _encode_numbers(value: Any) -> Any:
    """Encode a number of numpy, an array, or a tensor."""
    kind = type(value)
    if isinstance(value, np.generic) and _is_kept(value.dtype):
        return {"$number": [value.dtype.name, value.item()]}
    if kind is np.ndarray and _is_kept(value.dtype):
        return {"$array": [value.dtype.str, list(value.shape), _base64(value.tobytes())]}
    if kind is torch.Tensor:
        name = str(value.dtype).removeprefix("torch.")
        if value.device.type != "cpu" or value.layout is not torch.strided or name not in _TORCH_DTYPES:
            raise _RefusedError(f"it is a tensor of {value.dtype} on {value.device} ({value.layout})")
        if value.requires_grad:
            raise _RefusedError("it is a tensor that requires a gradient")
        return {"$tensor": [name, list(value.shape), _base64(tensor_bytes(value.resolve_conj().resolve_neg()))]}
    if kind is np.ndarray:
        raise _RefusedError(f"it is an array of the dtype {value.dtype}")
    raise _RefusedError(f"it is of the type {kind.__module__}.{kind.__qualname__}")


def _is_kept(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= _MAX_NUMBER_BYTES


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse several NaN: they come back as one object, which a dict or a set holds once."""
    if sum(key != key for key in keys) > 1:
        raise _RefusedError("it holds NaN as a key more than once")


def _checked_text(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _RefusedError(f"the text {text!r} is not Unicode") from None
    return text


def _base64(data: bytes | memoryview) -> str:
    return base64.b64encode(data).decode()


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag.startswith("$"):
        [content] = value.values()
        return _DECODERS[tag](content)
    return {key: _decode(item) for key, item in value.items()}


def _key_values(content: list[list[Any]]) -> list[tuple[Any, Any]]:
    return [(_decode(key), _decode(item)) for key, item in content]


def _number(content: list[Any]) -> Any:
    name, number = content
    return _array_dtype(name).type(number)


def _array(content: list[Any]) -> Any:
    name, shape, data = content
    return np.frombuffer(bytearray(base64.b64decode(data, validate=True)), _array_dtype(name)).reshape(shape)


def _array_dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(str(name))
    if not _is_kept(dtype):
        raise ValueError(f"unknown type of numbers {name!r}")
    return dtype


def _tensor(content: list[Any]) -> torch.Tensor:
    name, shape, text = content
    dtype, data = _TORCH_DTYPES[name], bytearray(base64.b64decode(text, validate=True))
    if len(data) != prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {shape} {name}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda content: tuple(map(_decode, content)),
    "$dict": lambda content: dict(_key_values(content)),
    "$OrderedDict": lambda content: OrderedDict(_key_values(content)),
    "$Counter": lambda content: Counter(dict(_key_values(content))),
    "$set": lambda content: set(map(_decode, content)),
    "$frozenset": lambda content: frozenset(map(_decode, content)),
    "$deque": lambda content: deque(map(_decode, content[0]), content[1]),
    "$bytes": lambda content: base64.b64decode(content, validate=True),
    "$complex": lambda content: complex(*content),
    "$number": _number,
    "$array": _array,
    "$tensor": _tensor,
}
