"""Every error of the table, by the real command: exit code, message, what to do next, and a traceback only if asked."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing import errors
from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.format import manifest
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.liveness import LivenessFile
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import SettingsError
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.cluster.jobs.job_server import JobServerUnavailable
from outlast.trainers.attempt import Assignment
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.loop.non_finite import NonFiniteError
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.cluster.jobs.test_ray_jobs import Cluster
from tests.support.command import Command
from tests.support.groups.worker_group import run_group, tiny_config
from tests.support.s3_server import BUCKET, s3_server

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
NOBODY = 65534
STRANGER = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wrong"}
MINE = """
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput


class Model(nn.Module):
    def __init__(self, vocab_size, width=8):
        super().__init__()
        raise RuntimeError("not today")


class Failing(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, vocab_size)

    def forward(self, input_ids, **_):
        if torch.distributed.is_initialized():
            raise RuntimeError("not this way")
        return CausalLMOutput(logits=self.embed(input_ids))


class Vain(Failing):
    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.embed(input_ids) * float("nan"))


class Hungry(Failing):
    def forward(self, input_ids, **_):
        return self.embed(input_ids) + torch.zeros(2**50)


class Nothing:
    pass


from outlast.trainers import Task as Whole


class Task(Whole):
    pass
"""
BERT = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 32}
FILES: dict[str, str | bytes] = {
    "mine.py": MINE,
    "bytes.yaml": b"name: \xff\n",
    "bad.yaml": "name: a\ndata: [",
    "twice.yaml": "name: a\nseed: 1\nseed: 2\n",
    "list.yaml": "- name: a\n",
    "empty.jsonl": "",
    "short.txt": "a few words",
    "rows.xlsx": "a",
    "broken.jsonl": '{"text": "a"}\n{"text":\n',
    "rows.jsonl": '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 40,
    "one.jsonl": '{"text": "a", "label": "x"}\n' * 40,
    "held.jsonl": '{"text": "a", "label": "z"}\n',
    "long.jsonl": "".join(json.dumps({"text": "word " * 50, "label": label}) + "\n" for label in "xyxyxyxyxyxy"),
}


@pytest.fixture(scope="module")
def folder(text_file: str) -> Iterator[Path]:
    """Run files, data, and runs in all the states that the table speaks of. Everybody may read it."""
    with tempfile.TemporaryDirectory(prefix="outlast-errors-") as name:
        place = Path(name)
        place.chmod(0o755)
        for file, text in FILES.items():
            (place / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        shutil.copy(text_file, place / "text.txt")
        _run_files(place)
        _models(place)
        _runs(place)
        _places(place)
        yield place


def _run_files(place: Path) -> None:
    body = tiny_config("run", "runs", "text.txt", steps=4).model_dump(mode="json", exclude_defaults=True)
    body["train"].pop("eval_every")
    body["checkpoint"]["every"] = 2
    model, shared = body["model"], {"checkpoint": {"storage": "/data/runs"}, "data": {"train": "/data/text.txt"}}
    secret = {"data": {"train": "s3://me:word@bucket/text.txt"}}

    def own(name: str) -> dict[str, Any]:
        settings = {"class": f"mine:{name}", "config": {}, "tokenizer": model["tokenizer"]}
        return {"name": name, "model": settings, "failure": {"max_failures": 0}}

    files: dict[str, dict[str, Any]] = {
        "run": {},
        "told": {"name": "told"},
        "held": {"name": "held"},
        "unknown": {"data": {"train": "text.txt"}, "train": {"stepz": 3}},
        "misplaced": {"lr": 1},
        "shared": shared,
        "long": {**shared, "name": "a" * 60},
        "secret": {**shared, **secret},
        "pretrained": {"model": {"path": "./none"}},
        "classify": {
            "model": {**model, "task": "sequence-classification"},
            "data": {"train": "rows.jsonl", "max_length": 99},
        },
        "bert": {
            "model": {**model, "task": "sequence-classification", "config": BERT},
            "data": {"train": "rows.jsonl"},
        },
        "lost": {"name": "lost"},
        "failing": own("Failing"),
        "hungry": own("Hungry"),
        "vain": own("Vain"),
        "own": {"model": {"class": "mine:Model", "config": {}, "tokenizer": model["tokenizer"]}},
        "lora": {"model": {"path": "./base", "lora": {"target_modules": ["none_such"]}}},
    }
    for name, change in files.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({**body, **change}, sort_keys=False))
    (place / "unknown.yaml").write_text("name: a\ndata: {train: text.txt}\nmodel: {path: a}\ntrain:\n  stepz: 3\n")
    (place / "misplaced.yaml").write_text("name: a\nlr: 3\ndata: {train: text.txt}\nmodel: {path: a}\n")


def _models(place: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    (place / "bare").mkdir()
    (place / "bare" / "notes.txt").write_text("nothing of a model")
    tokenizer = train_bpe(iter((place / "text.txt").read_text().splitlines()[:5]), 300)
    tokenizer.inner.save_pretrained(place / "tokenizer")
    tokenizer.inner.save_pretrained(place / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(place / "base")


def _runs(place: Path) -> None:
    """`told` is a finished run; the others are copies to which something has happened."""
    storage = LocalStorage(place / "runs")
    declared = yaml.safe_load((place / "told.yaml").read_text())
    saving = {"checkpoint": {"every": 2}}
    text = str(place / "text.txt")
    config = tiny_config("told", storage.url, text, sections=saving, steps=4, eval_every=None)
    assert (
        run_group(Assignment(config, declared, "first", prepare(config, storage)), storage, 1)[0].outcome
        is Outcome.DONE
    )
    for name in ("begun", "damaged", "foreign", "lost", "newer", "once"):
        shutil.copytree(storage.path("told"), storage.path(name), symlinks=True)
    for ref in [item.ref for item in read_catalog(storage, "told").accepted]:
        for name in ("damaged", "lost"):
            weights = storage.path(checkpoint_dir(name, ref)) / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        where = f"{checkpoint_dir('newer', ref)}/manifest.json"
        newer = manifest.Manifest.parse(read_bytes(storage, where))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest, "FORMAT", 99)
            storage.path(where).write_bytes(newer.to_json())
    for name in ("begun", "lost", "once"):
        [attempt] = storage.path(f"{name}/attempts").iterdir()
        shutil.rmtree(attempt / "model")
        storage.path(f"{name}/model").unlink(missing_ok=True)
    shutil.rmtree(next(storage.path("once/attempts").iterdir()) / "checkpoint-2")
    claim = next(storage.path("foreign/attempts").iterdir()) / "claim.json"
    forged = json.loads(claim.read_bytes())
    forged["settings"]["model"]["class"] = "mine:Model"
    claim.write_text(json.dumps(forged))
    storage.path("linked").mkdir()
    storage.path("linked/attempts").symlink_to(storage.path("told/attempts"))


def _places(place: Path) -> None:
    for name in ("locked", "open"):
        (place / name).mkdir()
    shutil.copy(place / "rows.jsonl", place / "locked" / "rows.jsonl")
    (place / "locked").chmod(0o700)
    (place / "open").chmod(0o777)
    os.mkfifo(place / "pipe.yaml")
    os.mkfifo(place / "pipe.jsonl")


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    made = Command()
    yield made
    made.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a server that looks at credentials once it has been set up."""
    with s3_server() as url:
        yield url


