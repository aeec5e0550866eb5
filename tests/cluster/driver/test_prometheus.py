"""What a run tells Prometheus: the dashboard asks for exactly what there is, and a real Ray exports it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.launch import Launch
from outlast.cluster.driver.prometheus import COUNTERS, GAUGES
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import losses, resumed, tiny_config
from tests.trainers.tracking.test_follow import scalars

EXPORTED = {f"ray_{name}" for name in GAUGES}
DASHBOARD = Path(__file__).parents[3] / "k8s/grafana-dashboard.json"


def expressions(node: Any) -> Iterator[str]:
    """Every query of a dashboard."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key in ("expr", "query") and isinstance(value, str))
        node = list(node.values())
    for item in node if isinstance(node, list) else []:
        yield from expressions(item)


def test_the_dashboard_asks_for_what_there_is() -> None:
    asked = {name for text in expressions(json.loads(DASHBOARD.read_text())) for name in re.findall(r"ray_\w+", text)}
    assert asked == EXPORTED | {f"ray_{name}_total" for name in COUNTERS}


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.slice
def test_a_real_ray_exports_them(tmp_path: Path, text_file: str) -> None:
    """A run that is killed once, read from the metrics endpoint while it goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = tiny_config("measured", str(tmp_path / "runs"), text_file, steps=600, eval_every=40).model_dump(
        exclude_defaults=True
    )
    body |= {"scale": {"workers": 2}, "failure": {"in_place": False}}
    body["checkpoint"]["every"] = 40
    config = RunConfig.model_validate(body)
    storage = LocalStorage(tmp_path / "runs")
    fault = FaultSpec(FaultPoint.STEP, 100, 1, FaultAction.SIGKILL, str(tmp_path / "fired.json"))
    seen: dict[str, dict[str, float]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                continue
            for name, tags, value in re.findall(r"^(ray_outlast_\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE):
                assert 'run="measured"' in tags
                seen.setdefault(name, {})[tags] = float(value)

    short = tempfile.mkdtemp(prefix="outlast-")  # a socket's path has 107 characters at the most
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _temp_dir=short,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    thread = threading.Thread(target=look)
    thread.start()
    try:
        finished = Launch(config, body, code=str(tmp_path), faults=[fault]).run()
    finally:
        over.set()
        thread.join()
        ray.shutdown()
        shutil.rmtree(short, ignore_errors=True)
    assert finished.outcome is Outcome.DONE
    assert (tmp_path / "fired.json").is_file()
    assert set(seen) == EXPORTED
    newest = {name: max(values.values()) for name, values in seen.items()}
    told = losses(storage, "measured")
    assert 100 < newest["ray_outlast_step"] <= 600
    assert newest["ray_outlast_num_steps"] == 600
    assert newest["ray_outlast_attempt"] == 2
    assert newest["ray_outlast_workers"] == 2
    assert resumed(storage, "measured")[0]["step"] == 80
    assert newest["ray_outlast_checkpoint_step"] % 40 == 0
    assert any(abs(value - loss) < 1e-6 for value in seen["ray_outlast_loss"].values() for loss in told.values())
    assert newest["ray_outlast_checkpoint_time_seconds"] > 1.7e9
    # By default TensorBoard hears all of it too, and the launch leaves its record.
    drawn = scalars(storage.path("measured/trackers/tensorboard"))["train/loss"]
    assert [step for step, _ in drawn] == list(range(1, 601))
    record = json.loads(storage.path(f"measured/launches/{finished.launch}/record.json").read_text())
    assert record["code"]["git"] is None
    assert record["settings"]["scale"]["workers"] == 2
