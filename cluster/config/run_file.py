"""Run files: read, overridden, expanded and checked into a `RunConfig`; each finding has the line of its setting."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from outlast.checkpointing.error_hints import first_line, nearest
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.escaping import escaped
from outlast.checkpointing.redaction import is_secret_name, redact
from outlast.checkpointing.storage.location import ENV_VARIABLE
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.cluster.config.run_config import RunConfig
from outlast.trainers.config.validation_errors import Path as KeyPath
from outlast.trainers.config.validation_errors import SettingsFinding, check

Lines = dict[KeyPath, int]
_CREDENTIAL = "holds a credential, which would be stored with the run"
_USE_VARIABLE = "put it in an environment variable and write ${env:NAME}"
_UNSTORED = "settings of the model and the training must not contain one"


@dataclass(frozen=True, slots=True)
class LocatedFinding:
    """A finding, and where its setting was given."""

    finding: SettingsFinding
    line: int | None = None  #: its line in the run file, or that of the enclosing block; None if there is none
    option: str = ""  #: the -s options, if the setting or a part of the block was given there

    def __str__(self) -> str:
        given = [f"line {self.line}"] if self.line else []
        where = " with ".join([*given, f"-s {self.option}"] if self.option else given)
        return f"{where}: {self.finding}" if where else str(self.finding)

    def as_json(self) -> dict[str, Any]:
        found = self.finding
        body = {"line": self.line, "key": found.key, "message": found.message, "suggestion": found.suggestion}
        return {**body, "option": self.option} if self.option else body


class SettingsError(ConfigError):
    """Settings are not valid; the message lists every finding, in the order of their lines."""

    def __init__(self, message: str, *, hint: str, findings: Sequence[LocatedFinding]) -> None:
        super().__init__(message, hint=hint)
        self.findings = tuple(findings)


def locate_findings(
    found: Sequence[SettingsFinding], lines: Lines, overrides: Sequence[str] = ()
) -> list[LocatedFinding]:
    """Add to each finding where its setting was given; sort by line.

    That is the -s option of the setting, else its line or that of the enclosing block. Options inside a block at fault
    are named too: alone, if the message names the key of one.
    """
    by_key = {item.partition("=")[0].strip(): _shown_option(item) for item in overrides}
    located = []
    for item in found:
        prefixes = [item.path[:end] for end in range(len(item.path), 0, -1)]
        keys = [".".join(map(str, prefix)) for prefix in prefixes]
        inside = [key for key in by_key if key.startswith(f"{item.key}.")]
        named = [key for key in inside if re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", item.message)]
        option = next((by_key[key] for key in (*keys, *named) if key in by_key), "")
        line = None if option else next((lines[prefix] for prefix in prefixes if prefix in lines), None)
        others = {str(path[-1]) for path in lines if path[: len(item.path)] == item.path != path}
        if not option and others.isdisjoint(re.findall(r"\w+", item.message)):
            option = " -s ".join(by_key[key] for key in inside)
        located.append(LocatedFinding(item, line, option))
    return sorted(located, key=lambda item: item.line or 0)


def load_run(path: str, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> tuple[RunConfig, dict[str, Any]]:
    """Read a run file.

    Args:
        path: A .yaml or .yml file.
        overrides: `key=value` with dots in the key; the value is YAML.
        elsewhere: The run is for other machines, which may have variables that this one has not: see `deferred`.

    Returns:
        The settings, and the settings as written, `${env:…}` unexpanded.

    Raises:
        ConfigError: The file is missing or unreadable, or a setting is invalid; a SettingsError has every finding.
    """
    declared, lines = read_run_file(path)
    config, declared = settings_of(declared, path, overrides, lines, elsewhere=elsewhere)
    numerics = config.numerics_settings()  # they are stored with each checkpoint, expanded
    remedies = {key: (text, _USE_VARIABLE) for key, text in _texts(declared) if _is_secret(text)}
    remedies |= {key: (text, _UNSTORED) for key, text in _texts(numerics) if _is_secret(text)}
    found = [SettingsFinding(key, f"{_CREDENTIAL}: {redact(text)}", remedy) for key, (text, remedy) in remedies.items()]
    if found:
        raise _settings_error(found, path, overrides, lines)
    return config, declared


def settings_of(
    declared: dict[str, Any],
    source: str,
    overrides: Sequence[str] = (),
    lines: Lines | None = None,
    *,
    elsewhere: bool = False,
) -> tuple[RunConfig, dict[str, Any]]:
    """Build the settings declared in `source`, a file or a run, with the `lines` of each key; else as `load_run`."""
    for item in overrides:
        override(declared, item)
    unset = [
        SettingsFinding(path, f"the run file uses ${{env:{name}}}, but {name} is not set")
        for path, name in _unset_variables(declared)
    ]
    if unset and not elsewhere:
        raise _settings_error(unset, source, overrides, lines)
    body = expand(declared, partly=elsewhere)
    try:
        return RunConfig.model_validate(body), declared
    except ValidationError:
        found = check(RunConfig, body)
    texts = [item for item in unset if _concerns(item, found)]  # which are no values of their settings
    for unexpanded in reversed(texts):
        _remove(body, unexpanded.path)
    found = [_unexpanded(item, declared) for item in check(RunConfig, body)]
    if not found:
        return RunConfig.model_validate(body), declared
    needed = [item for item in texts if _concerns(item, found)]
    others = [item for item in found if not _concerns(item, needed)]
    raise _settings_error([*needed, *others], source, overrides, lines)


def _concerns(item: SettingsFinding, others: Sequence[SettingsFinding]) -> bool:
    """Check whether one of the others is about the same setting, a part of it, or a block around it."""
    return any(all(map(eq, item.path, other.path)) for other in others)


def deferred(declared: Any) -> dict[str, str]:
    """Return the settings that use a variable which is not set here, with its name.

    `load_run` with `elsewhere` leaves such a setting unexpanded, or at its default if a text is not valid there.
    """
    return {".".join(map(str, path)): name for path, name in _unset_variables(declared)}


def _remove(body: Any, path: KeyPath) -> None:
    for part in path[:-1]:
        body = body[part]
    del body[path[-1]]


def _settings_error(
    found: Sequence[SettingsFinding], source: str, overrides: Sequence[str], lines: Lines | None
) -> SettingsError:
    located = locate_findings(found, lines or {}, overrides)
    listing = "\n".join(f"  {escaped(str(item))}" for item in located)
    hint = f"edit {source}, or the -s options" if overrides else f"edit {source}"
    return SettingsError(f"settings of {source} are not valid:\n{listing}", hint=hint, findings=located)


def _shown_option(given: str) -> str:
    """Return an option for a message, without a value that seems to be a credential."""
    key, equals, value = given.partition("=")
    return f"{key}=…" if equals and (is_secret_name(key.rpartition(".")[2]) or is_secret_name(value)) else given


def _is_secret(text: str) -> bool:
    written = ENV_VARIABLE.sub("", text)
    return redact(written) != written


def _unexpanded(item: SettingsFinding, declared: Any) -> SettingsFinding:
    """Return the finding with `${env:NAME}` in place of the value, which may be a secret."""
    message, suggestion = item.message, item.suggestion
    for name in {name for _, text in _texts(declared) for name in ENV_VARIABLE.findall(text)}:
        value, written = os.environ.get(name, ""), f"${{env:{name}}}"
        for shown, instead in ((repr(value), repr(written)), (value, written) if len(value) > 3 else ("", "")):
            if shown:
                message, suggestion = message.replace(shown, instead), suggestion.replace(shown, instead)
    return replace(item, message=message, suggestion=suggestion)


def read_run_file(path: str) -> tuple[dict[str, Any], Lines]:
    """Return the content of a run file, and the line of each setting. Raises as `load_run`."""
    if path.endswith(".toml"):
        hint = f"write it as YAML, as {Path(path).with_suffix('.yaml')}; `outlast init` writes a starter file"
        raise ConfigError(f"run file {path} is TOML, which is no longer read", hint=hint)
    try:
        text = read_small_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "name a .yaml file; `outlast init` writes a starter file"
        candidates = {file.stem: file for file in Path(path).parent.glob("*.*") if file.suffix in (".yaml", ".yml")}
        if isinstance(error, FileNotFoundError) and (near := nearest(Path(path).stem, candidates)):
            hint = f"did you mean {candidates[near]}? `outlast init` writes a new one"
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"run file {path} cannot be read: {reason}", hint=hint) from error
    if _KUBERNETES_OBJECT.search(text):
        hint = "give the run's name where a command takes one, or the run file that was rendered"
        raise ConfigError(f"{path} is no run file: it holds objects of Kubernetes", hint=hint)
    try:
        body, lines = yaml.load(text, _UniqueKeyLoader), dict(_yaml_lines(yaml.compose(text, yaml.SafeLoader)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = f"{getattr(error, 'problem', None) or error}"
        found = [LocatedFinding(SettingsFinding((), message), mark.line + 1 if mark else None)]
        raise SettingsError(f"run file {path} is not valid: {found[0]}", hint=f"edit {path}", findings=found) from error
    if not isinstance(body, dict):
        found = [LocatedFinding(SettingsFinding((), "holds no settings", "begin with `name: my-run`"))]
        hint = "begin with `name: my-run`, or let `outlast init` write one"
        raise SettingsError(f"run file {path} holds no settings", hint=hint, findings=found)
    return body, lines


#: The first two lines of what `outlast k8s render` and `kubectl` print.
_KUBERNETES_OBJECT = re.compile(r"^apiVersion: .*\nkind: ", re.MULTILINE)


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


def _yaml_lines(node: yaml.Node | None, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    inner: list[tuple[int | str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(str(key.value), value, key.start_mark.line) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(number, value, value.start_mark.line) for number, value in enumerate(node.value)]
    for part, value, line in inner:
        yield (*path, part), line + 1
        yield from _yaml_lines(value, (*path, part))


def override(body: dict[str, Any], given: str) -> None:
    """Set one value of `body`; `given` is `key=value` with dots in the key. ConfigError if it is malformed."""
    key, equals, text = given.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {_shown_option(given)} sets nothing", hint="write key=value, such as -s train.lr=1e-4")
    *parents, last = key.strip().split(".")
    block = body
    for parent in parents:
        block = block.setdefault(parent, {})
        if not isinstance(block, dict):
            hint = f"leave out what follows {parent}"
            raise ConfigError(f"-s {_shown_option(given)}: {parent} holds a value, not a block", hint=hint)
    try:
        block[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or first_line(error)
        hint = f"quote it, for example -s '{key}=\"…\"'"
        raise ConfigError(f"-s {_shown_option(given)}: the value is not valid YAML: {problem}", hint=hint) from error


def _unset_variables(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path and NAME of every `${env:NAME}` that is not set."""
    for where, text in _texts(value, path):
        yield from ((where, name) for name in ENV_VARIABLE.findall(text) if name not in os.environ)


def _texts(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path and value of every text."""
    if isinstance(value, dict | list):
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*path, part))
    elif isinstance(value, str):
        yield path, value


def expand(value: Any, *, partly: bool = False) -> Any:
    """Return `value` with every `${env:NAME}` replaced. With `partly` one that is not set stays; else ConfigError."""
    if isinstance(value, dict):
        return {key: expand(item, partly=partly) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, partly=partly) for item in value]
    return ENV_VARIABLE.sub(partial(_from_environment, partly=partly), value) if isinstance(value, str) else value


def _from_environment(match: re.Match[str], *, partly: bool) -> str:
    if (name := match[1]) not in os.environ:
        if partly:
            return match[0]
        raise ConfigError(f"the run file uses ${{env:{name}}}, but {name} is not set", hint=f"export {name}=…")
    return os.environ[name]
