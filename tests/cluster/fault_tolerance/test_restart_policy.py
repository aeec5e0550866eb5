"""The rule for giving up, as a launch obeys it: before it starts anything, and on a real Ray whose workers fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from outlast.checkpointing.format.layout import launch_dir
from outlast.checkpointing.run_store.attempt_history import settings_digest
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.launch import Launch
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.cluster.monitoring.status import read_status
from tests.cluster.jobs.test_ray_jobs import BIN
from tests.support.groups.worker_group import tiny_config

#: Fails at its third pass.
BUGGY = """
import torch
from types import SimpleNamespace
from torch import nn

class Buggy(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.num_passes = 0

    def forward(self, input_ids, **_):
        self.num_passes += self.training
        if self.num_passes > 4:  # later than the dry step
            raise ValueError("labels are out of range")
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))
"""


def test_a_launch_obeys_what_others_have_left(tmp_path: Path, text_file: str) -> None:
    """The same settings end at once; any other begin anew, and get as far as to miss the data."""
    storage = LocalStorage(tmp_path)
    body = tiny_config("run", str(tmp_path), str(tmp_path / "gone.txt")).model_dump(mode="json", exclude_defaults=True)
    for number in range(4):
        sign = {"ended": True, "exit_code": 1, "error": "no worker came up", "settings": settings_digest(body)}
        storage.put(f"{launch_dir('run', f'2026010{number}')}/alive.json", [json.dumps(sign).encode()])
    with pytest.raises(RunFailed, match="given up: 4 failures without a new checkpoint") as caught:
        Launch(RunConfig.model_validate(body), body).run()
    assert "4 × launch failed: no worker came up" in caught.value.message
    assert "-s failure.note=" in caught.value.hint
    for more in ({"max_failures": 9}, {"note": "mended the network"}):
        changed = {**body, "failure": more}
        with pytest.raises(Exception, match=r"gone\.txt"):
            Launch(RunConfig.model_validate(changed), changed).run()


@pytest.mark.ray
@pytest.mark.faults  # a minute
@pytest.mark.slice
def test_a_bug_ends_the_run_with_one_message_and_every_later_launch_at_once(tmp_path: Path, text_file: str) -> None:
    (tmp_path / "buggy.py").write_text(BUGGY)
    sections = {"model": {"class": "buggy:Buggy", "config": {}}, "checkpoint": {"every": 100}}
    config = tiny_config("run", str(tmp_path), text_file, sections=sections, batch=4, micro_batch=2, eval_every=100)
    body = config.model_dump(mode="json", exclude_defaults=True)
    body |= {"scale": {"workers": 2}, "failure": {"max_failures": 1}}
    body["data"].pop("eval")
    body["train"].pop("eval_every")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(body))
    command = [str(BIN / "outlast"), "train", str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1, done.stderr
    failures = read_status(RunStore(LocalStorage(tmp_path), "run"))["failures"]
    assert {failure["cause"] for failure in failures} == {"error"}
    assert len([failure for failure in failures if not failure.get("in_place")]) == 2
    assert "labels are out of range" in failures[0]["message"]
    assert "/failure-" in failures[0]["where"]
    given_up = "run run is given up: the same error twice without a step in between"
    assert given_up in done.stderr
    assert done.stderr.count("labels are out of range") <= 4, "one message, not one for each rank and layer"
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert given_up in again.stderr
    assert "2 × error at step 5: ValueError: labels are out of range" in again.stderr
    assert "starting workers" not in again.stderr