def _ask_for_credentials(after: str) -> None:
    """Of every request after so many."""
    server = os.environ["AWS_ENDPOINT_URL"]
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{server}/moto-api/reset-auth", data=after.encode(), headers=headers)
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture(scope="module")
def full(folder: Path) -> Iterator[str]:
    """A file system without space."""
    place = folder / "full"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", place]).returncode:
        pytest.skip("a full file system needs root, to mount one")
    try:
        yield str(place)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.shut_down()


@pytest.fixture
def held(folder: Path) -> Iterator[None]:
    """This process is at the run `held`, as a launch is that trains it."""
    launch = LivenessFile(LocalStorage(folder / "runs"), "held/launches/another/alive.json")
    yield
    launch.end(0)


@dataclass(frozen=True, slots=True)
class Case:
    """A line of the page; `kind` is None for what is told without one of the classes."""

    section: str
    what: str
    command: str
    code: int
    kind: type[OutlastError] | None
    says: str
    hint: str


#: What else a line takes for granted, by what is wrong.
OPTIONS: dict[str, dict[str, Any]] = {
    "no run file": {"fresh": True},
    "a hub that cannot be reached": {
        "env": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1"},
        "fresh": True,
    },
    "data without permission": {"user": NOBODY},
    "storage without permission": {"user": NOBODY},
    "… to look at": {"user": NOBODY},
    "… found before a run": {"user": NOBODY},
    "wrong S3 credentials": {"env": STRANGER},
    "… to look into the bucket": {"env": STRANGER},
    "no S3 server": {"env": {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}},
    "… to look at a run there": {"env": {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}},
    "out of memory": {"memory_bytes": 2**20},
    "another release of Ray on the cluster": {"before": "import ray; ray.__version__ = '2.59.0'"},
    "a loss that is not a number": {"again": ["-s", "failure.note=again"]},  # else it is given up
    "no Kubernetes": {"env": {"KUBECONFIG": "/none", "HOME": "/none"}},
}
#: Fixtures by a word of the command.
TAKEN = {
    "held": "held",
    "{full}": "full",
    "{s3}": "s3",
    "{web}": "s3",
    "{ray}": "cluster",
    "{jobs}": "cluster",
    "no-such-bucket": "s3",
}
_KINDS = [*vars(errors).values(), SettingsError, NonFiniteError, RunFailed, JobServerUnavailable]
KINDS = {kind.__name__: kind for kind in _KINDS if isinstance(kind, type)}


