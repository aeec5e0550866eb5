"""A whole run on an object store: killed, damaged, resumed, equal bit for bit to one on a local disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec
from outlast.checkpointing.format.layout import AttemptId, attempt_dir, checkpoint_dir
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.deletion import list_pins
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.commit import abort_orphans
from outlast.checkpointing.storage.base import Storage, read_bytes, walk
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.object_store import ObjectStorage
from outlast.checkpointing.storage.orphaned_uploads import _client, abort_uploads
from outlast.checkpointing.tools.export import export_directory, read_content
from outlast.checkpointing.tools.pin_and_prune import pin, plan_prune, prune, unpin
from outlast.checkpointing.tools.query import resolve_checkpoint, verify_run
from outlast.cluster.drills import demo
from outlast.cluster.driver.launch import Launch
from outlast.cluster.driver.ray_session import ray_session
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import _find, prepare
from tests.support.groups.worker_group import digests, fault, resumed, run_group, tiny_config
from tests.support.s3_server import s3_server
from tests.support.small_model import small_model, train_step


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

    strike = fault(FaultPoint.WHILE_WRITING, 9, 1, FaultAction.SIGKILL, tmp_path)
    ended = run_group(on_s3(strike), remote, 2, folder=tmp_path)
    assert Path(strike.record).exists()
    assert [end.exit_code for end in ended][1] == -9
    newest = read_catalog(remote, "on-s3").accepted[0]
    assert newest.ref.step == 6
    weights = f"{checkpoint_dir('on-s3', newest.ref)}/model.safetensors"
    remote.put(weights, [read_bytes(remote, weights)[:-1]])  # the kind of damage that object stores really see

    assert run_group(on_s3(), remote, 2, folder=tmp_path)[0].outcome is Outcome.DONE
    final = read_catalog(remote, "on-s3").accepted[0]
    assert final.ref.step == 10
    assert tensor_digests(remote, checkpoint_dir("on-s3", final.ref), final) == digests(storage, "on-disk")
    assert (tmp_path / "cache/data").is_dir()


def test_a_profile_that_is_not_there_aborts_no_attempt(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 wants it before anything else; pyarrow, which writes the checkpoints, goes by the keys."""
    storage = open_storage(f"{bucket}/no-profile")
    monkeypatch.setenv("AWS_PROFILE", "of-nobody")
    _client.cache_clear()
    with pytest.raises(StorageError, match="of-nobody"):
        abort_uploads(storage, "run")


def test_pins_prunes_and_exports_on_s3(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(f"{bucket}/kept")
    model, optimizer = small_model()
    checkpointer = Checkpointer(storage, "run", files={"config.json": b"{}"}, retention=Retention(9))
    checkpointer.resume(model, optimizer)
    for step in range(1, 6):
        train_step(model, optimizer, step)
        assert checkpointer.save(step, model, optimizer, {})
    ref = pin(RunStore(storage, "run"), "2", Retention())
    assert list_pins(RunStore(storage, "run")) == {ref}
    export_directory(read_content(resolve_checkpoint(RunStore(storage, "run"), "2", Retention())), tmp_path / "out")
    prune(RunStore(storage, "run"), plan_prune(RunStore(storage, "run"), Retention(2)))
    assert [item.ref.step for item in read_catalog(storage, "run").accepted] == [5, 4, 2]
    assert [verdict.faults for verdict in verify_run(RunStore(storage, "run"))] == [()] * 3
    assert not list(walk(storage, checkpoint_dir("run", replace(ref, step=3))))
    assert plan_prune(RunStore(storage, "run"), Retention(2)).remains == ()
    weights = f"{checkpoint_dir('run', ref)}/model.safetensors"
    assert (tmp_path / "out/model.safetensors").read_bytes() == read_bytes(storage, weights)
    unpin(RunStore(storage, "run"), "2")
    assert list_pins(RunStore(storage, "run")) == set()


_WRITER = """
import sys
from outlast.checkpointing.storage.factory import open_storage

def chunks():
    while True:
        yield bytes(2**20)

open_storage(sys.argv[1]).put(sys.argv[2], chunks())
"""


@pytest.fixture
def uploads(bucket: str) -> Callable[[], set[str]]:
    """Calling it gives the keys of all unfinished uploads."""
    client = boto3.client("s3", region_name="us-east-1")

    def keys() -> set[str]:
        found = client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", [])
        return {item["Key"] for item in found}

    return keys


@pytest.fixture
def die_writing(bucket: str, uploads: Callable[[], set[str]]) -> Callable[[Storage, str], str]:
    """`die_writing(storage, path)`: a process is killed in a large put. Returns the key of its upload."""

    def make(storage: Storage, path: str) -> str:
        key = f"{storage.url.removeprefix(f'{bucket}/')}/{path}"
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, storage.url, path])
        while key not in uploads():
            assert writer.poll() is None
            time.sleep(0.05)
        writer.kill()
        writer.wait()
        return key

    return make


