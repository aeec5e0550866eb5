"""One entry that cannot be read, or that outlast did not write, hides nothing else and costs no checkpoint.

One run of two attempts; each case puts something in the place of one entry of a copy: a link loop, a directory, a file
without permission (as a user who is not root), or what desktops and editors leave.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import NotAFileError, StorageError
from outlast.checkpointing.format.layout import is_litter
from outlast.checkpointing.run_store.claims import claim, higher_claim, launch_is_superseded, list_attempts
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import main
from tests.support.small_model import digests_of, small_model, train_step

RUN = "run"


@dataclass(frozen=True)
class Printed:
    """What a command printed, and how it ended."""

    out: str
    err: str
    code: int


Outlast = Callable[..., Printed]


@pytest.fixture
def outlast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Outlast]:
    """Runs a command in this process, from the command line to the exit code."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Printed:
        monkeypatch.setattr(sys, "argv", ["outlast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Printed(*capsys.readouterr(), int(ended.value.code or 0))

    yield run
    signal.signal(signal.SIGTERM, before)


def _train(storage: LocalStorage, launch: str, steps: list[int]) -> None:
    model, optimizer = small_model()
    checkpointer = Checkpointer(storage, RUN, launch=launch, retention=Retention(keep_last=9))
    state = checkpointer.resume(model, optimizer)
    for step in range(state["step"] if state else 0, steps[-1]):
        train_step(model, optimizer, step)
        if step + 1 in steps:
            assert checkpointer.save(step + 1, model, optimizer, {"step": step + 1})
    checkpointer.flush()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with one run: attempt 1 with steps 1 and 2, attempt 2 with steps 3 and 4."""
    root = tmp_path_factory.mktemp("entries")
    storage = LocalStorage(root / "base")
    _train(storage, "first", [1, 2])
    _train(storage, "second", [3, 4])
    launch = root / "base" / RUN / "launches/20260101-000000-aa"
    launch.mkdir(parents=True)
    (launch / "alive.json").write_text(json.dumps({"ended": True, "exit_code": 0, "t": 1.0, "began": 1.0}))
    (root / "base" / RUN / "pins").mkdir()
    return root


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    """A copy of the storage."""
    shutil.copytree(base / "base", tmp_path / "storage")
    return tmp_path / "storage"


@contextmanager
def as_user() -> Iterator[None]:
    """Runs the block without root's right to read everything: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == libc.capget(header, without) == 0
    without[0] &= ~0b110
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def _attempts(root: Path) -> list[Path]:
    return sorted((root / RUN / "attempts").iterdir())


def _resume(root: Path, launch: str = "third") -> int:
    """The step from which an attempt resumes; its state must be that of the step."""
    model, optimizer = small_model()
    state = Checkpointer(LocalStorage(root), RUN, launch=launch).resume(model, optimizer)
    assert state is not None
    expected, its_optimizer = small_model()
    for step in range(state["step"]):
        train_step(expected, its_optimizer, step)
    assert digests_of(model, optimizer) == digests_of(expected, its_optimizer)
    return int(state["step"])


def _loop(place: Path) -> None:
    _remove(place)
    place.symlink_to(place.name)


def _dangle(place: Path) -> None:
    _remove(place)
    place.symlink_to("nowhere")


def _directory(place: Path) -> None:
    _remove(place)
    place.mkdir()


def _remove(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# -- litter ------------------------------------------------------------------------------------------------------------

LITTER = [
    ".DS_Store",
    "._model.safetensors",
    "Thumbs.db",
    "desktop.ini",
    ".ipynb_checkpoints/state-checkpoint.json",
    ".state.json.swp",
    "config.json~",
    "#config.json#",
    ".nfs000000000001",
    ".directory",
    "lost+found/#1234",
    "__MACOSX/._x",
    "@eaDir/x",
    ".Trash-1000/files/x",
]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *((name, True) for name in LITTER),
        ("training_state/.DS_Store", True),
        ("THUMBS.DB", True),
        ("model.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
        ("manifest.json", False),
        ("training_state/optimizer-00001-of-00002.safetensors", False),
        ("notes.txt", False),
        ("a~b", False),
        ("", False),
    ],
)
def test_what_counts_as_litter(path: str, expected: bool) -> None:
    assert is_litter(path) is expected


@pytest.mark.parametrize("where", ["", RUN, f"{RUN}/attempts", f"{RUN}/pins", f"{RUN}/launches", f"{RUN}/prunes", "*"])
def test_litter_does_no_harm_and_is_named(where: str, root: Path, outlast: Outlast) -> None:
    """`*`: in an attempt, in a checkpoint, and in its `training_state`."""
    newest = _attempts(root)[-1] / "checkpoint-4"
    for folder in [newest.parent, newest, newest / "training_state"] if where == "*" else [root / where]:
        for name in LITTER:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\0")
    verified = outlast("checkpoints", "verify", root / RUN)
    assert verified.code == 0
    assert verified.out.count("whole") == 4
    assert "damaged" not in verified.out
    assert verified.err == ""
    if where == "*":
        for name in LITTER:
            assert name.split("/")[0] in verified.out
    listed = json.loads(outlast("checkpoints", "ls", root / RUN, "--json").out)
    assert [(row["step"], row["pinned"]) for row in listed] == [(4, False), (3, False), (2, False), (1, False)]
    assert [row["run"] for row in json.loads(outlast("list", "--storage", root, "--json").out)] == [RUN]
    assert outlast("status", root / RUN).code == 0
    assert _resume(root) == 4


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "training_state/optimizer-00001.safetensors"])
def test_a_file_of_the_layout_that_was_never_committed_is_damage(name: str, root: Path, outlast: Outlast) -> None:
    (_attempts(root)[-1] / "checkpoint-4" / name).write_bytes(b"x")
    verified = outlast("checkpoints", "verify", root / RUN)
    assert verified.code == 5
    assert f"{name}: extra file that was never committed" in verified.out
    assert _resume(root) == 3


