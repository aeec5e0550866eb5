"""Conversion between dataclasses and JSON objects, checked by the fields' types.

A value of a wrong type is replaced by the field's default or refused; it never reaches an instance.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from outlast.checkpointing.format.layout import CheckpointRef

T = TypeVar("T")
_YEAR_10000 = 253_402_300_800


class Moment(float):
    """The type of a time in seconds since the epoch that a calendar has."""


def from_json(cls: type[T], body: Mapping[str, Any]) -> T:
    """Build an instance from a JSON object.

    A field that is missing or of a wrong type takes its default, or None if its type allows that; else TypeError.
    """
    values = {}
    for name, parse, default, _ in _fields(cls):
        try:
            values[name] = parse(body[name])
        except (KeyError, TypeError):
            if default is MISSING:
                raise TypeError(f"{cls.__name__}.{name}") from None
            values[name] = default
    return cls(**values)


def misfits(body: Mapping[str, Any], types: Mapping[str, Any]) -> set[str]:
    """Return the keys of a JSON object whose values are not of these types."""
    return {key for key, hint in types.items() if key in body and not _fits(body[key], hint)}


def fitting(body: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object without its `misfits`."""
    wrong = misfits(body, types)
    return {key: value for key, value in body.items() if key not in wrong}


def section(body: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return an object within a JSON object; empty if there is none."""
    for name in names:
        inner = body.get(name)
        body = inner if isinstance(inner, Mapping) else {}
    return body


def _fits(value: Any, hint: Any) -> bool:
    try:
        _parser(hint)(value)
    except TypeError:
        return False
    return True


def to_json(item: Any) -> dict[str, Any]:
    """Return the JSON object of an instance. A field that is None by default is left out when it is None."""
    return {
        name: value if type(value) in (int, float, str) else _plain(value)
        for name, _, _, is_optional in _fields(type(item))
        if (value := getattr(item, name)) is not None or not is_optional
    }


def _plain(value: Any) -> Any:
    if isinstance(value, CheckpointRef):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return to_json(value) if is_dataclass(value) else value


def _find_fields(cls: Any) -> list[tuple[str, Callable[[Any], Any], Any, bool]]:
    """Return of each field its name, parser and default, and whether None is left out."""
    result, hints = [], get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        is_nullable = hint is Any or NoneType in get_args(hint)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        default = None if default is MISSING and is_nullable else default
        result.append((item.name, _parser(hint), default, item.default is None))
    return result


_fields: Callable[[Any], list[tuple[str, Callable[[Any], Any], Any, bool]]] = cache(_find_fields)


@cache
def _parser(hint: Any) -> Callable[[Any], Any]:
    """Return a parser of a JSON value, which raises TypeError for another type or a value out of range."""
    if hint is Any:
        return lambda value: value
    if hint in (int, float):
        return partial(_number, hint)
    if hint is Moment:
        return _moment
    inner = [_parser(part) for part in get_args(hint) if part not in (NoneType, Ellipsis)]
    if get_origin(hint) is UnionType:
        return partial(_any_of, tuple(inner), NoneType in get_args(hint))
    if get_origin(hint) is tuple:
        return lambda value: tuple(map(inner[0], _checked(list, value)))
    if get_origin(hint) is Mapping:
        return lambda value: {key: inner[1](item) for key, item in _checked(dict, value).items()}
    if hint is CheckpointRef:
        return lambda value: _checked(CheckpointRef, CheckpointRef.from_path(_checked(str, value)))
    is_record = is_dataclass(hint)
    return (lambda value: from_json(hint, _checked(dict, value))) if is_record else partial(_checked, hint)


def _any_of(parsers: tuple[Callable[[Any], Any], ...], is_nullable: bool, value: Any) -> Any:
    if value is None and is_nullable:
        return None
    *others, last = parsers
    for parse in others:
        with suppress(TypeError):
            return parse(value)
    return last(value)


def _moment(value: Any) -> float:
    seconds: float = _number(float, value)
    if not abs(seconds) < _YEAR_10000:
        raise TypeError(f"{value!r} is not a time")
    return seconds


def _checked(expected: type, value: Any) -> Any:
    if type(value) is not expected:
        raise TypeError(f"{value!r} is not of type {expected.__name__}")
    return value


def _number(expected: type, value: Any) -> Any:
    if type(value) is expected is float or (type(value) is int and -(2**63) <= value < 2**63):
        return expected(value)
    raise TypeError(f"{value!r} is not of type {expected.__name__}")
