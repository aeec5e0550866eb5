"""Whatever the files of a storage hold, each verb that reads them ends as it should."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import safetensors.torch
import transformers
from safetensors import SafetensorError
from typer.main import get_command

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.format.layout import LOOP_STATE, checkpoint_dir
from outlast.checkpointing.format.safetensors import SafetensorsError, TensorSpec, parse_header, tensor_bytes
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store import segments
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.state.loop_state import decode_state
from outlast.checkpointing.storage import retry
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli.main import app
from outlast.trainers.preparation.prepare import prepare
from tests.support.small_model import digests_of, small_model
from tests.system.mutations.forgeries import Mutation, mutate_storage
from tests.system.mutations.isolated import Ending
from tests.system.mutations.stored_runs import OWN, TRAINED, make_runs, train, trained_config

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CASE_S = 60  # of one verb; most take some milliseconds
COMMANDS = {
    "list": "list --storage ROOT",
    "ls": "checkpoints ls RUN",
    "ls --json": "checkpoints ls RUN --json",
    "show": "checkpoints show RUN newest",
    "verify": "checkpoints verify RUN",
    "diff": "checkpoints diff RUN newest FIRST --optimizer",
    "export": "checkpoints export RUN newest OUT --no-card",
    "export with a card": "checkpoints export RUN newest CARD",
    "prune": "checkpoints prune RUN",
    "status": "status RUN",
    "status --json": "status RUN --json",
    "report": "report RUN -o PAGE",
}
FIRST = {OWN: "2", TRAINED: "3"}


@dataclass(frozen=True)
class Answer:
    """How a verb ended: what it printed or found, its exit code, and its error."""

    found: Any
    code: int = 0
    error: str = ""

    @property
    def text(self) -> str:
        return f"{self.found}\n{self.error}"


class _Hang(BaseException):
    """A verb did not end."""


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hang(f"not done within {CASE_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_S)
    try:
        yield
    finally:
        signal.alarm(0)


_command = get_command(app)  # built once, which takes most of the time of a command


def outlast(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed. Raises what it raises."""
    printed = io.BytesIO()
    with io.TextIOWrapper(printed, encoding="utf-8", write_through=True) as stream:
        with redirect_stdout(stream), redirect_stderr(stream):
            code = _command.main(arguments, prog_name="outlast", standalone_mode=False)
        return code or 0, printed.getvalue().decode()


