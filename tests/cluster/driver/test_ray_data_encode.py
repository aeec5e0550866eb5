"""Preparation on a real Ray Data makes what one process makes, byte by byte, whatever dies. 10 to 40 s each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver import ray_data_encode as preparation
from outlast.cluster.driver.ray_data_encode import encode_on_ray
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.trainers.preparation.encode import Encoder
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.user_code import make_importable
from tests.support.groups.worker_group import tiny_config
from tests.trainers.preparation.test_prepare_faults import contents, wait_until

pytestmark = pytest.mark.ray
NUM_ROWS, PER_FILE = 6000, 2000  # 3.4 MB: several pieces

#: A task that does something, once, when it meets a certain row.
TASK = """
    import os, signal, time
    from pathlib import Path
    from outlast.trainers.tasks.causal_lm import CausalLM

    class Eventful(CausalLM):
        def encode(self, records):
            event = {name: Path(path) for name, path in self.settings.options.items()}
            if any(record["text"].startswith("Row 3000,") for record in records) and not event["reached"].exists():
                event["reached"].touch()
                if "released" not in event:
                    os.kill(os.getpid(), signal.SIGKILL)
                while not event["released"].exists():
                    time.sleep(0.01)
            return super().encode(records)
"""
DRIVER = """
    import sys
    from functools import partial
    from outlast.checkpointing.storage.factory import open_storage
    from outlast.cluster.config.run_config import RunConfig
    from outlast.cluster.driver.launch import Launch
    from outlast.trainers.user_code import make_importable
    from outlast.trainers.preparation.prepare import prepare

    config, code = RunConfig.model_validate_json(sys.argv[1]), sys.argv[2]
    make_importable(code)
    launch = Launch(config, {}, code=code)
    print(prepare(config, launch.storage, partial(launch._encoders, None)).fingerprint, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files, each read by a task of its own; every row of the first and the second can be used."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in range(3):
        rows = range(file * PER_FILE, (file + 1) * PER_FILE)
        texts = [f"Row {number}, " + f"with the words {number % 7} and more words " * 20 for number in rows]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"part-{file}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "PART_BYTES", 2**20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> str:
    """A directory with one, so that no pass over the rows comes before that in which they are encoded."""
    folder = tmp_path_factory.mktemp("tokenizer")
    prepared = prepare(tiny_config("run", str(folder), text_file), LocalStorage(folder))
    prepared.tokenizer(LocalStorage(folder)).inner.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


@pytest.fixture
def config_of(source: Path, tokenizer: str) -> Callable[..., RunConfig]:
    """`config_of(storage, task, **data)`"""

    def make(storage: Path, task: str = "causal-lm", **data: Any) -> RunConfig:
        data = {"eval": "5%", "max_length": 64, "prepare": "cluster", **data}
        model = {"task": task, "tokenizer": {"path": tokenizer}}
        config = tiny_config("run", str(storage), str(source), sections={"data": data, "model": model})
        return RunConfig.model_validate(config.model_dump(exclude_unset=True))

    return make


@contextmanager
def on_ray(code: str = "") -> Iterator[Encoder]:
    yield partial(encode_on_ray, code=code)


def said(config: RunConfig, cluster: Any) -> tuple[type, str, str]:
    """The error with which preparation ends."""
    with pytest.raises(OutlastError) as caught:
        prepare(config, LocalStorage(Path(config.checkpoint.storage)), cluster)
    return type(caught.value), caught.value.message, caught.value.hint


def spoil(source: Path, *numbers: int) -> None:
    """Rows of the last file that are none."""
    path = source / "part-2.jsonl"
    lines = path.read_text().splitlines()
    for number in numbers:
        lines[number - 1] = "{"
    path.write_text("\n".join(lines) + "\n")


def write_task(folder: Path) -> str:
    folder.mkdir()
    (folder / "eventful.py").write_text(textwrap.dedent(TASK))
    make_importable(str(folder))
    return str(folder)


@pytest.mark.usefixtures("_ray")
@pytest.mark.faults  # a minute each
@pytest.mark.parametrize("is_share", [pytest.param(True, marks=pytest.mark.slice), False], ids=["share", "file"])
def test_the_bytes_of_one_process_though_a_worker_is_killed(
    is_share: bool, config_of: Callable[..., RunConfig], source: Path, tmp_path: Path
) -> None:
    """Ray does its task again; the task's code comes from a directory of the user's."""
    spoil(source, 7, 1500)
    code, options = write_task(tmp_path / "code"), {"reached": str(tmp_path / "reached")}
    data = {"eval": "5%" if is_share else str(source / "part-1.jsonl"), "max_bad_rows": 4, "options": options}
    made = {}
    for name, cluster in {"ray": partial(on_ray, code), "here": None}.items():
        config = config_of(tmp_path / name, "eventful:Eventful", **data)
        made[name] = prepare(config, LocalStorage(tmp_path / name), cluster)
        assert Path(options["reached"]).exists(), "nobody was killed"
    assert made["ray"] == made["here"]
    assert made["ray"].num_bad_rows == 2
    assert sum(made["ray"].num_rows.values()) == NUM_ROWS - 2 + (0 if is_share else PER_FILE)
    assert contents(tmp_path / "ray", made["ray"]) == contents(tmp_path / "here", made["here"])


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize(
    ("spoilt", "limit", "expected"),
    [
        pytest.param([5], 0, "part-2.jsonl, row 5: cannot be read", marks=pytest.mark.faults),
        pytest.param([5, 1900, 1990, 1991], 1, "more than 1 rows", marks=pytest.mark.faults),
        pytest.param([1995], 9, "part-3.jsonl.gz cannot be read as .jsonl", marks=pytest.mark.faults),
    ],
    ids=["a row", "too many rows", "a file"],
)
def test_the_same_errors_as_in_one_process(
    spoilt: list[int], limit: int, expected: str, config_of: Callable[..., RunConfig], source: Path, tmp_path: Path
) -> None:
    """Told in the order of the rows, though the last file is read by another task at the same time."""
    spoil(source, *spoilt)
    (source / "part-3.jsonl.gz").write_bytes(b"is none")
    config = config_of(tmp_path / "runs", max_bad_rows=limit)
    told = said(config, on_ray)
    assert expected in told[1]
    assert told == said(config, None)
    assert not list((tmp_path / "runs").rglob("data.json"))


@pytest.mark.faults
@pytest.mark.usefixtures("_ray")
def test_an_error_of_the_users_code_is_told(config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs", "eventful:Eventful", options={"reached": 5})
    code = write_task(tmp_path / "code")
    kind, message, hint = said(config, partial(on_ray, code))
    assert kind is RunFailed
    assert message.startswith("preparing the data on Ray failed: TypeError: ")
    assert "data.prepare=here" in hint


@pytest.mark.faults
def test_the_driver_killed_in_the_middle_then_again(config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    """What it leaves does not count, and the second one makes the bytes of a single process."""
    code = write_task(tmp_path / "code")
    options = {name: str(tmp_path / name) for name in ("reached", "released")}
    config = config_of(tmp_path / "ray", "eventful:Eventful", options=options)
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), config.model_dump_json(exclude_unset=True), code]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: Path(options["reached"]).exists())
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    Path(options["released"]).touch()
    assert not list((tmp_path / "ray").rglob("data.json"))
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    here = config_of(tmp_path / "here", "eventful:Eventful", options=options)
    made = prepare(here, LocalStorage(tmp_path / "here"))
    assert again.stderr.splitlines()[-1] == made.fingerprint
    assert contents(tmp_path / "ray", made) == contents(tmp_path / "here", made)
