"""Run files: read, overridden, expanded and checked into a `RunConfig`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from outlast.checkpointing.error_hints import first_line, nearest
from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.yaml_lines import Lines, parse, settings_error
from outlast.trainers.config.validation_errors import Path as KeyPath
from outlast.trainers.config.validation_errors import SettingsFinding, check

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def load_run(path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Read a run file.

    Args:
        path: A .yaml or .yml file.
        overrides: `key=value` with dots in the key; the value is YAML.

    Returns:
        The settings, and the settings as written, `${env:…}` unexpanded.

    Raises:
        ConfigError: The file is missing or unreadable, or a setting is invalid; a SettingsError has every finding.
    """
    declared, lines = read_run_file(path)
    return settings_of(declared, path, overrides, lines)


def settings_of(
    declared: dict[str, Any], source: str, overrides: Sequence[str] = (), lines: Lines | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Build the settings declared in `source`, a file or a run, with the `lines` of each key; else as `load_run`."""
    for item in overrides:
        override(declared, item)
    missing = [
        SettingsFinding(path, f"the run file uses ${{env:{name}}}, but {name} is not set")
        for path, name in _unset_variables(declared)
    ]
    if missing:
        raise settings_error(source, missing, lines or {}, overrides)
    body = expand(declared)
    try:
        return RunConfig.model_validate(body), declared
    except ValidationError as error:
        raise settings_error(source, check(RunConfig, body), lines or {}, overrides) from error


def read_run_file(path: str) -> tuple[dict[str, Any], Lines]:
    """Return the content of a run file, and the line of each setting. Raises as `load_run`."""
    if path.endswith(".toml"):
        hint = f"write it as YAML, as {Path(path).with_suffix('.yaml')}; `outlast init` writes a starter file"
        raise ConfigError(f"run file {path} is TOML, which is no longer read", hint=hint)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "name a .yaml file; `outlast init` writes a starter file"
        candidates = {file.stem: file for file in Path(path).parent.glob("*.*") if file.suffix in (".yaml", ".yml")}
        if isinstance(error, FileNotFoundError) and (near := nearest(Path(path).stem, candidates)):
            hint = f"did you mean {candidates[near]}? `outlast init` writes a new one"
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"run file {path} cannot be read: {reason}", hint=hint) from error
    return parse(text, path)


def override(body: dict[str, Any], given: str) -> None:
    """Set one value of `body`; `given` is `key=value` with dots in the key.

    Raises:
        ConfigError: `given` is malformed, or its key is below a value.
    """
    key, equals, text = given.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {given} sets nothing", hint="write key=value, such as -s train.lr=1e-4")
    *parents, last = key.strip().split(".")
    block = body
    for parent in parents:
        block = block.setdefault(parent, {})
        if not isinstance(block, dict):
            raise ConfigError(
                f"-s {given}: {parent} holds a value, not a block", hint=f"leave out what follows {parent}"
            )
    try:
        block[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or first_line(error)
        hint = f"quote it, for example -s '{key}=\"…\"'"
        raise ConfigError(f"-s {given}: the value is not valid YAML: {problem}", hint=hint) from error


def _unset_variables(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path and NAME of every `${env:NAME}` that is not set."""
    if isinstance(value, dict | list):
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unset_variables(item, (*path, part))
    elif isinstance(value, str):
        yield from ((path, name) for name in _ENV.findall(value) if name not in os.environ)


def expand(value: Any) -> Any:
    """Return `value` with every `${env:NAME}` replaced. Raises ConfigError for a name that is not set."""
    if isinstance(value, dict):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, str):
        return _ENV.sub(_from_environment, value)
    return value


def _from_environment(match: re.Match[str]) -> str:
    if match[1] not in os.environ:
        raise ConfigError(
            f"the run file uses ${{env:{match[1]}}}, but {match[1]} is not set", hint=f"export {match[1]}=…"
        )
    return os.environ[match[1]]
