"""Run files: YAML or TOML in, plain values out, and the line in which each of them stands."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.validation_errors import Path, SettingsFinding

Lines = dict[Path, int]


@dataclass(frozen=True, slots=True)
class LocatedFinding:
    """A finding, and where it was written.

    Attributes:
        finding: What is wrong.
        line: Its line in the run file, or that of the block around it; None where there is none.
        option: The -s option that says so, instead.
    """

    finding: SettingsFinding
    line: int | None = None
    option: str = ""

    def __str__(self) -> str:
        where = f"-s {self.option}" if self.option else f"line {self.line}" if self.line else ""
        return f"{where}: {self.finding}" if where else str(self.finding)

    def as_json(self) -> dict[str, Any]:
        found = self.finding
        body = {"line": self.line, "key": found.key, "message": found.message, "suggestion": found.suggestion}
        return {**body, "option": self.option} if self.option else body


class SettingsError(ConfigError):
    """Settings that cannot be used; the message lists every finding.

    Attributes:
        findings: What is wrong, in the order of the lines.
    """

    def __init__(self, message: str, *, hint: str = "", findings: Sequence[LocatedFinding] = ()) -> None:
        super().__init__(message, hint=hint)
        self.findings = tuple(findings)


def refused(place: str, found: Sequence[SettingsFinding], lines: Lines, overrides: Sequence[str] = ()) -> SettingsError:
    """The error that tells of settings that were declared at `place`, a file or a run, and in -s options."""
    located = located_in(found, lines, overrides)
    told = "\n".join(f"  {item}" for item in located)
    hint = f"edit {place}, or the -s options" if overrides else f"edit {place}"
    return SettingsError(f"{place} has settings that cannot be used:\n{told}", hint=hint, findings=located)


def located_in(found: Sequence[SettingsFinding], lines: Lines, overrides: Sequence[str] = ()) -> list[LocatedFinding]:
    """The findings with the lines of their settings, or of the blocks around these, in that order."""
    by_key = {item.partition("=")[0].strip(): item for item in overrides}
    located = []
    for item in found:
        keys = [".".join(str(part) for part in item.path[:end]) for end in range(len(item.path), 0, -1)]
        within = (key for key in by_key if key.startswith(f"{item.key}.") and key.rpartition(".")[2] in item.message)
        option = next((by_key[key] for key in (*keys, *within) if key in by_key), "")
        places = (item.path[:end] for end in range(len(item.path), 0, -1))
        line = None if option else next((lines[place] for place in places if place in lines), None)
        located.append(LocatedFinding(item, line, option))
    return sorted(located, key=lambda item: item.line or 0)


def parse(text: str, path: str) -> tuple[dict[str, Any], Lines]:
    """What a run file says, and the line of each setting.

    Args:
        text: The file.
        path: Its name, whose end says whether it is TOML.

    Raises:
        SettingsError: It is not valid, or holds no settings.
    """
    try:
        if path.endswith(".toml"):
            body, lines = tomllib.loads(text), dict(_toml_lines(text))
        else:
            body, lines = yaml.load(text, _UniqueKeyLoader), dict(_yaml_lines(yaml.compose(text, yaml.SafeLoader)))
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        said = re.search(r"at line (\d+)", str(error))
        line = mark.line + 1 if mark else int(said[1]) if said else None
        message = f"{getattr(error, 'problem', None) or error}"
        found = [LocatedFinding(SettingsFinding((), message), line)]
        raise SettingsError(f"run file {path} is not valid: {found[0]}", hint=f"edit {path}", findings=found) from error
    if not isinstance(body, dict):
        found = [LocatedFinding(SettingsFinding((), "holds no settings", "begin with `name: my-run`"))]
        hint = "begin with `name: my-run`, or let `outlast init` write one"
        raise SettingsError(f"run file {path} holds no settings", hint=hint, findings=found)
    return body, lines


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may stand once only; the library lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key {key!r} stands twice, again in line {key_node.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_lines(node: yaml.Node | None, path: Path = ()) -> Iterator[tuple[Path, int]]:
    inner: list[tuple[int | str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(str(key.value), value, key.start_mark.line) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(number, value, value.start_mark.line) for number, value in enumerate(node.value)]
    for part, value, line in inner:
        yield (*path, part), line + 1
        yield from _yaml_lines(value, (*path, part))


_HEADER = re.compile(r"\s*\[+\s*([\w.\-\"' ]+?)\s*\]+\s*(?:#.*)?")
_KEY = re.compile(r"\s*([\w.\-\"']+)\s*=")


def _toml_lines(text: str) -> Iterator[tuple[Path, int]]:
    """Of headers and of keys that begin a line; what stands within a value is at its block's line."""
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            table = tuple(part.strip("\"' ") for part in header[1].split("."))
            yield table, number
        elif key := _KEY.match(line):
            yield (*table, *(part.strip("\"'") for part in key[1].split("."))), number
