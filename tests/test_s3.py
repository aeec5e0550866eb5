"""A whole run on an object store: killed, damaged, resumed, equal bit for bit to one on a local disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.commands import find, verify_run
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.export import export_directory, read_content
from outlast.checkpointing.faults import Action, Fault, Point
from outlast.checkpointing.keeping import pin, plan_prune, prune, unpin
from outlast.checkpointing.layout import AttemptId, attempt_dir, checkpoint_dir
from outlast.checkpointing.lineage import catalogue, list_pins, run_events
from outlast.checkpointing.objects import ObjectStorage
from outlast.checkpointing.reader import tensor_digests
from outlast.checkpointing.retention import Retention
from outlast.checkpointing.storage import LocalStorage, open_storage, read_bytes, walk
from outlast.checkpointing.uploads import abort_orphans
from outlast.cluster import demo
from outlast.cluster.launch import Launch, ray_session
from outlast.trainers.attempt import Assignment
from outlast.trainers.data import prepare
from outlast.trainers.loop import Outcome
from tests.group import digests, fault, resumed, run_group
from tests.s3 import s3_server
from tests.small import small_model, train_step


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


def test_killed_damaged_and_resumed_on_s3(
    bucket: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUTLAST_CACHE", str(tmp_path / "cache"))
    assert run_group(assign("on-disk"), storage, 2)[0].outcome is Outcome.DONE
    remote = open_storage(f"{bucket}/runs")
    assert isinstance(remote, ObjectStorage)

    def on_s3(*faults: object) -> Assignment:
        here = assign("on-s3", faults=faults)
        checkpoint = here.config.checkpoint.model_copy(update={"storage": remote.url})
        config = here.config.model_copy(update={"checkpoint": checkpoint})
        return replace(here, config=config, prepared=prepare(config, remote))

    strike = fault(Point.WHILE_WRITING, 9, 1, Action.SIGKILL, tmp_path)
    ended = run_group(on_s3(strike), remote, 2, folder=tmp_path)
    assert Path(strike.record).exists()
    assert [end.exit_code for end in ended][1] == -9
    newest = catalogue(remote, "on-s3").accepted[0]
    assert newest.ref.step == 6
    weights = f"{checkpoint_dir('on-s3', newest.ref)}/model.safetensors"
    remote.put(weights, [read_bytes(remote, weights)[:-1]])  # the kind of damage that object stores really see

    assert run_group(on_s3(), remote, 2, folder=tmp_path)[0].outcome is Outcome.DONE
    final = catalogue(remote, "on-s3").accepted[0]
    assert final.ref.step == 10
    assert tensor_digests(remote, checkpoint_dir("on-s3", final.ref), final) == digests(storage, "on-disk")
    assert (tmp_path / "cache/data").is_dir()


def test_pins_prunes_and_exports_on_s3(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(f"{bucket}/kept")
    model, optimizer = small_model()
    checkpointer = Checkpointer(storage, "run", files={"config.json": b"{}"}, retention=Retention(9))
    checkpointer.resume(model, optimizer)
    for step in range(1, 6):
        train_step(model, optimizer, step)
        assert checkpointer.save(step, model, optimizer, {})
    ref = pin(storage, "run", "2", Retention())
    assert list_pins(storage, "run") == {ref}
    export_directory(read_content(find(storage, "run", "2", Retention())), tmp_path / "out")
    prune(storage, "run", plan_prune(storage, "run", Retention(2)))
    assert [item.ref.step for item in catalogue(storage, "run").accepted] == [5, 4, 2]
    assert [verdict.faults for verdict in verify_run(storage, "run")] == [()] * 3
    assert not list(walk(storage, checkpoint_dir("run", replace(ref, step=3))))
    assert plan_prune(storage, "run", Retention(2)).remains == ()
    weights = f"{checkpoint_dir('run', ref)}/model.safetensors"
    assert (tmp_path / "out/model.safetensors").read_bytes() == read_bytes(storage, weights)
    unpin(storage, "run", "2")
    assert list_pins(storage, "run") == set()


_WRITER = """
import sys
from outlast.checkpointing.storage import open_storage

def chunks():
    while True:
        yield bytes(2**20)

open_storage(sys.argv[1]).put(sys.argv[2], chunks())
"""


def test_what_killed_writers_began_to_upload_is_aborted(bucket: str) -> None:
    """By the next attempt of the run, once two commits of its own stand; that of a higher attempt is left alone."""
    client = boto3.client("s3", region_name="us-east-1")

    def uploads() -> set[str]:
        found = client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", [])
        return {item["Key"] for item in found}

    storage = open_storage(f"{bucket}/deep/runs")
    model, optimizer = small_model()
    killed = Checkpointer(storage, "killed", launch="first")
    killed.resume(model, optimizer)
    directory = attempt_dir("killed", killed.attempt)
    higher = attempt_dir("killed", AttemptId(9, "0" * 8))
    began = {f"{directory}/checkpoint-1/a.bin", f"{higher}/checkpoint-1/a.bin", "killed/elsewhere.bin"}
    for path in began:
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, storage.url, path])
        while f"deep/runs/{path}" not in uploads():
            assert writer.poll() is None
            time.sleep(0.05)
        writer.kill()
        writer.wait()
    assert uploads() == {f"deep/runs/{path}" for path in began}

    heir = Checkpointer(storage, "killed", launch="second")
    heir.resume(model, optimizer)
    for step in (1, 2):
        assert uploads() == {f"deep/runs/{path}" for path in began}
        train_step(model, optimizer, step)
        assert heir.save(step, model, optimizer, {})
    assert uploads() == {f"deep/runs/{path}" for path in began if not path.startswith(directory)}
    heir.flush()
    assert abort_orphans(storage, "killed", AttemptId(10, "0" * 8)) == 1
    assert [event["count"] for _, event in run_events(storage, "killed") if event["event"] == "uploads-aborted"] == [1]


def test_credentials_in_the_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="must not carry credentials") as caught:
        open_storage("s3://key:secret@bucket/runs")
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(StorageError, match="NO_SUCH_BUCKET") as caught:
        open_storage("s3://no-such-bucket-here/runs").put("a", [b"1"])
    assert caught.value.permanent
    assert "bucket" in caught.value.hint


@pytest.mark.ray
@pytest.mark.faults
def test_the_demo_on_an_object_store(bucket: str, tmp_path: Path) -> None:
    """A run of the demo's size on two Ray workers: one killed in a save to S3; equal to one on a disk. Two minutes."""
    demo.write_texts(tmp_path / "texts.jsonl")
    record = tmp_path / "kill.json"
    strike = Fault(Point.WHILE_WRITING, demo.KILL_AT, demo.KILLED_RANK, Action.SIGKILL, str(record))
    found = []
    with ray_session():
        for name, url, faults in (("killed", f"{bucket}/demo", [strike]), ("undisturbed", str(tmp_path / "runs"), [])):
            config = demo._config(tmp_path, name)
            config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"storage": url})})
            assert Launch(config, demo._declared(config), faults=faults).run().outcome is Outcome.DONE
            storage = open_storage(url)
            final = catalogue(storage, name).accepted[0]
            assert final.ref.step == demo.NUM_STEPS
            found.append(tensor_digests(storage, checkpoint_dir(name, final.ref), final))
    assert record.exists(), "the fault did not fire"
    assert found[0] == found[1]
    assert len(resumed(open_storage(f"{bucket}/demo"), "killed")) == 1  # type: ignore[arg-type]