# -- one entry hides nothing else --------------------------------------------------------------------------------------


def _entries(root: Path) -> dict[str, Path]:
    first, second = _attempts(root)
    return {
        "lost+found in the storage": root / "lost+found",
        "another run": root / "other",
        "a claim": second / "claim.json",
        "an old claim": first / "claim.json",
        "events": second / "events-0-000000.jsonl",
        "commits": second / "commits-0-000000.jsonl",
        "old commits": first / "commits-0-000000.jsonl",
        "an old manifest": first / "checkpoint-1/manifest.json",
        "a liveness file": root / RUN / "launches/20260101-000000-aa/alive.json",
        "a launch": root / RUN / "launches/20260101-000000-bb",
        "a pin": root / RUN / "pins/1@0001-abcd",
        "a prune": root / RUN / "prunes/20260101T000000-aaaaaaaa",
        "the pins": root / RUN / "pins",
        "an entry of a checkpoint": second / "checkpoint-4/lost+found",
    }


#: Of these another thing in their place is not named: they are empty, or nothing that was asked for depends on them.
QUIET = {"a pin", "an entry of a checkpoint", "old commits", "a prune"}
ENTRIES = [
    "lost+found in the storage",
    "another run",
    "a claim",
    "an old claim",
    "events",
    "commits",
    "old commits",
    "an old manifest",
    "a liveness file",
    "a launch",
    "a pin",
    "a prune",
    "the pins",
    "an entry of a checkpoint",
]


def _all_verbs(root: Path, outlast: Outlast) -> dict[str, Printed]:
    page = root / "report.html"
    return {
        "list": outlast("list", "--storage", root),
        "ls": outlast("checkpoints", "ls", root / RUN, "--json"),
        "status": outlast("status", root / RUN),
        "verify": outlast("checkpoints", "verify", root / RUN),
        "report": outlast("report", root / RUN, "-o", page),
    }


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("put", [_loop, _dangle, _directory], ids=["link loop", "dangling link", "directory"])
def test_something_else_in_the_place_of_an_entry(
    put: Callable[[Path], None], entry: str, root: Path, outlast: Outlast
) -> None:
    place = _entries(root)[entry]
    put(place)
    printed = _all_verbs(root, outlast)
    damaged = entry == "an old manifest"
    failed = {verb: item.err for verb, item in printed.items() if item.code}
    assert failed.keys() == ({"verify"} if damaged else set()), failed
    assert printed["verify"].code == (5 if damaged else 0)
    assert f"{RUN} " in printed["list"].out
    steps = [row["step"] for row in json.loads(printed["ls"].out)]
    assert steps == ([4, 3, 2] if damaged else [4, 3, 2, 1])
    is_named = any(place.name in item.err + item.out for item in printed.values())
    if put is _loop and entry not in QUIET:
        assert is_named, printed
    assert _resume(root) == 4


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "a pin"])
def test_an_entry_without_permission(entry: str, root: Path, outlast: Outlast) -> None:
    place = _entries(root)[entry]
    if not place.exists():
        place.mkdir(parents=True)
    place.chmod(0)
    with as_user():
        printed = _all_verbs(root, outlast)
        is_unread = entry == "an old manifest"
        failed = {verb: item.err for verb, item in printed.items() if item.code}
        assert failed.keys() == ({"verify"} if is_unread else set()), failed
        assert printed["verify"].code == (1 if is_unread else 0)
        assert [row["step"] for row in json.loads(printed["ls"].out)] == ([4, 3, 2] if is_unread else [4, 3, 2, 1])
        is_named = any(place.name in item.err + item.out for item in printed.values())
        assert is_named or entry in QUIET, printed
        assert _resume(root) == 4
    place.chmod(0o700)


# -- what must still stop ----------------------------------------------------------------------------------------------


def test_a_newest_manifest_without_permission_stops_the_resume(root: Path, outlast: Outlast) -> None:
    """It proves nothing: to go back to step 3 would train its steps again, and retention would delete it."""
    manifest = _attempts(root)[-1] / "checkpoint-4/manifest.json"
    manifest.chmod(0)
    with as_user():
        assert [row["step"] for row in json.loads(outlast("checkpoints", "ls", root / RUN, "--json").out)] == [3, 2, 1]
        with pytest.raises(StorageError, match=r"(?s)a newer state cannot be read.*checkpoint-4.*Permission") as caught:
            _resume(root)
        assert "make it readable" in caught.value.hint
        verified = outlast("checkpoints", "verify", root / RUN)
        assert verified.code == 1
        assert "unread" in verified.out
        manifest.chmod(0o600)
        assert _resume(root, "fourth") == 4