class StoredWorkshop:
    """Both runs, and what each verb makes of them."""

    def __init__(self, folder: Path) -> None:
        warnings.simplefilter("error", RuntimeWarning)  # as in the other tests
        for module, name in ((retry, "_PAUSE_S"), (segments, "_PAUSE_S")):
            assert hasattr(module, name)
            setattr(module, name, 0.0)  # nothing changes while they wait
        self.whole, self.place = folder / "whole", folder / "try"
        self.whole.mkdir()
        self.place.mkdir()
        make_runs(self.whole)
        self.storage = LocalStorage(self.place / "runs")
        self.before: dict[str, dict[str, Answer]] = {}
        for run in (*FIRST, ".data"):
            self._renew()
            self.before[run] = {verb: self._answer(verb, run) for verb in self._verbs(run)}
        for run, answers in self.before.items():
            assert all(not answer.error and not answer.code for answer in answers.values()), (run, answers)
        self.states, self.exports = dict(self._own_states()), set(self._exports())

    def _own_states(self) -> Iterator[tuple[int, Any]]:
        """The digests and the loop state of each checkpoint, as nothing has happened to them."""
        for manifest in read_catalog(self.storage, OWN).accepted:
            directory = checkpoint_dir(OWN, manifest.ref)
            state = decode_state(self.storage.path(f"{directory}/{LOOP_STATE}").read_bytes(), LOOP_STATE)
            yield manifest.ref.step, (tensor_digests(self.storage, directory, manifest), str(state))

    def _exports(self) -> Iterator[str]:
        for run in FIRST:
            for manifest in read_catalog(self.storage, run).accepted:
                out = self.place / f"{run}-{manifest.ref.step}"
                arguments = ["checkpoints", "export", str(self.place / "runs" / run), manifest.ref.name, str(out)]
                outlast([*arguments, "--no-card"])
                yield _tree_digest(out)

    def _renew(self) -> None:
        """Make the storage whole again: copy what was changed, delete what was added."""
        for place in sorted(self.place.rglob("*"), reverse=True):
            whole = self.whole / place.relative_to(self.place)
            if not whole.exists() or place.is_symlink():
                place.rmdir() if place.is_dir() else place.unlink()
        for whole in sorted(self.whole.rglob("*")):
            place = self.place / whole.relative_to(self.whole)
            if whole.is_dir():
                place.mkdir(exist_ok=True)
            elif not place.exists() or _version(place) != _version(whole):
                shutil.copy2(whole, place)

    def run(self, target: str, seed: int) -> Ending:
        """Change a file of this kind, and let every verb read it."""
        self._renew()
        mutation = mutate_storage(self.place / "runs", target, seed)
        kinds = set()
        for verb in self._verbs(mutation.run):
            try:
                with _time_limit():
                    answer = self._answer(verb, mutation.run)
                    fault = self._fault(mutation, verb, answer)
            except BaseException as error:  # noqa: BLE001 - it is the finding
                place = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{verb}: {type(error).__name__}: {str(error)[:200]} ({place.filename}:{place.lineno})"
                return Ending("unexpected", f"{mutation}: {text}")
            if fault:
                return Ending("wrong", f"{mutation}: {verb}: {fault}")
            kinds.add(self._kind(mutation, verb, answer))
        order = ("damage told", "refused", "other content", "same answers")
        return Ending(next(kind for kind in order if kind in kinds))

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def _verbs(self, run: str) -> list[str]:
        return ["prepare"] if run == ".data" else [*COMMANDS, "resume" if run == OWN else "train"]

    def _answer(self, verb: str, run: str) -> Answer:
        try:
            if verb in COMMANDS:
                return self._command(verb, run)
            return Answer({"prepare": self._prepare, "resume": self._resume, "train": self._train}[verb]())
        except OutlastError as error:
            return Answer(None, error.exit_code, error.message)

    def _command(self, verb: str, run: str) -> Answer:
        places = {"RUN": f"runs/{run}", "ROOT": "runs", "OUT": "out", "CARD": "card", "PAGE": "page.html"}
        words = {word: str(self.place / path) for word, path in places.items()} | {"FIRST": FIRST[run]}
        for made in ("out", "card"):
            shutil.rmtree(self.place / made, ignore_errors=True)
        code, printed = outlast([words.get(word, word) for word in COMMANDS[verb].split()])
        return Answer(_tree_digest(self.place / "out") if verb == "export" else printed, code)

    def _prepare(self) -> Any:
        prepared = prepare(trained_config(self.place, self.storage), self.storage)
        digest = hashlib.sha256()
        for name, number in (("train", prepared.num_samples), ("eval", prepared.num_eval_samples)):
            for sample in prepared.split(self.storage, name).take(range(min(number, 1000))):
                digest.update(repr([(key, value.tolist()) for key, value in sample.items()]).encode())
        digest.update(repr(sorted(prepared.tokenizer(self.storage).inner.get_vocab().items())).encode())
        return digest.hexdigest()

    def _resume(self) -> Any:
        model, optimizer = small_model()
        with Checkpointer(self.storage, OWN, launch="here") as checkpointer:
            state = checkpointer.resume(model, optimizer)
        [event] = [json.loads(line) for line in self._last_events() if b'"resume"' in line]
        return event["step"], digests_of(model, optimizer), str(state), json.dumps(event["rejected"])

    def _last_events(self) -> list[bytes]:
        newest = max((self.place / "runs" / OWN / "attempts").iterdir())
        return [line for path in newest.glob("events-*.jsonl") for line in path.read_bytes().splitlines()]

    def _train(self) -> Any:
        return train(self.place, self.storage).name

    # -- judging -------------------------------------------------------------------------------------------------------

    def _fault(self, mutation: Mutation, verb: str, answer: Answer) -> str:
        """Return what is wrong with an answer; empty if nothing is."""
        is_named = any(name in answer.text for name in mutation.names)
        if answer.error:
            return "" if is_named else f"it names no file: {answer.error[:300]}"
        if answer.code not in ((0, 1, 5) if verb == "verify" else (0,)):
            return f"exit code {answer.code}: {answer.text[:300]}"
        if answer.code and not is_named:
            return f"damage of something else: {answer.text[:300]}"
        if mutation.is_forged and mutation.is_digested:
            return self._library_fault(mutation) if verb == "verify" else ""
        is_damaged = mutation.is_digested and mutation.is_changed
        if verb == "verify" and is_damaged and answer.code != 5:
            return f"no damage: {answer.text[:300]}"
        if verb == "resume":
            return self._resume_fault(mutation, answer.found, is_damaged=is_damaged)
        if verb == "export" and answer.found not in self.exports:
            return "an export of no checkpoint"
        return "other samples" if verb == "prepare" and answer != self.before[".data"][verb] else ""

    def _resume_fault(self, mutation: Mutation, found: Any, *, is_damaged: bool) -> str:
        step, digests, state, rejected = found
        if step is None or (digests, state) != self.states[step]:
            return f"a state that was never saved, at step {step}"
        if is_damaged and f"checkpoint-{max(self.states)}/" in mutation.path:
            return "" if step < max(self.states) and mutation.path.split("/", 3)[-1] in rejected else "not rejected"
        return ""

    def _library_fault(self, mutation: Mutation) -> str:
        """Return how outlast reads a safetensors file otherwise than the library; empty if it does not."""
        if not mutation.path.endswith(".safetensors"):
            return ""
        data = (self.place / "runs" / mutation.run / mutation.path).read_bytes()
        try:
            ours, _ = parse_header(data, len(data))
        except SafetensorsError:
            return ""
        try:
            theirs = safetensors.torch.load(data)
        except SafetensorError as error:
            return f"the library refuses it: {error}"
        for name, (spec, begin) in ours.items():
            if (
                TensorSpec.of(theirs[name]) != spec
                or tensor_bytes(theirs[name]) != data[begin : begin + spec.num_bytes]
            ):
                return f"the library reads another {name}"
        return "" if ours.keys() == theirs.keys() else "the library reads other tensors"

    def _kind(self, mutation: Mutation, verb: str, answer: Answer) -> str:
        if answer.code == 5 or (verb == "resume" and not answer.error and answer.found[3] != "[]"):
            return "damage told"
        if answer.error:
            return "refused"
        return "same answers" if answer == self.before[mutation.run][verb] else "other content"


def _version(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _tree_digest(folder: Path) -> str:
    """Return a digest of all files of a directory."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
