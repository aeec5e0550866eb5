"""Errors of settings for users: all findings at once, each with its key and the probably intended key or value."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from outlast.checkpointing.error_hints import nearest
from outlast.checkpointing.errors import ConfigError

Path = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class SettingsFinding:
    """One error of the settings."""

    path: Path  #: the setting's path in the run file; empty if the error is not of one setting
    message: str  #: what is wrong
    suggestion: str = ""  #: what to write instead, or what to do
    meant: Path | None = None  #: for an unknown key, the path of the setting that was probably meant

    @property
    def key(self) -> str:
        return ".".join(str(part) for part in self.path)

    def __str__(self) -> str:
        text = self.message if self.message.startswith(self.key) else f"{self.key}: {self.message}"
        return f"{text.rstrip('.')}; {self.suggestion}" if self.suggestion else text


def check(model: type[BaseModel], body: Mapping[str, Any]) -> list[SettingsFinding]:
    """Return all errors of a declaration.

    An unknown key may hide other errors. So the declaration is checked again with each unknown key replaced by the one
    that was probably meant, or removed.
    """
    errors = _validate(model, body)
    unknown = [item for item in errors if item.message == _UNKNOWN]
    if unknown:
        reported = {(item.path, item.message) for item in errors}
        repaired = _repair(body, unknown)
        errors += [item for item in _validate(model, repaired) if (item.path, item.message) not in reported]
    return errors


def _validate(model: type[BaseModel], body: Mapping[str, Any]) -> list[SettingsFinding]:
    try:
        model.model_validate(body)
    except ValidationError as error:
        return list(findings(error, model))
    return []


def findings(error: ValidationError, model: type[BaseModel]) -> Iterator[SettingsFinding]:
    """Convert pydantic's errors to findings. The errors of all members of a union are one finding."""
    merged: dict[Path, SettingsFinding] = {}
    settings = _settings(model)
    for detail in error.errors():
        item = _finding(detail, settings)
        before = merged.get(item.path)
        if before is not None and before.message != item.message and item.path:
            item = SettingsFinding(
                item.path, f"{before.message}, or: {item.message}", item.suggestion or before.suggestion
            )
        merged[item.path if item.path else (len(merged),)] = item
    yield from merged.values()


_UNKNOWN = "unknown key"
#: Settings by the names that `transformers.TrainingArguments` and other trainers have for them.
_OTHER_NAMES: Mapping[str, Path] = {
    "adam_epsilon": ("train", "eps"),
    "batch_size": ("train", "batch"),
    "eval_steps": ("train", "eval_every"),
    "learning_rate": ("train", "lr"),
    "load_best_model_at_end": ("checkpoint", "load_best"),
    "logging_steps": ("train", "log_every"),
    "lr_scheduler_type": ("train", "schedule"),
    "max_grad_norm": ("train", "clip"),
    "max_seq_length": ("data", "max_length"),
    "max_steps": ("train", "steps"),
    "metric_for_best_model": ("checkpoint", "metric"),
    "model_name_or_path": ("model", "path"),
    "num_epochs": ("train", "epochs"),
    "num_train_epochs": ("train", "epochs"),
    "num_workers": ("scale", "workers"),
    "optim": ("train", "optimizer"),
    "output_dir": ("checkpoint", "storage"),
    "per_device_train_batch_size": ("train", "micro_batch"),
    "run_name": ("name",),
    "save_steps": ("checkpoint", "every"),
    "save_total_limit": ("checkpoint", "keep_last"),
    "sequence_len": ("data", "max_length"),
    "train_batch_size": ("train", "batch"),
    "train_file": ("data", "train"),
    "validation_file": ("data", "eval"),
    "warmup_ratio": ("train", "warmup"),
    "warmup_steps": ("train", "warmup"),
}


def _finding(detail: Any, settings: Mapping[Path, Any]) -> SettingsFinding:
    path, given = _path_in_file(settings, detail["loc"]), detail.get("input")
    if detail["type"] == "extra_forbidden":
        return _unknown(settings, path)
    cause = detail.get("ctx", {}).get("error")
    suggestion = cause.hint if isinstance(cause, ConfigError) else ""
    message = _plain(detail)
    if cause is None and isinstance(given, str | int | float):
        message += f" (it is {given!r})"
    if detail["type"] in ("literal_error", "enum") and (
        near := nearest(str(given), _literals(detail["ctx"]["expected"]))
    ):
        suggestion = f"did you mean {near!r}?"
    if detail["type"] == "string_type" and isinstance(given, bool):
        words = "yes, on and true" if given else "no, off and false"
        suggestion = f"YAML reads {words} as {str(given).lower()}: put the word in quotes, such as "
        suggestion += '"yes"' if given else '"no"'
    elif detail["type"] == "string_type" and isinstance(given, int | float | date):
        suggestion = f"put it in quotes: {json.dumps(str(given))}"
    return SettingsFinding(path, message, suggestion)


