"""The two rows of `benchmarks.stall` that need a Ray: `ray.train.report` with a checkpoint, sync and async.

    python -m benchmarks.stall_ray ROUNDS WIDTH FOLDER ANSWER.json

A Ray of its own with one worker on the CPU, in whose training function everything is measured: the two competitors, and
memcpy and the raw disk that their ratios refer to. Both save as Ray's guides have it: `torch.save` into a directory,
then `report`, which copies it to the run's storage.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")  # else memcpy in a busy machine is slower in here than outside
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode, RunConfig, ScalingConfig

from benchmarks.peers import Memcpy, Peer, RawWrite, TorchSave, take, whole
from benchmarks.stall import compete
from benchmarks.training import Training, sync_tree
from outlast.cluster.driver.embedded_ray import embedded_ray_environment

OBJECT_STORE_BYTES = 100 * 2**20


class RayReport(TorchSave):
    """`ray.train.report`. Committed is what a restart would find: copied, and taken note of by Ray's controller, which
    asks its workers every two seconds; then our fsyncs."""

    def __init__(self, mode: CheckpointUploadMode) -> None:
        self.name, self._mode = f"Ray report {mode.value.lower()}", mode
        self.overlaps = mode is CheckpointUploadMode.ASYNC

    def save(self, step: int) -> None:
        local = tempfile.mkdtemp(dir=self.folder)
        torch.save(whole(self.training), os.path.join(local, "state.pt"))
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(local),
            checkpoint_upload_mode=self._mode,
            delete_local_checkpoint_after_upload=True,
        )

    def finish(self) -> Path:
        newest = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)[-1]
        self.path = Path(newest.checkpoint.path)
        sync_tree(self.path)
        return self.path

    def load(self, twin: Training) -> None:
        with Checkpoint(self.path).as_directory() as folder:
            take(twin, torch.load(os.path.join(folder, "state.pt"), weights_only=True))


def train(options: dict[str, Any]) -> None:
    """What the worker runs."""
    place = Path(options["folder"], "in-ray")
    place.mkdir()
    peers: list[Peer] = [
        RayReport(CheckpointUploadMode.SYNC),
        RayReport(CheckpointUploadMode.ASYNC),
        Memcpy(),
        RawWrite(),
    ]
    rows = compete(peers, options["rounds"], options["width"], place)
    Path(options["answer"]).write_text(json.dumps([row for row in rows if row["name"].startswith("Ray")]))


def main() -> None:
    """The driver."""
    rounds, width, folder, answer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    options = {"rounds": rounds, "width": width, "folder": folder, "answer": answer}
    cores = os.cpu_count() or 1
    path = os.pathsep.join(sys.path)
    with tempfile.TemporaryDirectory(prefix="ray-") as place, embedded_ray_environment():
        ray.init(
            num_cpus=cores,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=place,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        try:
            ray.train.torch.TorchTrainer(
                train,
                train_loop_config=options,
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": cores / 2}),
                run_config=RunConfig(name="stall", storage_path=folder),
            ).fit()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
