"""The trackers themselves, through accelerate's. Each finds out what its tool has already, and goes on there."""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.layout import trackers_dir
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.tracking import Name
from outlast.trainers.tracking.base import TrackerBackend, TrackerContext, Watermark

SEGMENT_BYTES = 2**20
PUT_S = 30.0
_WIDTH = 20


def _folder(place: TrackerContext, directory: str) -> tuple[Path, bool]:
    """Where a tracker writes: in the storage if that is a file system, else on this machine; and whether it is."""
    if isinstance(place.store.storage, LocalStorage):
        return place.store.storage.path(directory), True
    return Path(tempfile.mkdtemp(prefix="outlast-track-")), False


def _started(tracker: GeneralTracker) -> Any:
    """Starts a tracker of accelerate, on this rank whatever accelerate makes of the ranks."""
    PartialState()  # its loggers insist
    tracker.main_process_only = False
    tracker.start()
    return tracker


class TensorBoard:
    """Event files under `<run>/trackers/tensorboard`, cut into pieces of a megabyte.

    On a file system they grow in place. On an object store, where nothing can, each is written on this machine first,
    and put again every half a minute.
    """

    name = "tensorboard"

    def __init__(self, place: TrackerContext) -> None:
        self._place = place
        self._directory = f"{trackers_dir(place.store.run)}/tensorboard"
        self._folder, self._is_local = _folder(place, self._directory)
        self._put_at = 0.0

    def open(self) -> Watermark:
        files = [entry.name for entry in self._place.store.storage.list(self._directory) if "tfevents" in entry.name]
        seen = Watermark()
        for name in reversed(files):
            if found := list(_scalars(read_bytes(self._place.store.storage, f"{self._directory}/{name}"))):
                seen = Watermark(min(step for _, step in found) - 1, dict(sorted(found, key=lambda pair: pair[1])))
                break
        self._num_files = len(files)
        self._begin()
        if not files:
            text = "\n".join(f"    {key}: {value}" for key, value in self._place.settings.items())
            self._tracker.log({"settings": text}, step=0)
        return seen

    def _begin(self) -> None:
        before = set(self._folder.glob("*"))
        options = {**self._place.options, "filename_suffix": f".{self._num_files:05d}"}  # tensorboardX knows seconds
        self._tracker = _started(TensorBoardTracker(self._folder.name, self._folder.parent, **options))
        self._file = max(set(self._folder.glob("*tfevents*")) - before)
        self._num_files += 1

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        if self._file.stat().st_size >= SEGMENT_BYTES:
            self.close()
            self._begin()
        self._tracker.log(dict(values), step=step, walltime=at)
        if not self._is_local and time.monotonic() - self._put_at >= PUT_S:
            self._put()

    def _put(self) -> None:
        self._place.store.storage.put(f"{self._directory}/{self._file.name}", [self._file.read_bytes()])
        self._put_at = time.monotonic()

    def close(self) -> None:
        self._tracker.finish()
        if not self._is_local:
            self._put()


def _scalars(data: bytes) -> Iterator[tuple[str, int]]:
    """Name and step of each value in an event file, which may end in the middle of a record."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError:
        from tensorboardX.proto.event_pb2 import Event
    position = 0
    while position + 12 <= len(data):
        [length] = struct.unpack_from("<Q", data, position)
        body = data[position + 12 : position + 12 + length]
        if len(body) < length:
            return
        event = Event.FromString(body)
        yield from ((value.tag, event.step) for value in event.summary.value if value.HasField("simple_value"))
        position += length + 16


class MLflow:
    """A run in the experiment of the project's name, found again by a tag."""

    name = "mlflow"

    def __init__(self, place: TrackerContext) -> None:
        self._place = place

    def open(self) -> Watermark:
        from mlflow import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError("MLFLOW_TRACKING_URI is not set where rank 0 works; metrics stay in the journal")
        client, tag = MlflowClient(), "outlast.run"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._place.project)
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        known = client.search_runs([number], f"tags.`{tag}` = '{self._place.id}'", max_results=1)
        options: dict[str, Any] = {"run_name": self._place.store.run, **self._place.options}
        tags = {**options.pop("tags", {}), tag: self._place.id}
        if known:
            options["run_id"] = known[0].info.run_id
        else:  # with its tags from the first moment: a kill leaves none that is not found again
            made = client.create_run(number, tags=resolve_tags(tags), run_name=options["run_name"])
            options["run_id"] = made.info.run_id
        self._tracker = _started(MLflowTracker(self._place.project, tags=tags, **options))
        run = client.get_run(self._tracker.tracker.info.run_id)
        if not run.data.params:
            self._tracker.store_init_configuration(dict(self._place.settings))
        history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        return Watermark(by_name={name: max(item.step for item in items) for name, items in history.items() if items})

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        self._tracker.log(dict(values), step=step, timestamp=int(at * 1000))

    def close(self) -> None:
        self._tracker.finish()


class WandB:
    """A run of Weights & Biases whose id is the run's own.

    Offline nobody can be asked how far it has come. So the newest step stands in a small file beside its data, written
    before the step is handed over: a kill in between loses this step there, and doubles none.
    """

    name = "wandb"

    def __init__(self, place: TrackerContext) -> None:
        self._place = place
        self._folder, _ = _folder(place, trackers_dir(place.store.run))

    def open(self) -> Watermark:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        place = self._place
        given = {"id": place.id, "name": place.store.run, "resume": "allow", "dir": str(self._folder), **place.options}
        self._tracker = _started(WandBTracker(place.project, **given))
        self._tracker.store_init_configuration(dict(place.settings))
        self._newest = os.open(self._folder / "wandb-step", os.O_RDWR | os.O_CREAT, 0o644)
        run = self._tracker.tracker
        if not run.offline:
            return Watermark(run.starting_step - 1)
        said = os.pread(self._newest, _WIDTH, 0)
        return Watermark(int(said) if said else -1)

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        os.pwrite(self._newest, f"{step:{_WIDTH}}".encode(), 0)  # no truncation: it is whole at every instant
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        self._tracker.finish()
        os.close(self._newest)


BACKENDS: Mapping[Name, Callable[[TrackerContext], TrackerBackend]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
