"""`outlast drill` on real Ray: runs resume exactly, and every difference is detected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import read_record, write_record
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.drills.comparison import DifferenceCause, FinalState, FirstDifference, differences, explain
from outlast.cluster.drills.drill import DrillResult, FaultKind, parse_faults
from tests.support.groups.worker_group import tiny_config
from tests.support.s3_server import s3_server

STATE = FinalState({"w": "1"}, {"w/exp_avg": "2"}, {1: {0.5}, 2: {0.25}})


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (STATE, []),
        (replace(STATE, weights={"w": "3"}), ["w"]),
        (replace(STATE, weights={}), ["w"]),
        (replace(STATE, optimizer={"w/exp_avg": "2", "x": "1"}), ["x"]),
        (replace(STATE, losses={1: {0.5}, 2: {0.25, 0.26}}), ["loss of step 2"]),  # repeated, with another loss
        (replace(STATE, losses={1: {0.5}}), ["loss of step 2"]),
    ],
)
def test_every_difference_is_detected(other: FinalState, names: list[str]) -> None:
    assert differences(other, STATE) == differences(STATE, other) == names


def test_an_unknown_fault_is_refused() -> None:
    assert parse_faults(None) == tuple(FaultKind)
    assert parse_faults(["stop", "kill"]) == (FaultKind.STOP, FaultKind.KILL)
    with pytest.raises(ConfigError, match="unknown fault 'flood'") as caught:
        parse_faults(["flood"])
    assert "kill-in-save" in caught.value.hint


def test_a_restart_from_the_beginning_proves_no_resume() -> None:
    result = DrillResult("kill", {"t": 1.0}, resumed_from=4, seconds=2.0)
    assert result.is_good
    assert "resumed from step 4" in str(result)
    result = replace(result, resumed_from=0)
    assert not result.is_good
    assert "no checkpoint was committed before the fault" in str(result)
    result = replace(result, resumed_from=4, different=["a", "b", "loss of step 5"])
    assert not result.is_good
    assert "2 tensors and the losses of 1 step; first a" in str(result)
    first = FirstDifference(5, (2.5, 2.75), 6, "w", 1e-9, before_fault=False)
    shown = str(replace(result, first=first))
    assert shown.endswith("first loss of step 5 (2.75, undisturbed 2.5), w (by up to 1e-09) in checkpoint 6")


def test_settings_that_promise_no_equal_bits_are_named(text_file: str) -> None:
    config = tiny_config("mine", "runs", text_file)
    assert "deterministic: false" not in explain(DifferenceCause.RESUME, config, None)
    config = tiny_config("mine", "runs", text_file, sections={"deterministic": False, "exactness": "fast"})
    text = explain(DifferenceCause.NOT_DETERMINISTIC, config, [])
    assert "`deterministic: false` allows" in text
    assert "`exactness: fast` does not fix" in text


def test_a_record_is_written_once_on_any_storage(tmp_path: Path) -> None:
    with s3_server() as bucket:
        for record in (str(tmp_path / "drill.json"), f"{bucket}/runs/drill.json"):
            assert read_record(record) is None
            assert write_record(record, {"step": 7})
            assert not write_record(record, {"step": 8})
            found = read_record(record)
            assert found is not None
            assert (found["step"], found["pid"]) == (7, os.getpid())


@pytest.mark.ray
@pytest.mark.timeout(500)
@pytest.mark.faults  # four minutes
def test_a_drill_of_ones_own_run(tmp_path: Path, text_file: str) -> None:
    body = tiny_config("mine", "runs", text_file).model_dump(mode="json", exclude_defaults=True)
    body["scale"] = {"workers": 2}
    body["checkpoint"]["keep_last"] = 3
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    command = [str(Path(sys.executable).with_name("outlast")), "drill", "run.yaml", "--json"]
    kinds = ("kill-in-save", "damage", "driver")
    for kind in kinds:
        command += ["--fault", kind]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=480)
    assert ended.returncode == 0, ended.stderr
    found = {item["kind"]: item for item in json.loads(ended.stdout)}
    assert tuple(found) == kinds
    assert all(item["fault"] and item["seconds"] > 0 and not item["different"] for item in found.values())
    assert found["kill-in-save"]["fault"]["action"] == "sigkill"
    assert found["kill-in-save"]["resumed_from"] == 3
    # It stopped with a commit of its current step, which is damaged; the commit before is of an earlier step.
    assert 3 <= found["damage"]["resumed_from"] <= 6
    assert found["damage"]["redone"] > 0
    assert "This run resumes exactly" in ended.stderr
    left = [entry.name for entry in LocalStorage(tmp_path / "runs").list("")]
    assert left == [".data"], "the copies are deleted"
