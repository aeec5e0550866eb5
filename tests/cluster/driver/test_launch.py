"""`outlast train` on a real Ray: signals, a driver killed, two drivers on one run. 25 to 60 s each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import digests, losses, run_group, tiny_config

pytestmark = pytest.mark.ray
OUTLAST = str(Path(sys.executable).with_name("outlast"))
NUM_STEPS = 400
LONG = 1000  # so that a second driver has time to start while the first is at work
RARELY = {"checkpoint": {"every": 200}}  # how often a run is saved or evaluated changes nothing in what it ends with


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> dict[str, str]:
    """The digests of the same run on plain gloo processes, undisturbed."""
    undisturbed = assign("reference", steps=NUM_STEPS, eval_every=200, sections=RARELY)
    assert run_group(undisturbed, storage, 2)[0].outcome is Outcome.DONE
    return digests(storage, "reference")


@pytest.fixture
def run_file(tmp_path: Path, text_file: str) -> Path:
    """The run file of a tiny run on two workers; its storage is `tmp_path`."""
    config = tiny_config("run", str(tmp_path), text_file, steps=NUM_STEPS, eval_every=20)
    body = config.model_dump(mode="json", exclude_defaults=True)
    body["scale"] = {"workers": 2}
    body["checkpoint"]["every"] = 20
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


@pytest.fixture
def start(run_file: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `outlast train` as a user would; what is left at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*options: str) -> subprocess.Popen[str]:
        command = [OUTLAST, "train", str(run_file), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_commit(storage: LocalStorage, after: int, process: subprocess.Popen[str]) -> int:
    """Waits until the run has an accepted checkpoint later than step `after`."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        accepted = read_catalog(storage, "run").accepted
        if accepted and accepted[0].ref.step > after:
            return accepted[0].ref.step
        time.sleep(0.05)
    raise AssertionError("no commit within 90 s")


@pytest.mark.faults  # two minutes
@pytest.mark.slice
def test_signals_commit_first_and_the_same_command_goes_on(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, reference: dict[str, str]
) -> None:
    storage, step = LocalStorage(tmp_path), 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = start()
        committed = wait_for_commit(storage, step, process)
        process.send_signal(signum)
        code, _, err = ended(process)
        assert code == 75, err
        step = read_catalog(storage, "run").accepted[0].ref.step
        assert f"stopped; the newest checkpoint is of step {step}; to resume" in err
        assert step >= committed
    code, out, err = ended(start())
    assert code == 0, err
    assert Path(out.strip(), "model.safetensors").is_file()
    assert (tmp_path / "run/model/config.json").is_file()
    assert digests(storage, "run") == reference
    assert sorted(losses(storage, "run")) == list(range(1, NUM_STEPS + 1))

    before = sorted(path for path in (tmp_path / "run/attempts").rglob("*"))
    code, again, _ = ended(start())
    assert (code, again) == (0, out)
    assert sorted(path for path in (tmp_path / "run/attempts").rglob("*")) == before


@pytest.mark.faults  # a minute
def test_a_killed_driver_is_followed_by_the_next(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, reference: dict[str, str]
) -> None:
    storage = LocalStorage(tmp_path)
    process = start()
    wait_for_commit(storage, 0, process)
    process.kill()
    process.communicate()
    code, _, err = ended(start())
    assert code == 0, err
    assert "resumed from" in err
    assert digests(storage, "run") == reference


@pytest.mark.faults  # four minutes
@pytest.mark.timeout(500)
def test_two_drivers_one_goes_on(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
) -> None:
    """The second leaves a run alone that is at work; told to take over, it does, and the first ends with 75."""
    undisturbed = assign("long", steps=LONG, eval_every=200, sections=RARELY)
    assert run_group(undisturbed, storage, 2, limit_s=240)[0].outcome is Outcome.DONE
    place, longer = LocalStorage(tmp_path), ("-s", f"train.steps={LONG}", "-s", "train.eval_every=4")
    first = start(*longer)
    wait_for_commit(place, 0, first)
    polite, second = start(*longer), start(*longer, "--take-over")
    code, _, err = ended(polite)
    assert code == 75
    assert "is active on this run" in err
    assert "--take-over" in err
    (code, _, err), (code_2, _, err_2) = ended(first), ended(second)
    assert (code, code_2) == (75, 0), (err, err_2)
    assert digests(place, "run") == digests(storage, "long")
    attempts = [
        attempt for attempt, event in run_events(RunStore(place, "run")) if event["event"] in ("start", "resume")
    ]
    launches = [read_claim(RunStore(place, "run"), attempt)["launch"] for attempt in attempts]
    assert len(launches) == len(set(launches)) == 2, "the launches took over from each other in turn"


