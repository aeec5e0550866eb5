"""The whole run: what trainers need, plus how many workers and what may fail. YAML or TOML in, checked settings out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from outlast.checkpointing.errors import ConfigError, first_line
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_interval import SaveInterval
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.config.run_file import Lines, parse, refused
from outlast.cluster.fault_tolerance.restart_policy import RestartLimits
from outlast.trainers.config.base import Duration
from outlast.trainers.config.tracking import TrackSettings
from outlast.trainers.config.train import NonFiniteSettings, ParallelSettings
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.config.validation_errors import Path as Place
from outlast.trainers.config.validation_errors import SettingsFinding, check, nearest

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class ScaleSettings(ParallelSettings):
    """How many workers, and what each holds."""

    workers: int | tuple[int, int] = 1
    """Worker processes, one rank each. [2, 8] takes as many as the cluster has room for: a lost node makes the group
    smaller, a new one makes it larger."""
    resize_every: Duration = SaveInterval.parse("1m")
    """How often to look whether there is room for more workers. Each change of their number is a checkpoint and a
    restart of the group, so that nodes that come one after the other are better taken in together."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker; 0 trains on the CPU."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs of a worker; fractions share one. Default: what fits this machine, or 1 on a cluster."""

    @field_validator("workers", mode="before")
    @classmethod
    def _is_a_number_or_two(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(type(number) is int and number >= 1 for number in numbers) or len(numbers) > 2:
            raise ValueError("write a number of workers, such as 4, or the fewest and the most, such as [2, 8]")
        if list(numbers) != sorted(numbers):
            raise ValueError(f"[{numbers[0]}, {numbers[1]}] has the fewest after the most")
        return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """True where the number of workers may change while the run goes on."""
        return not isinstance(self.workers, int)


class FailureSettings(NonFiniteSettings):
    """When a run comes back by itself, and when it is given up.

    The counts are the run's, over all its launches, and stand in its storage. A new checkpoint sets them back, and so
    does any change to the settings.
    """

    max_failures: int = Field(3, ge=-1)
    """Failures since the newest checkpoint that the run survives; one more, and it is given up. -1 for no limit."""
    max_same_step: int = Field(3, ge=-1)
    """So many failures of one and the same step since the newest checkpoint end the run; -1 for no limit."""
    max_preemptions: int = Field(-1, ge=-1)
    """Announced losses of a node since the newest checkpoint that the run survives, counted apart; -1 for no limit."""
    note: str = ""
    """Say here what you mended when nothing else in the settings has changed: it sets the counts back."""
    stall_s: float = Field(1800.0, ge=1.0)
    """Seconds without any event of the workers after which a supervisor stops the job and submits it again. Longer than
    the longest step, evaluation or start."""
    survive_head: bool = False
    """`submit` lets the driver run on a worker's node, for 0.01 of a CPU; the head must offer none. If Ray's tables lie
    on a volume that stays (docs/failures.md, "When the head is lost"), the run goes on while the head is away."""
    hang_after: Duration | None = SaveInterval.parse("2m")
    """A group that makes no progress for so long, and for 20 times the median step, is ended and started again. What
    does not take equally long each time (start, first steps, reading data, evaluation, saves) may take 15 times as
    long. null never ends a group."""

    standby_after_s: float | None = Field(30.0, ge=0.0)
    """Once training has gone on for so long, a process with all its imports done waits for each worker, and one on each
    of two spare nodes, and a restart takes these. Each takes some 400 MB of host memory, and no GPU; null: none."""

    @property
    def hang_after_s(self) -> float | None:
        return None if self.hang_after is None else self.hang_after.amount

    @property
    def limits(self) -> RestartLimits:
        return RestartLimits(self.max_failures, self.max_preemptions, self.max_same_step)


class RunConfig(TrainingConfig):
    """One run file."""

    scale: ScaleSettings = Field(default_factory=lambda: ScaleSettings.model_validate({}))
    failure: FailureSettings = Field(default_factory=lambda: FailureSettings.model_validate({}))
    track: TrackSettings = Field(default_factory=lambda: TrackSettings.model_validate({}))

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

    @property
    def store(self) -> RunStore:
        """The run in its storage."""
        return RunStore(open_storage(self.checkpoint.storage), self.name)


def load_run(path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Reads a run file.

    Args:
        path: A .yaml, .yml or .toml file.
        overrides: `key=value` with dots in the key; the value is YAML.

    Returns:
        The settings, and what the user wrote, `${env:…}` unexpanded, for the record.

    Raises:
        ConfigError: The file is missing or unreadable, or a setting is wrong; a SettingsError has every finding.
    """
    declared, lines = read_run_file(path)
    return settings_of(declared, path, overrides, lines)


def settings_of(
    declared: dict[str, Any], place: str, overrides: Sequence[str] = (), lines: Lines | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """The settings that were declared at `place`, a file or a run, whose `lines` say where; the rest is as in
    `load_run`.
    """
    for item in overrides:
        override(declared, item)
    missing = [
        SettingsFinding(path, f"the run file asks for ${{env:{name}}}, and {name} is not set")
        for path, name in _not_set(declared)
    ]
    if missing:
        raise refused(place, missing, lines or {}, overrides)
    whole = expand(declared)
    try:
        return RunConfig.model_validate(whole), declared
    except ValidationError as error:
        raise refused(place, check(RunConfig, whole), lines or {}, overrides) from error


def read_run_file(path: str) -> tuple[dict[str, Any], Lines]:
    """What a run file says, and the line of each setting. Raises as `load_run`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "name a .yaml or .toml file; `outlast init` writes one to begin with"
        here = {file.stem: file for file in Path(path).parent.glob("*.*") if file.suffix in (".yaml", ".yml", ".toml")}
        if isinstance(error, FileNotFoundError) and (near := nearest(Path(path).stem, here)):
            hint = f"did you mean {here[near]}? `outlast init` writes a new one"
        said = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"run file {path} cannot be read: {said}", hint=hint) from error
    return parse(text, path)


def override(body: dict[str, Any], given: str) -> None:
    """Sets what `given` says, as `key=value` with dots in the key.

    Raises:
        ConfigError: It says nothing that can be set.
    """
    key, equals, text = given.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {given} sets nothing", hint="write key=value, such as -s train.lr=1e-4")
    *parents, last = key.strip().split(".")
    place = body
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(
                f"-s {given}: {parent} holds a value, not a block", hint=f"leave out what follows {parent}"
            )
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or first_line(error)
        hint = f"quote it, for example -s '{key}=\"…\"'"
        raise ConfigError(f"-s {given}: the value is not valid YAML: {said}", hint=hint) from error


def _not_set(value: Any, path: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every `${env:NAME}` whose NAME is not set, with its place."""
    if isinstance(value, dict | list):
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_set(item, (*path, part))
    elif isinstance(value, str):
        yield from ((path, name) for name in _ENV.findall(value) if name not in os.environ)


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
        raise ConfigError(
            f"the run file asks for ${{env:{match[1]}}}, and {match[1]} is not set", hint=f"export {match[1]}=…"
        )
    return os.environ[match[1]]