def test_an_attempt_without_permission_stops_the_resume(root: Path, outlast: Outlast) -> None:
    _attempts(root)[-1].chmod(0)
    with as_user():
        assert [row["step"] for row in json.loads(outlast("checkpoints", "ls", root / RUN, "--json").out)] == [2, 1]
        with pytest.raises(StorageError, match="a newer state cannot be read"):
            _resume(root)
        _attempts(root)[1].chmod(0o700)
        assert _resume(root, "fourth") == 4


def test_a_run_whose_only_manifests_cannot_be_read_does_not_start_from_the_beginning(root: Path) -> None:
    manifests = list((root / RUN).rglob("manifest.json"))
    for manifest in manifests:
        manifest.chmod(0)
    with as_user(), pytest.raises(StorageError, match="does not resume from the beginning"):
        _resume(root)


@pytest.mark.parametrize("put", [_loop, _directory], ids=["link loop", "directory"])
def test_something_else_in_the_place_of_the_newest_manifest_is_damage(
    put: Callable[[Path], None], root: Path, outlast: Outlast
) -> None:
    put(_attempts(root)[-1] / "checkpoint-4/manifest.json")
    listed = outlast("checkpoints", "ls", root / RUN)
    assert listed.code == 0
    assert "damaged" in listed.err
    assert "it is not a file" in listed.err
    assert outlast("checkpoints", "verify", root / RUN).code == 5
    assert _resume(root) == 3


def test_something_else_in_the_place_of_a_weights_file_is_damage(root: Path, outlast: Outlast) -> None:
    _loop(_attempts(root)[-1] / "checkpoint-4/model.safetensors")
    verified = outlast("checkpoints", "verify", root / RUN)
    assert verified.code == 5
    assert "model.safetensors: a symbolic link" in verified.out
    assert _resume(root) == 3


def test_an_old_checkpoint_that_cannot_be_read_is_not_deleted(root: Path) -> None:
    old = _attempts(root)[0] / "checkpoint-1"
    (old / "manifest.json").chmod(0)
    with as_user():
        model, optimizer = small_model()
        checkpointer = Checkpointer(LocalStorage(root), RUN, launch="third", retention=Retention(keep_last=2))
        assert checkpointer.resume(model, optimizer) is not None
        for step in (5, 6, 7):
            assert checkpointer.save(step, model, optimizer, {"step": step})
    assert (old / "model.safetensors").exists()
    assert not (_attempts(root)[0] / "checkpoint-2").exists()


# -- claims fence, whether they can be read or not ---------------------------------------------------------------------


@pytest.mark.parametrize("put", [_loop, _dangle, _directory, lambda place: place.write_text("")])
def test_whatever_has_the_name_of_an_attempt_takes_its_number(put: Callable[[Path], None], root: Path) -> None:
    store = RunStore(LocalStorage(root), RUN)
    mine = list_attempts(store)[-1]
    put(root / RUN / "attempts/0007-abcdef01")
    assert str(higher_claim(store, mine)) == "0007-abcdef01"
    assert claim(store, {"launch": "third"}).number == 8


def test_a_claim_without_permission_is_that_of_another_launch(root: Path) -> None:
    """The launch `second` has claimed before, and did not write the newest claim: it must not take the run back."""
    store = RunStore(LocalStorage(root), RUN)
    assert not launch_is_superseded(store, "second")
    newer = claim(store, {"launch": "third"})
    place = root / store.attempt_dir(newer) / "claim.json"
    place.chmod(0)
    with as_user():
        fresh = RunStore(LocalStorage(root), RUN)
        assert launch_is_superseded(fresh, "second")
        assert not launch_is_superseded(fresh, "fourth"), "a new launch may"
    place.unlink()
    place.mkdir()
    assert not launch_is_superseded(RunStore(LocalStorage(root), RUN), "second"), "no claim at all"


# -- the storage -------------------------------------------------------------------------------------------------------


def test_a_listing_names_what_cannot_be_looked_at(tmp_path: Path) -> None:
    for put, name in ((_loop, "loop"), (_dangle, "dangling"), (_directory, "folder")):
        put(tmp_path / name)
    (tmp_path / "file").write_bytes(b"1")
    found = {entry.name: entry.num_bytes for entry in LocalStorage(tmp_path).list("")}
    assert found == {"loop": None, "dangling": None, "folder": None, "file": 1}


@pytest.mark.parametrize("path", ["loop", "loop/inside", "folder", "file/inside"])
def test_a_read_of_something_else_than_a_file_is_proof(path: str, tmp_path: Path) -> None:
    _loop(tmp_path / "loop")
    _directory(tmp_path / "folder")
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(NotAFileError):
        LocalStorage(tmp_path).open(path)
