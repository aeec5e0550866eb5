"""Where everything lies: names and paths, pure functions only.

All paths are relative to the storage root and use `/`. Nothing here touches a disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from outlast.checkpointing.errors import ConfigError

CLAIM = "claim.json"
MANIFEST = "manifest.json"
RECORD = "record.json"
STATE_DIR = "training_state"
LOOP_STATE = f"{STATE_DIR}/state.json"
WEIGHTS = "model.safetensors"

_RUN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_ATTEMPT = re.compile(r"(\d{4,})-([0-9a-f]{4,})")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")
_REF = re.compile(r"(0|[1-9]\d*)@(.+)")


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One launch of the worker group. Ordered by (number, nonce); the order decides who is superseded."""

    number: int
    nonce: str

    def __str__(self) -> str:
        return f"{self.number:04d}-{self.nonce}"

    @classmethod
    def parse(cls, name: str) -> AttemptId | None:
        """The attempt a directory name stands for, or None for any other name."""
        match = _ATTEMPT.fullmatch(name)
        return cls(int(match[1]), match[2]) if match else None


@dataclass(frozen=True, slots=True, order=True)
class CheckpointRef:
    """Names one checkpoint of a run: the state after `step` steps, as written by `attempt`."""

    step: int
    attempt: AttemptId

    def __str__(self) -> str:
        return f"{self.attempt}/{checkpoint_name(self.step)}"

    @property
    def name(self) -> str:
        """How a user names this checkpoint where the step alone could mean several: `200@0001-9f2c`."""
        return f"{self.step}@{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> CheckpointRef | None:
        """The checkpoint that a `name` stands for, or None for any other text."""
        match = _REF.fullmatch(name)
        attempt = AttemptId.parse(match[2]) if match else None
        return cls(int(match[1]), attempt) if match and attempt else None

    @classmethod
    def from_path(cls, path: str) -> CheckpointRef | None:
        """The checkpoint that `str(ref)` stands for, or None for any other text."""
        attempt, _, step = path.partition("/checkpoint-")
        return cls.parse(f"{step}@{attempt}")


def check_run_name(name: str) -> str:
    """`name` itself if it can name a run.

    Raises:
        ConfigError: The name could leave the storage root, hide, or break a file system or a Kubernetes label.
    """
    if not _RUN.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"run name {name!r} is not usable: use 1 to 63 letters, digits, '-', '_' or '.', beginning and ending with "
            "a letter or digit, without '..'",
            hint="change `name:` in the run file",
        )
    return name


def attempts_dir(run: str) -> str:
    return f"{run}/attempts"


def attempt_dir(run: str, attempt: AttemptId) -> str:
    return f"{run}/attempts/{attempt}"


def pins_dir(run: str) -> str:
    return f"{run}/pins"


def pin_path(run: str, ref: CheckpointRef) -> str:
    return f"{pins_dir(run)}/{ref.name}"


def prunes_dir(run: str) -> str:
    return f"{run}/prunes"


def prune_dir(run: str, prune: str) -> str:
    """The journal of one deletion from outside; nobody else writes there."""
    return f"{prunes_dir(run)}/{prune}"


def launch_dir(run: str, launch: str) -> str:
    return f"{run}/launches/{launch}"


def trackers_dir(run: str) -> str:
    """Copies of the run's metrics for other tools; nothing reads them back."""
    return f"{run}/trackers"


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def parse_checkpoint(name: str) -> int | None:
    """The step a directory name stands for, or None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_dir(run: str, ref: CheckpointRef) -> str:
    return f"{attempt_dir(run, ref.attempt)}/{checkpoint_name(ref.step)}"


def model_dir(run: str, attempt: AttemptId) -> str:
    return f"{attempt_dir(run, attempt)}/model"


def weights_shard(file: str, number: int, count: int) -> str:
    """As transformers names the parts of a `file` of weights; `number` counts from 0."""
    return f"{file.removesuffix('.safetensors')}-{number + 1:05d}-of-{count:05d}.safetensors"


def optimizer_shard(rank: int, world_size: int) -> str:
    return f"{STATE_DIR}/optimizer-{rank:05d}-of-{world_size:05d}.safetensors"
