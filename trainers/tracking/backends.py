"""Interface of tracker backends, and those of TensorBoard, MLflow and Weights & Biases, through accelerate's trackers.

Each backend finds its tool's record of the run and continues it, so a restart must neither duplicate nor lose steps.
"""

import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import trackers_dir
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.tracking import Name

SEGMENT_BYTES = 2**20
PUT_S = 30.0
_WIDTH = 20


@dataclass(slots=True)
class Watermark:
    """Newest steps that a tracker has."""

    floor: int = -1  #: of values that are not in `by_name`
    by_name: dict[str, int] = field(default_factory=dict)

    def news(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Return the values that the tracker does not have yet, and mark them as sent."""
        fresh = {name: value for name, value in values.items() if step > self.by_name.get(name, self.floor)}
        self.by_name |= dict.fromkeys(fresh, step)
        return fresh


class TrackerBackend(Protocol):
    """Interface of a tracker, called from its own thread. Its methods may raise any exception and may block."""

    def open(self) -> Watermark:
        """Find the tracker's record of the run, or create it."""

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        """Log the values of a step that took place at `at`, in seconds since the epoch."""

    def close(self) -> None:
        """Flush all values and close the tracker."""


@dataclass(frozen=True, slots=True)
class TrackerContext:
    """The run as a tracker sees it."""

    store: RunStore
    id: str  #: unique: another run of the same name has another id
    settings: Mapping[str, Any]  #: as declared, flattened
    project: str  #: the setting `track.project`
    options: Mapping[str, Any]  #: the tracker's entry of `track.options`


def _folder(context: TrackerContext, directory: str) -> tuple[Path, bool]:
    """Return a local folder to write to, and whether it is in the run's storage (a file system) or temporary."""
    if isinstance(context.store.storage, LocalStorage):
        return context.store.storage.path(f"{directory}/any").parent, True  # as a directory: refused if it is a link
    return Path(tempfile.mkdtemp(prefix="outlast-track-")), False


def _start(tracker: GeneralTracker) -> Any:
    """Start a tracker of accelerate on this rank, regardless of accelerate's view of the ranks."""
    PartialState()  # required by accelerate's loggers
    tracker.main_process_only = False
    tracker.start()
    return tracker


class TensorBoard:
    """Event files under `<run>/trackers/tensorboard`, in segments of a megabyte.

    On a file system they grow in place. An object store cannot append, so a segment is written on this machine and
    uploaded again every 30 seconds.
    """

    def __init__(self, context: TrackerContext) -> None:
        self._context = context
        self._directory = f"{trackers_dir(context.store.run)}/tensorboard"
        self._folder, self._is_local = _folder(context, self._directory)
        self._put_at = 0.0

    def open(self) -> Watermark:
        files = [entry.name for entry in self._context.store.storage.list(self._directory) if "tfevents" in entry.name]
        watermark = Watermark()
        for name in reversed(files):
            if points := list(_scalars(read_bytes(self._context.store.storage, f"{self._directory}/{name}"))):
                by_name = dict(sorted(points, key=lambda point: point[1]))
                watermark = Watermark(min(step for _, step in points) - 1, by_name)
                break
        self._num_files = len(files)
        self._open_segment()
        if not files:
            text = "\n".join(f"    {key}: {value}" for key, value in self._context.settings.items())
            self._tracker.log({"settings": text}, step=0)
        return watermark

    def _open_segment(self) -> None:
        before = set(self._folder.glob("*"))
        # Without a suffix, names of tensorboardX differ by seconds only.
        options = {**self._context.options, "filename_suffix": f".{self._num_files:05d}"}
        self._tracker = _start(TensorBoardTracker(self._folder.name, self._folder.parent, **options))
        self._file = max(set(self._folder.glob("*tfevents*")) - before)
        self._num_files += 1

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        if self._file.stat().st_size >= SEGMENT_BYTES:
            self.close()
            self._open_segment()
        self._tracker.log(dict(values), step=step, walltime=at)
        if not self._is_local and time.monotonic() - self._put_at >= PUT_S:
            self._put()

    def _put(self) -> None:
        self._context.store.storage.put(f"{self._directory}/{self._file.name}", [self._file.read_bytes()])
        self._put_at = time.monotonic()

    def close(self) -> None:
        self._tracker.finish()
        if not self._is_local:
            self._put()


def _scalars(data: bytes) -> Iterator[tuple[str, int]]:
    """Parse name and step of each value in an event file, which may end within a record."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError:
        from tensorboardX.proto.event_pb2 import Event
    position = 0
    while position + 12 <= len(data):
        [length] = struct.unpack_from("<Q", data, position)
        record = data[position + 12 : position + 12 + length]
        if len(record) < length:
            return
        event = Event.FromString(record)
        yield from ((value.tag, event.step) for value in event.summary.value if value.HasField("simple_value"))
        position += length + 16


class MLflow:
    """A run in the experiment named after the project; a tag identifies it after a restart."""

    def __init__(self, context: TrackerContext) -> None:
        self._context = context

    def open(self) -> Watermark:
        from mlflow import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError("MLFLOW_TRACKING_URI is not set on the worker of rank 0; metrics are in the journal only")
        client, tag = MlflowClient(), "outlast.run"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._context.project)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        existing = client.search_runs([experiment_id], f"tags.`{tag}` = '{self._context.id}'", max_results=1)
        options: dict[str, Any] = {"run_name": self._context.store.run, **self._context.options}
        tags = {**options.pop("tags", {}), tag: self._context.id}
        if existing:
            options["run_id"] = existing[0].info.run_id
        else:  # created with its tags, so that a kill leaves no run that cannot be identified
            created = client.create_run(experiment_id, tags=resolve_tags(tags), run_name=options["run_name"])
            options["run_id"] = created.info.run_id
        self._tracker = _start(MLflowTracker(self._context.project, tags=tags, **options))
        run = client.get_run(self._tracker.tracker.info.run_id)
        if not run.data.params:
            self._tracker.store_init_configuration(dict(self._context.settings))
        history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        return Watermark(by_name={name: max(item.step for item in items) for name, items in history.items() if items})

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        self._tracker.log(dict(values), step=step, timestamp=int(at * 1000))

    def close(self) -> None:
        self._tracker.finish()


class WandB:
    """A run of Weights & Biases with the id of the run.

    Offline, no server has the newest step. So it is stored in a small file beside the data, written before the step
    is logged: a kill in between loses this step in the tracker, but duplicates none.
    """

    def __init__(self, context: TrackerContext) -> None:
        self._context = context
        self._folder, _ = _folder(context, trackers_dir(context.store.run))

    def open(self) -> Watermark:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        context = self._context
        options = {"id": context.id, "name": context.store.run, "resume": "allow", "dir": str(self._folder)}
        self._tracker = _start(WandBTracker(context.project, **{**options, **context.options}))
        self._tracker.store_init_configuration(dict(context.settings))
        self._step_file = os.open(self._folder / "wandb-step", os.O_RDWR | os.O_CREAT, 0o644)
        run = self._tracker.tracker
        if not run.offline:
            return Watermark(run.starting_step - 1)
        newest = os.pread(self._step_file, _WIDTH, 0)
        return Watermark(int(newest) if newest else -1)

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        os.pwrite(self._step_file, f"{step:{_WIDTH}}".encode(), 0)  # fixed width, no truncation: always a valid number
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        self._tracker.finish()
        os.close(self._step_file)


BACKENDS: Mapping[Name, Callable[[TrackerContext], TrackerBackend]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
