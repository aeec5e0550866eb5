"""Writes `docs/reference/settings.md` from the code: every setting, every verb, every exit code.

    python docs/reference.py

What it says of a setting is the docstring under the field, what it says of a verb is its help: mend a poor one there.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from outlast.checkpointing.errors import ConfigError, DamagedError, NoCheckpointError, OutlastError, PreflightError
from outlast.cluster.cli import app
from outlast.cluster.config import RunConfig
from outlast.cluster.k8s_settings import K8sSettings
from outlast.cluster.launch import Interrupted
from outlast.trainers.loop import Outcome

PAGE = Path(__file__).parent / "reference" / "settings.md"

HEAD = """\
# Reference

Made from the code by `python docs/reference.py`; a test fails where the two differ.

- [The run file](#the-run-file)
- [The command line](#the-command-line)
- [Exit codes](#exit-codes)
- [Kubernetes](#kubernetes)

## The run file

YAML or TOML. Only `name`, `model` and `data.train` are needed. A key that is not here is refused, with the nearest
one that is. `-s train.lr=1e-4` sets one on the command line; `${env:NAME}` stands for a variable of the environment and
is never written down. Where the default is empty, the meaning says it, or the setting is off.
"""

VERBS = """\
## The command line

RUN is a run's directory or URI, its run file, or its name, which is looked for under `--storage`. CHECKPOINT is
`newest`, `best`, `model` (where one reads), a step, or `step@attempt`. An option marked … may be given again.
`outlast --debug VERB …` shows tracebacks.
"""

_PLAIN = {int: "integer", float: "number", str: "text", bool: "true, false", type(None): "null", Any: "anything"}


def type_of(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_of(part) for part in inner))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return "[" + ", ".join(type_of(part) for part in inner) + "]"
    if origin in (list, tuple):
        return f"list of {type_of(inner[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return _PLAIN[annotation]


def _limits(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {'2^63' if value == 2**63 else value}"
        for limit in field.metadata
        for name, sign in signs.items()
        if (value := getattr(limit, name, None)) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    said = "Default" in (field.description or "")
    value = field.default
    if field.default_factory is not None or value is None or value == "" or (said and not isinstance(value, bool)):
        return ""
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{'[]' if value == () else shown}`"


def _block(annotation: Any) -> type[BaseModel] | None:
    """The settings that a field holds, if it is a block, or may be one."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each setting of a block, nested blocks after their name."""
    for attribute, field in model.model_fields.items():
        name = prefix + (field.alias or attribute)
        block = _block(field.annotation)
        meaning = field.description or (block.__doc__ if block else None)
        if not meaning:
            raise ValueError(f"{model.__name__}.{attribute} has no docstring")
        yield name, type_of(field.annotation) + _limits(field), _default(field), meaning
        if block:
            yield from settings(block, f"{name}.")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _settings_table(model: type[BaseModel], prefix: str = "") -> str:
    rows = [(f"`{name}`", *rest) for name, *rest in settings(model, prefix)]
    return _table(("setting", "type", "default", "meaning"), rows)


def run_file() -> str:
    """Every setting of a run file, block by block."""
    plain, parts = [], []
    for name, field in RunConfig.model_fields.items():
        block = _block(field.annotation)
        if block is None:
            plain.append((f"`{name}`", type_of(field.annotation) + _limits(field), _default(field), field.description))
        else:
            parts.append(f"### `{name}`\n\n{_prose(block.__doc__)}\n\n{_settings_table(block, f'{name}.')}")
    return "\n".join([_table(("setting", "type", "default", "meaning"), plain), *parts])


def _prose(text: str | None) -> str:
    """A docstring as paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def verbs(command: Any = None, path: str = "outlast") -> Iterator[tuple[str, Any]]:
    """Every verb by its whole name, groups left out."""
    command = command or typer.main.get_command(app)
    if hasattr(command, "commands"):
        for name, verb in command.commands.items():
            yield from verbs(verb, f"{path} {name}")
    else:
        yield path, command


def _word(annotation: Any) -> str:
    """What an option's value is, in capitals."""
    inner = [part for part in get_args(annotation) if part is not type(None)]
    return _word(inner[0]) if inner else {int: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _verb(path: str, command: Any) -> str:
    """One verb: how it is called, what it does, and its options."""
    rows, words, hints = [], [path], get_type_hints(command.callback)
    for parameter in command.params:
        more = " …" if parameter.nargs == -1 or getattr(parameter, "multiple", False) else ""
        default = parameter.default
        if callable(default) or default in (None, False, "") or parameter.required:
            shown = "needed" if parameter.required else ""
        else:
            shown = f"`{str(default).lower() if default is True else default}`"
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
            words.append(name if parameter.required or name.startswith("[") else f"[{name}]")
            rows.append((name, shown, parameter.help))
        elif parameter.name != "help":
            flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
            value = "" if parameter.is_flag else f" {parameter.metavar or _word(hints[parameter.name])}"
            rows.append((flags + value + more, shown, parameter.help))
    if len(rows) > sum(row[0][0] != "`" for row in rows):
        words.append("[OPTIONS]")
    for row in rows:
        if not row[2]:
            raise ValueError(f"{path}: {row[0]} has no help")
    return f"### `{' '.join(words)}`\n\n{_prose(command.help)}\n\n" + _table(("", "default", "meaning"), rows)


def exit_codes() -> str:
    """What each code means, from whoever ends with it."""

    def first(error: type[OutlastError]) -> str:
        return (error.__doc__ or "").split(". ")[0].rstrip(".") + "."

    codes = {
        0: "Done, or nothing is wrong. `outlast train` of a run that is done ends with it at once.",
        OutlastError.exit_code: "The run failed, or is given up; or the storage failed. What a verb compares or proves "
        "(`demo`, `drill`) did not come out.",
        ConfigError.exit_code: f"{first(ConfigError)} Or the command line is.",
        PreflightError.exit_code: first(PreflightError),
        NoCheckpointError.exit_code: f"{first(DamagedError)} Or commits exist, and none of them is whole.",
        Outcome.STOPPED.exit_code: "Interrupted, with a committed checkpoint, or another launch has the run. The same "
        "command goes on.",
        Interrupted.exit_code: "Interrupted, and nothing was saved by this launch. The same command goes on from what "
        "was there before.",
    }
    return _table(("code", "meaning"), [(str(code), meaning) for code, meaning in codes.items()])


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        run_file(),
        VERBS,
        *(_verb(*verb) for verb in verbs()),
        "## Exit codes\n\nThe same for every verb; where a verb has more to say, it does so above.\n",
        exit_codes(),
        f"## Kubernetes\n\n{_prose(K8sSettings.__doc__)} Each is an option of `outlast k8s render`, or keeps its "
        "default; [k8s/README.md](../../k8s/README.md) gives the reasons.\n",
        _settings_table(K8sSettings),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