def test_what_killed_writers_began_to_upload_is_aborted(
    bucket: str, uploads: Callable[[], set[str]], die_writing: Callable[[Storage, str], str]
) -> None:
    """By the next attempt of the run, once two commits of its own stand; that of a higher attempt is left alone."""
    storage = open_storage(f"{bucket}/deep/runs")
    model, optimizer = small_model()
    killed = Checkpointer(storage, "killed", launch="first")
    killed.resume(model, optimizer)
    directory = attempt_dir("killed", killed.attempt)
    higher = attempt_dir("killed", AttemptId(9, "0" * 8))
    orphan = die_writing(storage, f"{directory}/checkpoint-1/a.bin")
    others = {die_writing(storage, path) for path in (f"{higher}/checkpoint-1/a.bin", "killed/elsewhere.bin")}

    heir = Checkpointer(storage, "killed", launch="second")
    heir.resume(model, optimizer)
    for step in (1, 2):
        assert uploads() == {orphan, *others}
        train_step(model, optimizer, step)
        assert heir.save(step, model, optimizer, {})
    assert uploads() == others
    heir.flush()
    assert abort_orphans(RunStore(storage, "killed"), AttemptId(10, "0" * 8)) == 1
    assert [
        event["count"] for _, event in run_events(RunStore(storage, "killed")) if event["event"] == "uploads-aborted"
    ] == [1]
    assert abort_uploads(storage, "killed") == 1


def test_what_killed_preparers_began_to_upload_is_aborted(
    bucket: str,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    uploads: Callable[[], set[str]],
    die_writing: Callable[[Storage, str], str],
) -> None:
    """By whoever makes the data, or finds it made; that of other data is left alone."""
    here = assign("prepared")
    directory = here.prepared.directory
    remote = open_storage(f"{bucket}/prepared")
    other = die_writing(remote, ".data/other/train.arrow")
    for path in (f"{directory}/train.arrow", f"{directory}/tokenizer/tokenizer.json"):
        orphan = die_writing(remote, path)
        assert uploads() == {orphan, other}
        assert prepare(here.config, remote) == here.prepared
        assert uploads() == {other}
    assert abort_uploads(remote, ".data") == 1


_STOPPING = """
import os, signal, sys
from outlast.checkpointing.storage import object_store as objects
from outlast.checkpointing.storage.factory import open_storage
from outlast.trainers.preparation import prepare as data
from outlast.trainers.config.training_config import TrainingConfig

def stopping(chunks):
    for number, chunk in enumerate(chunks):
        if number == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield chunk

objects._WINDOW_BYTES = 2**20  # so that it hears of the failure while it writes, as a larger upload would
objects._SDK_ATTEMPTS = 1  # the server's answer is not S3's "no such upload" but one that the SDK tries again
write_file = data.write_file
data.write_file = lambda storage, directory, name, chunks: write_file(storage, directory, name, stopping(chunks))
config = TrainingConfig.model_validate_json(sys.argv[1])
print(data.prepare(config, open_storage(config.checkpoint.storage)).fingerprint)
"""


@pytest.mark.faults  # eleven seconds
def test_a_slower_preparer_whose_upload_is_aborted_takes_what_is_there(
    bucket: str, tmp_path: Path, uploads: Callable[[], set[str]]
) -> None:
    """It is stopped in the middle of its upload, and goes on when the other has made the data and aborted it."""
    rows = tmp_path / "rows.txt"
    rows.write_text("".join(f"row number {number} of a few\n" for number in range(11)))
    sections = {"model": {"task": "tests.support.tasks.large_samples:Bulky"}, "data": {"eval": None}}
    config = tiny_config("slower", f"{bucket}/slower", str(rows), sections=sections, eval_every=None)
    slower = subprocess.Popen(
        [sys.executable, "-c", _STOPPING, config.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    _, status = os.waitpid(slower.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    [key] = uploads()
    assert key.endswith("/train.arrow")

    storage = open_storage(f"{bucket}/slower")
    made = prepare(config, storage)
    assert uploads() == set()
    slower.send_signal(signal.SIGCONT)
    said, _ = slower.communicate()
    assert slower.returncode == 0
    assert said.split() == [made.fingerprint]
    assert uploads() == set()
    assert _find(config, storage, made.directory) == made, "what was made is not whole any more"


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
    strike = FaultSpec(FaultPoint.WHILE_WRITING, demo.KILL_AT, demo.KILLED_RANK, FaultAction.SIGKILL, str(record))
    found = []
    with ray_session():
        for name, url, faults in (("killed", f"{bucket}/demo", [strike]), ("undisturbed", str(tmp_path / "runs"), [])):
            config = demo._config(tmp_path, name)
            config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"storage": url})})
            assert Launch(config, demo._declared(config), faults=faults).run().outcome is Outcome.DONE
            storage = open_storage(url)
            final = read_catalog(storage, name).accepted[0]
            assert final.ref.step == demo.NUM_STEPS
            found.append(tensor_digests(storage, checkpoint_dir(name, final.ref), final))
    assert record.exists(), "the fault did not fire"
    assert found[0] == found[1]
    assert len(resumed(open_storage(f"{bucket}/demo"), "killed")) == 1  # type: ignore[arg-type]