@pytest.mark.faults  # forty seconds
def test_a_setting_that_changes_the_mathematics_is_refused_at_once(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The driver finds out, before it starts anything and leaves anything behind."""
    storage = LocalStorage(tmp_path)
    process = start()
    step = wait_for_commit(storage, 0, process)
    process.terminate()
    assert ended(process)[0] == 75
    code, _, err = ended(start("-s", "train.lr=0.5"))
    assert code == 2
    assert "train.lr was 0.001, is 0.5" in err
    assert "name:" in err
    assert read_catalog(storage, "run").accepted[0].ref.step >= step
    assert len(list((tmp_path / "run/attempts").iterdir())) == 1


@pytest.mark.faults  # half a minute
@pytest.mark.slice
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_starts_ends_it_at_once(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, signum: signal.Signals
) -> None:
    process = start()
    assert process.stderr is not None
    while "starting workers" not in (line := process.stderr.readline()):
        assert line, process.communicate()
    process.send_signal(signum)
    code, out, err = ended(process)
    assert (code, out) == (130, ""), err
    assert "stop requested; ending before the first step" in err
    assert "interrupted; nothing is saved" in err
    assert "commit" not in err
    assert read_status(RunStore(LocalStorage(tmp_path), "run"))["state"] == "stopped"


@pytest.mark.faults  # half a minute
def test_a_second_signal_quits_at_once(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Even while the main thread waits for Ray to start; the launch counts as stopped, not as lost."""
    process = start()
    assert process.stderr is not None
    for awaited in ("starting workers", "stop requested"):
        while awaited not in (line := process.stderr.readline()):
            assert line, process.communicate()
        process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, "")
    assert err.startswith("run: quit immediately; nothing is saved; to resume: outlast train ")
    assert read_status(RunStore(LocalStorage(tmp_path), "run"))["state"] == "stopped"


@pytest.mark.faults  # forty seconds
def test_a_bug_in_the_users_code_is_shown_once_and_tried_twice(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(
        "from outlast.trainers.tasks.causal_lm import CausalLM\n\n\nclass Late(CausalLM):\n    calls = 0\n\n"
        "    def loss(self, *given):\n        Late.calls += 1\n        if Late.calls > 20:\n"
        '            raise KeyError("labels")\n        return super().loss(*given)\n'
    )
    code, _, err = ended(start("-s", "model.task=late:Late", "-s", "train.eval_every=null"))
    assert code == 1, err
    assert err.count('raise KeyError("labels")') == 1
    assert err.count("; restarting (") == 1
    assert "the same error twice without a step in between" in err
    assert err.count("late.py, line 10") == 3
    assert "Traceback" not in err
    logs = sorted((tmp_path / "run/launches").glob("*/failure-*.log"))
    assert len(logs) == len(list((tmp_path / "run/attempts").iterdir())) == 2
    assert str(logs[0]) in err
    assert "Traceback" in logs[0].read_text()


@pytest.mark.faults
def test_demo(tmp_path: Path) -> None:
    """The README's first command: one worker killed for real in the middle of a save, and the same bits in the end."""
    findings_file = tmp_path / "findings.json"
    command = [OUTLAST, "demo", "--dir", str(tmp_path / "demo"), "--json", str(findings_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    findings = json.loads(findings_file.read_text())
    assert findings["equal"] == {"weights": True, "optimizer": True, "losses": True}
    assert findings["kills"] == 1
    assert findings["lost_steps"] == 10
    assert findings["recovery_s"] > 0
    assert set(findings["parts_s"]) >= {"killed run", "undisturbed run"}
    assert findings["eval_loss_loaded"] == pytest.approx(findings["eval_loss"]["100"], rel=1e-6)
    assert Path(findings["model"], "model.safetensors").is_file()
    assert (Path(findings["run"]) / "attempts").is_dir()
    assert "by SIGKILL, while writing checkpoint-50" in done.stderr
    claims = [json.loads(path.read_text()) for path in Path(findings["run"]).glob("attempts/*/claim.json")]
    assert len(claims) == 2
    found = read_status(RunStore(LocalStorage(Path(findings["run"]).parent), "killed"))
    wall_s, ledger = findings["parts_s"]["killed run"], found["ledger"]  # measured around the launch
    assert sum(ledger.values()) == pytest.approx(wall_s, rel=0.01)
    assert {name for name, seconds in ledger.items() if seconds > 0} == set(ledger) - {"idle"}
    assert found["lost_steps"] == 10
    assert [item["cause"] for item in found["interruptions"]] == ["worker died"]
