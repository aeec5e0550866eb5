"""All settings of a run: the trainers' and those of the cluster. They are checked when built, before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from outlast.checkpointing.errors import ConfigError, first_line, nearest
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_interval import SaveInterval
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.config.run_file import Lines, parse, settings_error
from outlast.cluster.fault_tolerance.restart_policy import RestartLimits
from outlast.trainers.config.base import Duration
from outlast.trainers.config.tracking import TrackSettings
from outlast.trainers.config.train import NonFiniteSettings, ParallelSettings
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.config.validation_errors import Path as KeyPath
from outlast.trainers.config.validation_errors import SettingsFinding, check

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class ScaleSettings(ParallelSettings):
    """Number and resources of the workers."""

    workers: int | tuple[int, int] = 1
    """Worker processes, one rank each. [2, 8] starts as many as fit the cluster: a lost node shrinks the group, a new
    one grows it."""
    resize_every: Duration = SaveInterval.parse("1m")
    """How often to check whether more workers fit. Each change of their number costs a checkpoint and a restart of the
    group, so nodes that arrive one after another are better added together."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker; 0 trains on the CPU."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs of a worker; fractions share one. Default: an equal share of this machine, or 1 on a cluster."""

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(type(number) is int and number >= 1 for number in numbers) or len(numbers) > 2:
            raise ValueError("write a number of workers, such as 4, or [min, max], such as [2, 8]")
        if list(numbers) != sorted(numbers):
            raise ValueError(f"min workers ({numbers[0]}) must not exceed max ({numbers[1]})")
        return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run trains."""
        return not isinstance(self.workers, int)


class FailureSettings(NonFiniteSettings):
    """When a run is restarted automatically, and when it is given up.

    The counts are those of all launches of the run, from its storage. A new checkpoint resets them, and so does any
    change to the settings.
    """

    max_failures: int = Field(3, ge=-1)
    """Failures since the newest checkpoint that the run survives; one more ends it. -1 for no limit."""
    max_same_step: int = Field(3, ge=-1)
    """Number of failures in the same step since the newest checkpoint that ends the run; -1 for no limit."""
    max_preemptions: int = Field(-1, ge=-1)
    """Announced node losses since the newest checkpoint that the run survives, counted separately; -1 for no limit."""
    note: str = ""
    """Any text. Change it to reset the counts after a fix that changes no other setting."""
    stall_s: float = Field(1800.0, ge=1.0)
    """Seconds without any event of the workers after which a supervisor stops the job and submits it again. Must be
    longer than the longest step, evaluation or start."""
    survive_head: bool = False
    """`submit` lets the driver run on a worker's node, for 0.01 of a CPU; the head must offer none. If Ray's tables are
    on a persistent volume (docs/how-to/recover.md), training continues while the head is down."""
    hang_after: Duration | None = SaveInterval.parse("2m")
    """A group that makes no progress for this time, and for 20 times the median step, is killed and restarted. Phases
    of varying length (start, first steps, reading data, evaluation, saves) may take 15 times as long. null: never."""

    standby_after_s: float | None = Field(30.0, ge=0.0)
    """After this time of training, a standby process with all imports done waits for each worker, and one on each of
    two spare nodes; a restart uses them. Each takes about 400 MB of host memory and no GPU; null: none."""

    @property
    def hang_after_s(self) -> float | None:
        return None if self.hang_after is None else self.hang_after.amount

    @property
    def limits(self) -> RestartLimits:
        return RestartLimits(self.max_failures, self.max_preemptions, self.max_same_step)


class RunConfig(TrainingConfig):
    """All settings of a run, as in a run file."""

    scale: ScaleSettings = Field(default_factory=lambda: ScaleSettings.model_validate({}))
    failure: FailureSettings = Field(default_factory=lambda: FailureSettings.model_validate({}))
    track: TrackSettings = Field(default_factory=lambda: TrackSettings.model_validate({}))

    def at_home(self, folder: Path) -> RunConfig:
        """Return a copy with absolute local paths; relative ones are resolved from `folder`, the run file's.

        So a run is the same from whichever directory it is started.
        """

        def absolute(path: str) -> str:
            return path if "://" in path else str(folder.absolute() / Path(path).expanduser())

        def absolute_if_exists(path: str | None) -> str | None:
            """Anything but an existing directory may be a hub id, and stays as it is."""
            return absolute(path) if path and Path(absolute(path)).is_dir() else path

        model = self.model.model_copy(update={"path": absolute_if_exists(self.model.path)})
        if model.tokenizer:
            tokenizer = model.tokenizer.model_copy(update={"path": absolute_if_exists(model.tokenizer.path)})
            model = model.model_copy(update={"tokenizer": tokenizer})

        def all_absolute(source: str | list[str]) -> str | list[str]:
            return absolute(source) if isinstance(source, str) else [absolute(path) for path in source]

        data = self.data.model_copy(update={"train": all_absolute(self.data.train)})
        if data.eval and not data.eval_share:
            data = data.model_copy(update={"eval": all_absolute(data.eval)})
        checkpoint = self.checkpoint.model_copy(update={"storage": absolute(self.checkpoint.storage)})
        return self.model_copy(update={"model": model, "data": data, "checkpoint": checkpoint})

    @property
    def store(self) -> RunStore:
        """The run in its storage."""
        return RunStore(open_storage(self.checkpoint.storage), self.name)


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
