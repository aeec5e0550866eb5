"""What is wrong with settings, for people: every finding at once, where it is, and what was probably meant."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from outlast.checkpointing.errors import ConfigError

Path = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class SettingsFinding:
    """One thing that is wrong.

    Attributes:
        path: The setting's place in the run file; empty where it is not one setting.
        message: What is wrong.
        suggestion: What to write instead, or what to do.
        meant: The place of the setting that was probably meant, of a key that is not known.
    """

    path: Path
    message: str
    suggestion: str = ""
    meant: Path | None = None

    @property
    def key(self) -> str:
        return ".".join(str(part) for part in self.path)

    def __str__(self) -> str:
        said = self.message if self.message.startswith(self.key) else f"{self.key}: {self.message}"
        return f"{said}; {self.suggestion}" if self.suggestion else said


def check(model: type[BaseModel], body: Mapping[str, Any]) -> list[SettingsFinding]:
    """Everything that is wrong with a declaration; empty when nothing is.

    An unknown key hides what depends on it. So it is taken for the one that was probably meant, or left out, and what
    that shows counts too.
    """
    found = _validate(model, body)
    unknown = [item for item in found if item.message == _UNKNOWN]
    if unknown:
        known = {(item.path, item.message) for item in found}
        repaired = _repaired(body, unknown)
        found += [item for item in _validate(model, repaired) if (item.path, item.message) not in known]
    return found


def _validate(model: type[BaseModel], body: Mapping[str, Any]) -> list[SettingsFinding]:
    try:
        model.model_validate(body)
    except ValidationError as error:
        return list(findings(error, model))
    return []


def findings(error: ValidationError, model: type[BaseModel]) -> Iterator[SettingsFinding]:
    """The findings of pydantic. What it says of each member of a union is one finding."""
    merged: dict[Path, SettingsFinding] = {}
    for found in error.errors():
        item = _finding(found, model)
        before = merged.get(item.path)
        if before is not None and before.message != item.message and item.path:
            item = SettingsFinding(
                item.path, f"{before.message}, or: {item.message}", item.suggestion or before.suggestion
            )
        merged[item.path if item.path else (len(merged),)] = item
    yield from merged.values()


_UNKNOWN = "unknown key"


def _finding(found: Any, model: type[BaseModel]) -> SettingsFinding:
    path, given = _place(model, found["loc"]), found.get("input")
    if found["type"] == "extra_forbidden":
        return _unknown(model, path)
    cause = found.get("ctx", {}).get("error")
    suggestion = cause.hint if isinstance(cause, ConfigError) else ""
    message = found["msg"].removeprefix("Value error, ")
    if cause is None and isinstance(given, str | int | float):
        message += f" (it is {given!r})"
    if found["type"] in ("literal_error", "enum") and (
        near := nearest(str(given), _literals(found["ctx"]["expected"]))
    ):
        suggestion = f"did you mean {near!r}?"
    return SettingsFinding(path, message, suggestion)


def _literals(expected: str) -> list[str]:
    """The values in pydantic's "'a', 'b' or 'c'"."""
    return [part.strip("' ") for part in expected.replace(" or ", ", ").split(",")]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """What `word` was probably meant to be, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def _unknown(model: type[BaseModel], path: Path) -> SettingsFinding:
    """Of an unknown key: the nearest one in its block, or the block that has a key of this name."""
    *block, name = path
    known = sorted(_keys(model_at(model, tuple(block))))
    if near := nearest(str(name), known):
        return SettingsFinding(path, _UNKNOWN, f"did you mean {near!r}?", (*block, near))
    elsewhere = [place for place in _places(model) if place[-1] == name]
    if len(elsewhere) == 1:
        where = ".".join(str(part) for part in elsewhere[0][:-1])
        return SettingsFinding(
            path, _UNKNOWN, f"it belongs under {where}:" if where else "it belongs to no block", elsewhere[0]
        )
    return SettingsFinding(path, _UNKNOWN, f"known: {known}")


def _repaired(body: Mapping[str, Any], unknown: Iterable[SettingsFinding]) -> dict[str, Any]:
    """The declaration with unknown keys at the places that were probably meant, where these are free, or nowhere."""
    whole = copy.deepcopy(dict(body))
    for item in unknown:
        *block, name = item.path
        value = _at(whole, block).pop(name)
        if item.meant is not None:
            *target, meant = item.meant
            place = whole
            for part in target:
                inner = place.setdefault(str(part), {})
                place = inner if isinstance(inner, dict) else {}
            place.setdefault(str(meant), value)
    return whole


def _at(whole: Any, path: Iterable[int | str]) -> Any:
    for part in path:
        whole = whole[part]
    return whole


def _place(model: type[BaseModel], location: Path) -> Path:
    """Where in a run file pydantic means; it also names the members of a union there."""
    place: list[int | str] = []
    inner: type[BaseModel] | None = model
    is_free = False
    for part in location:
        if inner is not None:
            place.append(part)
            annotation = _annotation(inner, str(part))
            inner, is_free = _model_in(annotation), _has_keys(annotation)
        elif isinstance(part, int) or is_free:
            place.append(part)
    return tuple(place)


def _annotation(model: type[BaseModel], key: str) -> Any:
    return next((field.annotation for name, field in model.model_fields.items() if key in (field.alias, name)), None)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _has_keys(annotation: Any) -> bool:
    return any(get_origin(kind) is dict for kind in (annotation, *get_args(annotation)))


def _keys(model: type[BaseModel] | None) -> list[str]:
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    inner: type[BaseModel] | None = model
    for part in path:
        inner = _model_in(_annotation(inner, str(part))) if inner is not None else None
    return inner


def _places(model: type[BaseModel], path: Path = ()) -> Iterator[Path]:
    """Every setting's place."""
    for key in _keys(model):
        yield (*path, key)
        if inner := _model_in(_annotation(model, key)):
            yield from _places(inner, (*path, key))
