"""Names and paths of everything in a run's directory.

Paths are relative to the storage root and use `/`. All functions are pure: nothing here reads or writes storage.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.escaping import UNPRINTABLE

CLAIM = "claim.json"
MANIFEST = "manifest.json"
RECORD = "record.json"
STATE_DIR = "training_state"
LOOP_STATE = f"{STATE_DIR}/state.json"
WEIGHTS = "model.safetensors"

_RUN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_ATTEMPT = re.compile(r"(\d{4,18})-([0-9a-f]{4,})")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_REF = re.compile(r"(0|[1-9]\d{0,17})@(.+)")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_NAME_BYTES, _MAX_PATH = 255, 1024  # of file systems; of S3 keys
#: Names that desktops, editors, archives and file systems leave in any directory, in lower case.
_LITTER = re.compile(
    r"\.ds_store|\.localized|\._.*|\.(spotlight-v100|trashes|fseventsd|temporaryitems|appledouble)|__macosx"
    r"|thumbs\.db|ehthumbs\.db|desktop\.ini|\$recycle\.bin|system volume information"
    r"|\.directory|\.trash-\d+|\.hidden|\.goutputstream-.*|\.fuse_hidden.*|\.nfs.*|\.smbdelete.*|@eadir|lost\+found"
    r"|\.ipynb_checkpoints|__pycache__|\..*\.sw[a-p]|.*\.swp|.*~|#.*#|\.#.*|\.~lock\..*#"
)


def is_litter(path: str) -> bool:
    """Return whether a desktop, an editor or a file system left this file, by its name or that of a directory."""
    return any(_LITTER.fullmatch(name.lower()) for name in path.split("/"))


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One launch of the worker group. Ordered by (number, nonce); the order decides who is superseded."""

    number: int
    nonce: str

    def __str__(self) -> str:
        return f"{self.number:04d}-{self.nonce}"

    @classmethod
    def parse(cls, name: str) -> AttemptId | None:
        """Parse a directory name; None if it names no attempt."""
        match = _ATTEMPT.fullmatch(name)
        return cls(int(match[1]), match[2]) if match else None


@dataclass(frozen=True, slots=True, order=True)
class CheckpointRef:
    """One checkpoint of a run: the state after `step` steps, as written by `attempt`."""

    step: int
    attempt: AttemptId

    def __str__(self) -> str:
        return f"{self.attempt}/{checkpoint_name(self.step)}"

    @property
    def name(self) -> str:
        """Unambiguous name for users, such as `200@0001-9f2c`."""
        return f"{self.step}@{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> CheckpointRef | None:
        """Parse a `name`; None for any other text."""
        match = _REF.fullmatch(name)
        attempt = AttemptId.parse(match[2]) if match else None
        return cls(int(match[1]), attempt) if match and attempt else None

    @classmethod
    def from_path(cls, path: str) -> CheckpointRef | None:
        """Parse a `str(ref)`; None for any other text."""
        attempt, _, step = path.partition("/checkpoint-")
        return cls.parse(f"{step}@{attempt}")


def path_fault(path: object) -> str:
    """Return why a path that a file names is not one within that file's directory; empty if it is.

    Directories are joined by single slashes. Refused is also what another system reads otherwise (a backslash, a
    drive), and what hides in a listing: control, format and separator characters.
    """
    if not isinstance(path, str):
        return f"{path!r} is not a path"
    shown = repr(path[:80])
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or _DRIVE.match(path):
        return f"the path {shown} is not one within the directory"
    if any(unicodedata.category(sign) in UNPRINTABLE for sign in path):
        return f"the path {shown} has control characters"
    if max(len(part.encode()) for part in path.split("/")) > _MAX_NAME_BYTES or len(path) > _MAX_PATH:
        return f"the path {shown} is too long"
    return ""


def check_run_name(name: str) -> str:
    """Return `name` unchanged, or raise ConfigError.

    Refused is what could leave the storage root, is hidden, or breaks a file system or a Kubernetes label.
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
    """Return the journal directory of one prune command, its only writer."""
    return f"{prunes_dir(run)}/{prune}"


def launch_dir(run: str, launch: str) -> str:
    return f"{run}/launches/{launch}"


def trackers_dir(run: str) -> str:
    """Return the directory of metrics for other tools; outlast never reads them."""
    return f"{run}/trackers"


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def parse_checkpoint(name: str) -> int | None:
    """Parse a directory name into a step; None if it names no checkpoint."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_dir(run: str, ref: CheckpointRef) -> str:
    return f"{attempt_dir(run, ref.attempt)}/{checkpoint_name(ref.step)}"


def model_dir(run: str, attempt: AttemptId) -> str:
    return f"{attempt_dir(run, attempt)}/model"


def weights_shard(file: str, number: int, count: int) -> str:
    """Name a shard of a weights file as transformers does; `number` counts from 0."""
    return f"{file.removesuffix('.safetensors')}-{number + 1:05d}-of-{count:05d}.safetensors"


def is_training_state(path: str) -> bool:
    """Return whether a file of a checkpoint, by its path in it, is outlast's own state and not the model's."""
    return path.startswith(f"{STATE_DIR}/")


def optimizer_shard(rank: int, world_size: int) -> str:
    return f"{STATE_DIR}/optimizer-{rank:05d}-of-{world_size:05d}.safetensors"