def cases() -> Iterator[Case]:
    section = ""
    for line in PAGE.read_text().splitlines():
        section = line[3:] if line.startswith("## ") else section
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 6 and cells[2].isdecimal():
            what, command, code, kind, says, hint = cells
            yield Case(section, what, command.strip("`"), int(code), KINDS.get(kind), says, hint)


CASES = list(cases())
SLOW = "Once Ray is there"


def _parameter(case: Case) -> Any:
    marks = [pytest.mark.ray, pytest.mark.faults] if case.section == SLOW else []  # half a minute each
    return pytest.param(case, id=f"{case.what}: {case.command}", marks=marks)


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_error(case: Case, command: Command, folder: Path, request: pytest.FixtureRequest) -> None:
    options = dict(OPTIONS.get(case.what, {}))
    again = options.pop("again", [])
    if "user" in options and os.geteuid():
        pytest.skip("another user's files need root")
    for word, fixture in TAKEN.items():
        if word in case.command:
            request.getfixturevalue(fixture)
    if "s3" in request.fixturenames or "no-such-bucket" in case.command:
        _ask_for_credentials("0" if "env" in options else "inf")
    ray = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    words = {
        "ray": ray and ray.ray_address,
        "jobs": ray and ray.address,
        "full": folder / "full",
        "open": folder / "open",
        "s3": f"s3://{BUCKET}",
        "web": os.environ.get("AWS_ENDPOINT_URL"),
    }
    text = case.command
    for word, value in words.items():
        text = text.replace(f"{{{word}}}", str(value))
    ways = [shlex.split(text), ["--debug", *shlex.split(text), *again]][: 2 if case.kind else 1]

    def run(way: list[str]) -> subprocess.CompletedProcess[str]:
        return command(*way, cwd=folder, **options)

    with ThreadPoolExecutor(1 if case.section == SLOW else 2) as pool:
        done, *debugged = pool.map(run, ways)
    said = done.stderr + done.stdout
    assert done.returncode == case.code, said
    assert case.says in said, said
    assert "Traceback" not in said
    if case.kind is None:
        assert case.hint in said, said
        return
    message, arrow, hint = f"\n{done.stderr}".rpartition("\noutlast: ")[2].partition("\n  → ")
    assert case.says in message, said
    assert arrow, said
    assert case.hint in hint, said
    assert debugged[0].returncode == case.code
    assert "Traceback (most recent call last)" in debugged[0].stderr
    assert re.search(rf"^ *[\w.]*\b{case.kind.__name__}: ", debugged[0].stderr, re.MULTILINE), debugged[0].stderr


def test_every_line_of_the_page_is_run() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "| what |" not in line]
    assert len(rows) == len(CASES) > 90
    assert set(OPTIONS) <= {case.what for case in CASES}


def test_every_class_is_on_the_page() -> None:
    tree = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OutlastError)}
    assert tree - {case.kind for case in CASES} == {OutlastError}
