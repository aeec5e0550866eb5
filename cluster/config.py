"""The whole run: what trainers need, plus how many workers and what may fail. YAML or TOML in, checked settings out."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config import Exactness, Parallel, Settings, TrainingConfig, check_parallel, explain

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class ScaleSettings(Settings):
    """How many workers, and what each holds."""

    workers: int = Field(1, ge=1)
    """Worker processes, one rank each."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker; 0 trains on the CPU."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs of a worker; fractions share one. Default: what fits this machine, or 1 on a cluster."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How the model is spread: every worker holds all of it (ddp), or a share, and gathers the rest block by block
    while it computes (fsdp): less memory, more traffic."""


class FailureSettings(Settings):
    """How often a run may come back by itself."""

    max_failures: int = Field(3, ge=-1)
    """Restarts of the worker group in one launch; -1 for no limit."""
    max_preemptions: int = Field(-1, ge=-1)
    """Restarts after an announced loss of a node, counted apart; -1 for no limit."""
    standby: bool = True
    """Keep a process with all imports done for each worker, and one on each of two spare nodes: a restart is quicker by
    the imports. Each takes some 300 MB of host memory, and no GPU."""


class RunConfig(TrainingConfig):
    """One run file."""

    scale: ScaleSettings = Field(default_factory=lambda: ScaleSettings.model_validate({}))
    failure: FailureSettings = Field(default_factory=lambda: FailureSettings.model_validate({}))

    @model_validator(mode="after")
    def _is_exact(self) -> RunConfig:
        check_parallel(Parallel(self.scale.parallel), Exactness(self.exactness))
        return self

    def at_home(self, folder: Path) -> RunConfig:
        """The same with local paths made absolute; relative ones begin at `folder`, where the run file lies.

        So a run is the same run from whichever directory it is started.
        """

        def absolute(path: str) -> str:
            return path if "://" in path else str(folder.absolute() / Path(path).expanduser())

        def if_there(path: str | None) -> str | None:
            """A directory, or else a hub id, which has no place."""
            return absolute(path) if path and Path(absolute(path)).is_dir() else path

        model = self.model.model_copy(update={"path": if_there(self.model.path)})
        if model.tokenizer:
            tokenizer = model.tokenizer.model_copy(update={"path": if_there(model.tokenizer.path)})
            model = model.model_copy(update={"tokenizer": tokenizer})

        def all_absolute(source: str | list[str]) -> str | list[str]:
            return absolute(source) if isinstance(source, str) else [absolute(place) for place in source]

        data = self.data.model_copy(update={"train": all_absolute(self.data.train)})
        if data.eval and not data.eval_share:
            data = data.model_copy(update={"eval": all_absolute(data.eval)})
        checkpoint = self.checkpoint.model_copy(update={"storage": absolute(self.checkpoint.storage)})
        return self.model_copy(update={"model": model, "data": data, "checkpoint": checkpoint})


def load_run(path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Reads a run file.

    Args:
        path: A .yaml, .yml or .toml file.
        overrides: `key=value` with dots in the key; the value is YAML.

    Returns:
        The settings, and what the user wrote, `${env:…}` unexpanded, for the record.

    Raises:
        ConfigError: The file is missing or unreadable, or a setting is wrong; the message lists every finding.
    """
    declared = _read(path)
    for override in overrides:
        _override(declared, override)
    try:
        return RunConfig.model_validate(expand(declared)), declared
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, RunConfig).splitlines())
        hint = f"edit {path}, or the -s options" if overrides else f"edit {path}"
        raise ConfigError(f"{path} has settings that cannot be used:\n{lines}", hint=hint) from error


class _Once(yaml.SafeLoader):
    """YAML in which a key may stand once only; the library lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice, again in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} cannot be read: {error}") from error
    try:
        body = tomllib.loads(text) if path.endswith(".toml") else yaml.load(text, _Once)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"run file {path} is not valid: {error}", hint=f"edit {path}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"run file {path} holds no settings", hint="begin with `name: my-run`")
    return body


def _override(body: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {override}: write key=value, such as -s train.lr=1e-4")
    *parents, last = key.strip().split(".")
    place = body
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"-s {override}: {parent} holds a value, not a block")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"-s {override}: the value is not valid YAML: {error}") from error


def expand(value: Any) -> Any:
    """`value` with every `${env:NAME}` in it replaced. Raises ConfigError for a name that is not set."""
    if isinstance(value, dict):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, str):
        return _ENV.sub(_from_environment, value)
    return value


def _from_environment(match: re.Match[str]) -> str:
    if match[1] not in os.environ:
        raise ConfigError(f"the run file asks for ${{env:{match[1]}}}, and {match[1]} is not set")
    return os.environ[match[1]]