#: What pydantic's kinds of errors mean, by their first word.
_EXPECTED = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be a text",
    "list": "must be a list",
    "dict": "must be a block of settings",
    "model": "must be a block of settings",
    "missing": "must be set",
}


def _plain(detail: Any) -> str:
    """Return the message of an error of pydantic in plain words."""
    kind, _, what = detail["type"].partition("_")
    if kind in _EXPECTED and what in ("", "type", "parsing", "from_float"):
        return _EXPECTED[kind]
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"must {message.removeprefix('Input should ')}" if message.startswith("Input should ") else message


def _literals(expected: str) -> list[str]:
    """Parse the values of pydantic's "'a', 'b' or 'c'"."""
    return [part.strip("' ") for part in expected.replace(" or ", ", ").split(",")]


def _unknown(settings: Mapping[Path, Any], path: Path) -> SettingsFinding:
    """Make the finding of an unknown key: it suggests the nearest key of its block, or the block with such a key."""
    *block, name = path
    meant = _OTHER_NAMES.get(str(name).lower())
    if meant is not None and meant in settings:
        words = meant[-1] if meant[:-1] == (*block,) else ".".join(map(str, meant))
        return SettingsFinding(path, _UNKNOWN, f"did you mean {words!r}?", meant)
    known = sorted(str(other[-1]) for other in settings if other and other[:-1] == (*block,))
    if near := nearest(str(name), known):
        return SettingsFinding(path, _UNKNOWN, f"did you mean {near!r}?", (*block, near))
    elsewhere = [other for other in settings if other[-1:] == (name,)]
    if len(elsewhere) == 1:
        block_name = ".".join(map(str, elsewhere[0][:-1]))
        suggestion = f"it belongs under {block_name}:" if block_name else "it belongs at the top level"
        return SettingsFinding(path, _UNKNOWN, suggestion, elsewhere[0])
    return SettingsFinding(path, _UNKNOWN, f"known: {known}")


def _repair(body: Mapping[str, Any], unknown: Iterable[SettingsFinding]) -> dict[str, Any]:
    """Move unknown keys to the paths that were probably meant, if those are not set; remove the others."""
    repaired = copy.deepcopy(dict(body))
    for item in unknown:
        *block, name = item.path
        value = _at(repaired, block).pop(name)
        if item.meant is not None:
            *target, meant = item.meant
            section = repaired
            for part in target:
                inner = section.setdefault(str(part), {})
                section = inner if isinstance(inner, dict) else {}
            section.setdefault(str(meant), value)
    return repaired


def _at(body: Any, path: Iterable[int | str]) -> Any:
    for part in path:
        body = body[part]
    return body


def _path_in_file(settings: Mapping[Path, Any], location: Path) -> Path:
    """Convert pydantic's location to a path in the run file: without the members of a union."""
    path: Path = ()
    in_mapping = False
    for part in location:
        if isinstance(part, int) or in_mapping or _model_in(settings.get(path)):
            path = (*path, part)
            in_mapping = in_mapping or _is_mapping(settings.get(path))
    return path


def _settings(annotation: Any, path: Path = ()) -> dict[Path, Any]:
    """Return the types of all settings and blocks by path."""
    found = {path: annotation}
    if model := _model_in(annotation):
        for name, field in model.model_fields.items():
            found |= _settings(field.annotation, (*path, field.alias or name))
    return found


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """Return the model of the block at a path; None if there is no such block."""
    return _model_in(_settings(model).get(path))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    annotations = [annotation, *get_args(annotation)]
    return next(
        (candidate for candidate in annotations if isinstance(candidate, type) and issubclass(candidate, BaseModel)),
        None,
    )


def _is_mapping(annotation: Any) -> bool:
    return any(get_origin(candidate) is dict for candidate in (annotation, *get_args(annotation)))
