"""Workers that wait with their imports done: what they rehearse, and on a real Ray that a restart takes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray.train
import yaml
from ray.train.torch import TorchTrainer

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.ray_train import Trainer
from outlast.cluster.driver.warm_standby import worker_environment
from tests.support.groups.worker_group import losses, tiny_config

OUTLAST = str(Path(sys.executable).with_name("outlast"))


def test_a_rehearsal_imports_what_a_model_needs_and_changes_nothing_else() -> None:
    """In a process of its own, because this one has imported it all."""
    code = (
        "import random, sys, numpy, torch\n"
        "state = lambda: (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),\n"
        "    torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())\n"
        "before = state()\n"
        "from outlast.trainers.prewarm import prewarm\n"
        "prewarm('causal-lm', 'gpt2')\n"
        "assert state() == before\n"
        "print({'torch._dynamo', 'transformers.models.gpt2.modeling_gpt2'} - sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize(
    ("task", "model_type"), [("causal-lm", "mine"), ("causal-lm", None), ("double-heads", "llama")]
)
def test_what_cannot_be_rehearsed_is_left_to_the_attempt(
    task: str, model_type: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlast.cluster.driver.worker import warm

    config = tiny_config("run", "/runs", "/data.txt", sections={"model": {"task": task}})
    settings = RunConfig.model_validate(config.model_dump())
    assert settings.model.config is not None
    settings.model.config["model_type"] = model_type
    for name, value in worker_environment(settings).items():
        monkeypatch.setenv(name, value)
    warm()


@pytest.mark.parametrize("standby_after_s", [None, 5.0])
def test_sets_have_one_order_in_all_workers(standby_after_s: float | None) -> None:
    settings = RunConfig.model_validate(tiny_config("run", "/runs", "/data.txt").model_dump())
    failure = settings.failure.model_copy(update={"standby_after_s": standby_after_s})
    environment = {**os.environ, **worker_environment(settings.model_copy(update={"failure": failure}))}
    code = "print(list({f'layer{number}' for number in range(20)}))"
    orders = {subprocess.check_output([sys.executable, "-c", code], env=environment) for _ in range(3)}
    assert len(orders) == 1


def test_an_attempt_starts_no_actor_for_datasets() -> None:
    """Of Ray's own parts that one is left out, and no other."""
    size = ray.train.ScalingConfig(num_workers=1)
    names = [
        [type(part).__name__ for part in trainer(print, scaling_config=size)._create_default_callbacks()]
        for trainer in (Trainer, TorchTrainer)
    ]
    assert names[0] == [name for name in names[1] if name != "DatasetsCallback"]
    assert len(names[0]) == len(names[1]) - 1


def test_a_rehearsal_that_fails_keeps_no_worker_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    from outlast.cluster.driver import warm_standby as standby
    from outlast.cluster.driver import worker
    from outlast.trainers import prewarm as rehearsal

    def fail(task: str, model_type: str | None) -> None:
        raise KeyError(model_type)

    monkeypatch.setattr(rehearsal, "prewarm", fail)
    monkeypatch.setenv(standby.PREWARM_VARIABLE, '["causal-lm", "gpt2"]')
    worker.warm()


@pytest.mark.ray
@pytest.mark.faults  # a minute
def test_a_restart_takes_the_workers_that_wait(tmp_path: Path, text_file: str) -> None:
    body = tiny_config("run", str(tmp_path), text_file, steps=10_000).model_dump(mode="json", exclude_defaults=True)
    body |= {"scale": {"workers": 2}, "failure": {"standby_after_s": 0}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    driver = subprocess.Popen([OUTLAST, "train", str(tmp_path / "run.yaml")], stderr=subprocess.PIPE, text=True)
    try:
        [first] = ways(tmp_path, 1, driver)
        wait_for_waiting(driver.pid, 2)
        killed_at = time.time()
        store = RunStore(LocalStorage(tmp_path), "run")
        claim = read_claim(store, list_attempts(store)[-1])
        os.kill(claim["workers"][1]["pid"], signal.SIGKILL)
        again = ways(tmp_path, 2, driver)[1]
    finally:
        driver.kill()
        driver.communicate()
    assert list(again) == ["process", "imports", "actor", "group", "claim", "model", "data", "restore", "first_step"]
    assert list(again.values())[2:] == sorted(again.values())[2:]
    assert first["first_step"] < again["process"] < killed_at < again["actor"]
    assert losses(LocalStorage(tmp_path), "run")  # the steps done again had the losses that they had before


def ways(folder: Path, count: int, driver: subprocess.Popen[str]) -> list[dict[str, float]]:
    """The marks of the first `count` attempts, once they are under way."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()
        found = [e["marks"] for _, e in run_events(RunStore(LocalStorage(folder), "run")) if e["event"] == "under-way"]
        if len(found) >= count:
            return found[:count]
        time.sleep(0.2)
    raise AssertionError(f"{count} attempts were not under way within 200 s")


def wait_for_waiting(driver: int, count: int) -> None:
    """Waits until the driver's raylet has so many idle workers that are at their imports or done with them."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if sum(is_waiting(process, driver) for process in Path("/proc").glob("[0-9]*")) == count:
            return
        time.sleep(0.2)
    raise AssertionError(f"{count} workers did not wait within 200 s")


def is_waiting(process: Path, driver: int) -> bool:
    with suppress(OSError, IndexError):
        raylet = process.parent / stat(process)[1]
        is_idle = process.joinpath("cmdline").read_bytes().startswith(b"ray::IDLE")
        return is_idle and stat(raylet)[1] == str(driver) and "libtorch" in process.joinpath("maps").read_text()
    return False


def stat(process: Path) -> list[str]:
    """State, parent and so on."""
    return process.joinpath("stat").read_text().rsplit(")", 1)[1].split()
