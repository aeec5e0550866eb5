"""All settings of a run: the trainers' and those of the cluster. They are checked when built, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_schedule import SaveInterval
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.location import is_url
from outlast.cluster.fault_tolerance.restart_policy import RestartLimits
from outlast.trainers.config.base import Duration
from outlast.trainers.config.model import is_model_path
from outlast.trainers.config.tracking import TrackSettings
from outlast.trainers.config.train import Exactness, Parallel, ParallelSettings, TrainingFailureSettings
from outlast.trainers.config.training_config import TrainingConfig

_SHORTEST_LEASE_S = 60.0


class ScaleSettings(ParallelSettings):
    """Number and resources of the workers."""

    workers: int | tuple[int, int] = 1
    """Worker processes, one rank each. [2, 8] starts as many as fit the cluster: a lost node shrinks the group, a new
    one grows it."""
    resize_every: Duration = SaveInterval.parse("1m")
    """How often to check whether more workers fit. Each change of their number costs a checkpoint and a restart of the
    group, so nodes that arrive one after another are better added together."""
    spares: int = Field(0, ge=0)
    """More workers, with the same resources, which hold the model and wait: when a worker is lost, one of them goes on
    in its place within a second, and a new one is started. Needs failure.in_place."""
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


class FailureSettings(TrainingFailureSettings):
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
    survive_driver: bool = False
    """On an existing cluster: the run goes on when its driver is killed, or its terminal is lost. The same command
    attaches to it again; `outlast stop`, Ctrl-C and SIGTERM end it. A local Ray ends with its driver."""
    lease: Duration | None = SaveInterval.parse("24h")
    """A run that has been without a driver for this time, 1m or more, saves a checkpoint and ends. null: it goes on to
    its end."""
    hang_after: Duration | None = SaveInterval.parse("2m")
    """A group that makes no progress for this time, and for 20 times the median step, is killed and restarted. Phases
    of varying length (start, first steps, reading data, evaluation, saves) may take 15 times as long. null: never."""

    in_place: Literal["auto"] | bool = "auto"
    """Whether the other workers keep the training state in memory when one is lost, and go on with its replacement: no
    step is lost or done twice. Needs scale.parallel: ddp and at least two workers; without them, and if it fails, all
    workers restart from the newest checkpoint. auto: on CPUs; true: on GPUs, too, which is not tried yet."""
    standby_after_s: float | None = Field(30.0, ge=0.0)
    """After this time of training, a standby process with all imports done waits for each worker, and one on each of
    two spare nodes; a restart uses them. Each takes about 400 MB of host memory and no GPU; null: none."""

    @field_validator("lease")
    @classmethod
    def _check_lease(cls, value: Duration | None) -> Duration | None:
        if value is not None and value.amount < _SHORTEST_LEASE_S:
            raise ValueError(
                "must be at least 1m: a driver on a busy machine may be silent for longer than a few seconds"
            )
        return value

    @property
    def hang_after_s(self) -> float | None:
        return None if self.hang_after is None else self.hang_after.amount

    @property
    def lease_s(self) -> float | None:
        return None if self.lease is None else self.lease.amount

    @property
    def limits(self) -> RestartLimits:
        return RestartLimits(self.max_failures, self.max_preemptions, self.max_same_step)


class RunConfig(TrainingConfig):
    """All settings of a run, as in a run file."""

    scale: ScaleSettings = Field(default_factory=lambda: ScaleSettings.model_validate({}))
    failure: FailureSettings = Field(default_factory=lambda: FailureSettings.model_validate({}))
    track: TrackSettings = Field(default_factory=lambda: TrackSettings.model_validate({}))

    @model_validator(mode="after")
    def _check_in_place(self) -> Self:
        why_not = self._why_not_in_place()
        if self.failure.in_place is True and why_not:
            raise ConfigError(f"failure.in_place: true {why_not}", hint="use failure.in_place: auto or false")
        if self.scale.spares and not self.goes_on_in_place:
            why_not = why_not or f"does not go with failure.in_place: {str(self.failure.in_place).lower()} here"
            raise ConfigError(f"scale.spares {why_not}", hint="use scale.spares: 0")
        return self

    def _why_not_in_place(self) -> str:
        scale = self.scale
        if scale.parallel is not Parallel.DDP:
            return "needs scale.parallel: ddp, where each worker holds the whole state"
        if scale.max_workers < 2:
            return "needs at least 2 scale.workers: the state of a single one is lost with it"
        if scale.is_elastic and self.exactness is not Exactness.ELASTIC:
            return "needs exactness: elastic where the number of scale.workers may change"
        if scale.is_elastic and scale.spares:
            return "need a fixed number of scale.workers"
        return ""

    @property
    def goes_on_in_place(self) -> bool:
        """Whether the other workers go on in memory when one is lost."""
        is_wanted = self.failure.in_place is True or (
            self.failure.in_place == "auto" and not self.scale.gpus_per_worker
        )
        return is_wanted and not self._why_not_in_place()

    def at_home(self, folder: Path) -> RunConfig:
        """Return a copy with absolute local paths; relative ones are resolved from `folder`, the run file's.

        So a run is the same from whichever directory it is started.
        """

        def absolute(path: str) -> str:
            return path if is_url(path) else str(folder.absolute() / Path(path).expanduser())

        def absolute_if_exists(path: str | None) -> str | None:
            """Anything but an existing directory may be a hub id, and stays as it is."""
            return absolute(path) if path and Path(absolute(path)).is_dir() else path

        model = self.model.model_copy(update={"path": absolute_if_exists(self.model.path)})
        if model.lora:
            lora = model.lora.model_copy(update={"path": absolute_if_exists(model.lora.path)})
            model = model.model_copy(update={"lora": lora})
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
    def model_names(self) -> dict[str, str]:
        """The paths or hub ids of model, adapter and tokenizer, by key."""
        model = self.model
        names = {
            "model.path": model.path,
            "model.lora.path": model.lora.path if model.lora else None,
            "model.tokenizer.path": model.tokenizer.path if model.tokenizer else None,
        }
        return {key: name for key, name in names.items() if name}

    @property
    def places(self) -> dict[str, str]:
        """The settings that are paths or URLs, by key. A model's name that may be a hub id is none."""
        local = {key: name for key, name in self.model_names.items() if is_model_path(name)}
        return {"checkpoint.storage": self.checkpoint.storage, **self.data.places, **local}

    @property
    def store(self) -> RunStore:
        """The run in its storage."""
        return RunStore(open_storage(self.checkpoint.storage), self.name)
