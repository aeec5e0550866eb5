"""The folder of a launch in a node's shared memory, with the snapshots of the ranks on that node.

It is in `/dev/shm`, or in the directory that `OUTLAST_SNAPSHOTS` names, below a folder that only this user may enter.
Pages are reserved before they are mapped: a process that touches more than the file system has is killed. Locks show
which launches are alive: the kernel releases those of a killed process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

from outlast.checkpointing.errors import DamagedError, StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.memory_tier.snapshot import Snapshot

SHARED_MEMORY = "/dev/shm"
#: A launch without a process on this node for so long is over: others of the same user remove its snapshots.
_ABANDONED_S = 900.0
_LOCK = "lock"


class SharedBuffer:
    """Memory that outlives this process, under a name.

    Attributes:
        buffer: The memory, as bytes.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Reserve the memory. Raises OSError."""
        self.path = path
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(number, 0, max(1, num_bytes))
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._mapped = mmap.mmap(number, max(1, num_bytes), flags=flags)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(number)
        self.buffer = torch.frombuffer(self._mapped, dtype=torch.uint8)[:num_bytes]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class SnapshotFolder:
    """The snapshots of one launch on this node.

    Args:
        run: Identifies the run: its storage and name.
        launch: The launch.

    Raises:
        StorageError: There is no such memory, or another user's folder is in its place.
    """

    def __init__(self, run: str, launch: str) -> None:
        root = Path(os.environ.get("OUTLAST_SNAPSHOTS") or SHARED_MEMORY)
        own = root / f"outlast-{os.geteuid()}"
        self._run = xxhash.xxh3_64_hexdigest(run.encode())
        self.path = own / f"{self._run}-{xxhash.xxh3_64_hexdigest(launch.encode())}"
        try:
            for folder in (own, self.path):
                with suppress(FileExistsError):
                    folder.mkdir(0o700)
                found = folder.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                    raise StorageError(f"{folder} is not a directory that only this user may enter")
            self._lock = (self.path / _LOCK).open("a")
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        except OSError as error:
            raise StorageError(f"no snapshots can be kept in {root}: {error.strerror}") from error
        self._remove_abandoned(own)

    def _remove_abandoned(self, own: Path) -> None:
        """Remove the folders of launches that are over: earlier ones of this run, and others without processes."""
        for folder in own.iterdir():
            if folder == self.path:
                continue
            with suppress(OSError), (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_of_run = folder.name.startswith(f"{self._run}-")
                if is_of_run or time.time() - (folder / _LOCK).stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)

    def free_bytes(self) -> int:
        """Return the free bytes of the file system."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def publish(self, snapshot: Snapshot) -> None:
        """Commit a snapshot, whose data is complete."""
        target = self.path / snapshot.name
        made = target.with_suffix(".tmp")
        made.write_bytes(snapshot.to_json())
        made.rename(target)
        os.utime(self._lock.fileno())

    def withdraw(self, snapshot: Snapshot) -> None:
        """Remove a snapshot, whose data is about to be overwritten."""
        (self.path / snapshot.name).unlink(missing_ok=True)

    def has(self, snapshot: Snapshot) -> bool:
        return (self.path / snapshot.name).exists()

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots that are complete."""
        found = []
        for path in sorted(self.path.glob("*.json")):
            with suppress(OSError, DamagedError):
                found.append(Snapshot.parse(path.read_bytes()))
        return found

    def open(self, snapshot: Snapshot) -> torch.Tensor:
        """Return the data of a snapshot, its digest checked. Raises DamagedError."""
        try:
            with (self.path / snapshot.data).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise DamagedError(f"the snapshot of rank {snapshot.rank} cannot be read: {error}") from error
        data = torch.frombuffer(mapped, dtype=torch.uint8)[: snapshot.num_bytes]
        snapshot.check(data)
        return data

    def remove_before(self, attempt: AttemptId, keep: tuple[AttemptId, int] | None = None) -> None:
        """Remove the snapshots of earlier attempts, but for those after a step of one: `keep`."""
        kept = {_LOCK}
        for item in self.snapshots():
            if (item.attempt, item.step) == keep:
                kept |= {item.name, item.data}
        for path in self._files():
            owner = AttemptId.parse(path.name.partition(".")[0])
            if path.name not in kept and owner is not None and owner < attempt:
                path.unlink(missing_ok=True)

    # -- starts from a snapshot ----------------------------------------------------------------------------------------

    def begin_start(self, attempt: AttemptId, step: int, by: AttemptId) -> None:
        """Record that attempt `by` starts from a step of an earlier one."""
        (self.path / f"start.{attempt}.{step}.{by}").touch()

    def end_starts(self) -> None:
        """Record that the starts so far have succeeded."""
        for path in self.path.glob("start.*"):
            path.unlink(missing_ok=True)

    def num_starts(self, snapshot: Snapshot) -> int:
        """Count the starts from a snapshot's step that came to no step of their own."""
        return len(list(self.path.glob(f"start.{snapshot.attempt}.{snapshot.step}.*")))

    def close(self, *, remove: bool) -> None:
        """Release the folder; remove it with all snapshots if the launch is over."""
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _files(self) -> Iterator[Path]:
        with suppress(FileNotFoundError):
            yield from list(self.path.iterdir())
