"""Parsing of run files: YAML to plain values, with the line of each. It checks no settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.validation_errors import Path, SettingsFinding

Lines = dict[Path, int]


@dataclass(frozen=True, slots=True)
class LocatedFinding:
    """A finding, and where its setting was given.

    Attributes:
        finding: The finding.
        line: Its line in the run file, or that of the enclosing block; None if there is none.
        option: The -s option, if the setting was given there.
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
    """Settings are not valid; the message lists every finding.

    Attributes:
        findings: The findings, in the order of their lines.
    """

    def __init__(self, message: str, *, hint: str = "", findings: Sequence[LocatedFinding] = ()) -> None:
        super().__init__(message, hint=hint)
        self.findings = tuple(findings)


def settings_error(
    source: str, found: Sequence[SettingsFinding], lines: Lines, overrides: Sequence[str] = ()
) -> SettingsError:
    """Return the error for findings on settings from `source`, a file or a run, and from -s options."""
    located = locate_findings(found, lines, overrides)
    listing = "\n".join(f"  {item}" for item in located)
    hint = f"edit {source}, or the -s options" if overrides else f"edit {source}"
    return SettingsError(f"settings of {source} are not valid:\n{listing}", hint=hint, findings=located)


def locate_findings(
    found: Sequence[SettingsFinding], lines: Lines, overrides: Sequence[str] = ()
) -> list[LocatedFinding]:
    """Add to each finding the line of its setting, or of the enclosing block; sort by line."""
    by_key = {item.partition("=")[0].strip(): item for item in overrides}
    located = []
    for item in found:
        keys = [".".join(str(part) for part in item.path[:end]) for end in range(len(item.path), 0, -1)]
        within = (key for key in by_key if key.startswith(f"{item.key}.") and key.rpartition(".")[2] in item.message)
        option = next((by_key[key] for key in (*keys, *within) if key in by_key), "")
        paths = (item.path[:end] for end in range(len(item.path), 0, -1))
        line = None if option else next((lines[path] for path in paths if path in lines), None)
        located.append(LocatedFinding(item, line, option))
    return sorted(located, key=lambda item: item.line or 0)


def parse(text: str, path: str) -> tuple[dict[str, Any], Lines]:
    """What a run file says, and the line of each setting.

    Args:
        text: The file.
        path: Its name.

    Raises:
        SettingsError: It is not valid, or holds no settings.
    """
    try:
        body, lines = yaml.load(text, _UniqueKeyLoader), dict(_yaml_lines(yaml.compose(text, yaml.SafeLoader)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        message = f"{getattr(error, 'problem', None) or error}"
        found = [LocatedFinding(SettingsFinding((), message), line)]
        raise SettingsError(f"run file {path} is not valid: {found[0]}", hint=f"edit {path}", findings=found) from error
    if not isinstance(body, dict):
        found = [LocatedFinding(SettingsFinding((), "holds no settings", "begin with `name: my-run`"))]
        hint = "begin with `name: my-run`, or let `outlast init` write one"
        raise SettingsError(f"run file {path} holds no settings", hint=hint, findings=found)
    return body, lines


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML with unique keys; the library silently takes the last of several."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"duplicate key {key!r}, again in line {key_node.start_mark.line + 1}"
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
