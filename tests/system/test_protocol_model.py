"""The protocol holds in every order of its operations, needs each of its rules, and is what the product does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format.layout import CLAIM, MANIFEST, AttemptId, parse_checkpoint
from outlast.checkpointing.regrouping_checkpointer import RegroupingCheckpointer
from outlast.checkpointing.run_store import attempt_history as history
from outlast.checkpointing.run_store.attempt_claim import Continuation, Origin
from outlast.checkpointing.run_store.events import RegroupedEvent
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.protocol_models.generations_model import MemoryRules, explore_generations, go_on
from tests.support.protocol_models.protocol_model import Bounds, Rules, World, advance, explore, number_of, numbered
from tests.support.small_model import small_model, train_step

# -- the model holds, and only with its rules --------------------------------------------------------------------------

FAST = [Bounds(attempts=2, saves=3), Bounds(attempts=3, saves=1), Bounds(attempts=3, saves=2, damage=False)]
SLOW = (pytest.mark.faults, pytest.mark.timeout(1200))
LARGE = [  # 1.2, 0.6 and 4.5 million worlds; about four minutes together, and 0.7 GB
    Bounds(attempts=3, saves=2),
    Bounds(attempts=3, saves=3, damage=False),
    Bounds(attempts=4, saves=1),
]


@pytest.mark.parametrize("bounds", [*FAST, *(pytest.param(bounds, marks=SLOW) for bounds in LARGE)], ids=str)
def test_the_protocol_holds_in_every_world(bounds: Bounds) -> None:
    found = explore(Rules(), bounds)
    print(f"{bounds}: {found}")
    assert not found.problem, found
    assert found.num_worlds > 10_000


BROKEN = {
    "reads-before-it-claims": Rules(claim_before_reading=False),
    "acknowledges-without-listing": Rules(list_before_acknowledging=False),
    "equal-numbers-do-not-supersede": Rules(total_order=False),
    "loads-unverified": Rules(verify=False),
    "writes-the-manifest-first": Rules(manifest_written_last=False),
    "deletes-the-manifest-last": Rules(manifest_deleted_first=False),
    "keeps-one": Rules(keep=1),
    "deletes-after-its-first-commit": Rules(commits_before_deleting=1, lineage_counts=False),
    "ignores-the-lineage": Rules(lineage_read=False),
    "sweeps-higher-attempts": Rules(sweep="all"),
    "never-sweeps": Rules(sweep="none"),
    "a-claim-without-commits-owns": Rules(owner="highest claimed"),
    "the-highest-steps-count": Rules(owner="nobody"),
    "starts-from-zero-when-nothing-is-whole": Rules(refuse=False),
}


@pytest.mark.parametrize("rules", BROKEN.values(), ids=BROKEN)
def test_each_rule_is_needed(rules: Rules) -> None:
    """Two attempts are enough to break every variant; run with -s to read how."""
    found = explore(rules, Bounds(attempts=2, saves=3))
    print(found)
    assert found.problem
    assert found.trail


@pytest.mark.parametrize(
    "rules",
    [Rules(look_again=False), Rules(lineage_counts=False), Rules(commits_before_deleting=1)],
    ids=["look-again", "lineage-counts", "two-commits-when-the-lineage-counts"],
)
def test_what_holds_without(rules: Rules) -> None:
    """Not every line of the protocol is load-bearing alone: looking again saves a loser its reading and its first
    save, and where the lineage counts among the two that are kept, one commit of its own would do.
    """
    assert not explore(rules, Bounds(attempts=2, saves=3)).problem


# -- generations that go on in memory ----------------------------------------------------------------------------------

MEMORY = [
    Bounds(attempts=2, saves=3),
    Bounds(attempts=3, saves=1),
    Bounds(attempts=3, saves=2, damage=False),
]
LARGE_MEMORY = [Bounds(attempts=3, saves=2), Bounds(attempts=4, saves=1, damage=False)]


@pytest.mark.parametrize("bounds", [*MEMORY, *(pytest.param(bounds, marks=SLOW) for bounds in LARGE_MEMORY)], ids=str)
def test_generations_in_memory_hold_in_every_world(bounds: Bounds) -> None:
    found = explore_generations(MemoryRules(), bounds)
    print(f"{bounds}: {found}")
    assert not found.problem, found
    assert found.num_worlds > 10_000


BROKEN_IN_MEMORY = {
    "commits-before-its-claim": MemoryRules(claims_before_commit=False),
    "does-not-read-after-its-claim": MemoryRules(reads_after_claim=False),
    "goes-on-beside-a-restart": MemoryRules(others_end_it=False),
    "goes-on-behind-an-acknowledged-commit": MemoryRules(newer_commit_ends_it=False, restarts=False),
    "its-number-follows-the-listing": MemoryRules(number_by_generation=False, restarts=False),
    "a-zombie-acknowledges-without-listing": MemoryRules(list_before_acknowledging=False, restarts=False),
    "a-zombie-deletes-of-higher-attempts": MemoryRules(sweep="all", restarts=False),
    "equal-numbers-do-not-supersede": MemoryRules(total_order=False),
}


@pytest.mark.parametrize("rules", BROKEN_IN_MEMORY.values(), ids=BROKEN_IN_MEMORY)
def test_each_rule_of_generations_is_needed(rules: MemoryRules) -> None:
    """Run with -s to read how. Each way to harm has a generation in it."""
    both = (explore_generations(rules, bounds) for bounds in (Bounds(2, 3, damage=False), Bounds(3, 2, damage=False)))
    found = next((item for item in both if item.problem), None)
    print(found)
    assert found is not None
    assert rules.total_order is False or any("lost a member" in what for _, what, _ in found.trail)


def test_a_generation_need_not_list_before_its_claim() -> None:
    """It spares a zombie the claim, by which it would end the attempt that has taken the run over."""
    assert not explore_generations(MemoryRules(lists_before_claim=False), Bounds(3, 1, damage=False)).problem


# -- the product does what the model does ------------------------------------------------------------------------------


class Recorded(LocalStorage):
    """Writes down each operation."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.operations: list[tuple[str, str]] = []

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self.operations.append(("put", path))
        super().put(path, chunks)

    def open(self, path: str) -> BinaryIO:
        self.operations.append(("open", path))
        return super().open(path)

    def list(self, path: str) -> list[Entry]:
        self.operations.append(("list", path))
        return super().list(path)

    def delete(self, path: str) -> None:
        self.operations.append(("delete", path))
        super().delete(path)

    def said(self) -> Sequence[str]:
        """The operations since the last call, in the model's words; several on one thing in a row count once.

        A save that reads its own files back, which no manifest names yet, is left out.
        """
        found, self.operations = self.operations, []
        words = collapsed([word for verb, path in found if (word := in_words(verb, path))])
        pairs = zip(["", *words], words, strict=False)
        return [word for before, word in pairs if before.replace("put files", "load") != word]


def in_words(verb: str, path: str) -> str:
    """Empty for what the model leaves out: journals, pins, who made a claim, and the names inside a checkpoint."""
    _, attempts, *rest = path.split("/", 4)
    if attempts == "pins":
        return ""
    assert attempts == "attempts"
    if not rest:
        return f"{verb} claims"
    attempt = AttemptId.parse(rest[0])
    assert attempt is not None
    if len(rest) == 1:
        return f"{verb} attempt {attempt.number}"
    step = parse_checkpoint(rest[1])
    if step is None:
        return f"put claim {attempt.number}" if (verb, rest[1]) == ("put", CLAIM) else ""
    if verb == "list":
        return ""
    if rest[2] == MANIFEST:
        return f"{'read' if verb == 'open' else verb} manifest {attempt.number}/{step}"
    return f"{'load' if verb == 'open' else verb + ' files'} {attempt.number}/{step}"


def collapsed(words: list[str]) -> list[str]:
    return [word for index, word in enumerate(words) if index == 0 or words[index - 1] != word]


class Modelled:
    """The same attempts in the model."""

    def __init__(self) -> None:
        self.world = World()

    def advance(self, attempt: int, saves: int) -> list[str]:
        operations, self.world = advance(self.world, numbered(attempt), saves)
        return self._in_words(operations, attempt)

    def go_on(self, before: int, attempt: int, step: int, saves: int) -> list[str]:
        operations, self.world = go_on(self.world, numbered(before), numbered(attempt), step, saves)
        return self._in_words(operations, attempt)

    def _in_words(self, operations: list[tuple[str, Any]], attempt: int) -> list[str]:
        words = []
        for what, target in operations:
            if what == "list strays":
                words += ["list claims", *(f"list attempt {lower}" for lower in range(1, attempt))]
            elif isinstance(target, tuple):
                words.append(f"{what} {number_of(target[1])}/{target[0]}")
            else:
                words.append(f"{what} {number_of(target)}" if target else what)
        return collapsed(words)


class Attempt:
    """A real one, on a model of a few weights."""

    def __init__(self, storage: Recorded, launch: str) -> None:
        self.model, self.optimizer = small_model()
        self.checkpointer = Checkpointer(storage, "run", launch=launch, retention=Retention(keep_last=2))
        state = self.checkpointer.resume(self.model, self.optimizer)
        self.step = state["step"] if state else 0

    def save(self) -> bool:
        self.step += 1
        train_step(self.model, self.optimizer, self.step)
        return self.checkpointer.save(self.step, self.model, self.optimizer, {"step": self.step})


def leave_out_history(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unrecorded(recorded: RunStore, **options: Any) -> list[history.AttemptRecord]:
        return read_tries(RunStore(LocalStorage(folder), recorded.run), **options)

    read_tries = history.read_attempt_history
    monkeypatch.setattr(history, "read_attempt_history", unrecorded)


def test_the_product_does_what_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operation by operation: a run, its heir, the first one's late commit, and the heir's retention and sweep.

    What an attempt reads of the run's history, to pass a checkpoint over that failed to start, is left out: it reads
    journals only, between its claim and the choice of its base, and no candidate appears or goes by it.
    """
    storage, model = Recorded(tmp_path), Modelled()
    leave_out_history(tmp_path, monkeypatch)
    first = Attempt(storage, "a")
    assert [first.save() for _ in range(3)] == [True] * 3
    said = storage.said()
    assert said == model.advance(1, saves=3)
    assert said[-2:] == ["delete manifest 1/1", "delete files 1/1"]

    heir = Attempt(storage, "b")
    said = storage.said()
    assert said == model.advance(2, saves=0)
    assert said[-3:] == ["read manifest 1/3", "read manifest 1/2", "load 1/3"]

    assert not first.save()
    said = storage.said()
    assert said == model.advance(1, saves=4)
    assert said == ["put files 1/4", "put manifest 1/4", "list claims"]

    assert [heir.save() for _ in range(3)] == [True] * 3
    said = storage.said()
    assert said == model.advance(2, saves=3)
    assert "delete manifest 1/4" in said, "the late commit was swept"


def test_a_generation_does_what_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operation by operation: its claim, the late commit of the one before it, and its own retention and sweep.

    What it reads of the journals, to complete its own, is left out.
    """
    storage, model = Recorded(tmp_path), Modelled()
    leave_out_history(tmp_path, monkeypatch)
    monkeypatch.setattr(RegroupingCheckpointer, "_missed", lambda *_: [])
    first = Attempt(storage, "a")
    assert [first.save() for _ in range(3)] == [True] * 3
    storage.said()
    model.advance(1, saves=3)

    checkpointer = RegroupingCheckpointer(
        storage,
        "run",
        launch="a",
        retention=Retention(keep_last=2),
        continues=Continuation(Origin(first.checkpointer.attempt), 1, step=3),
    )
    checkpointer.go_on_in_memory(RegroupedEvent(step=3, marks={}), [], None, lambda before: None)
    checkpointer.settle()
    said = storage.said()
    assert said == model.go_on(1, 2, step=3, saves=0)
    assert said[:3] == ["list claims", "put claim 2", "list claims"]

    assert not first.save()
    assert storage.said() == model.advance(1, saves=4)

    first.checkpointer = checkpointer
    first.step = 3
    assert [first.save() for _ in range(3)] == [True] * 3
    said = storage.said()
    assert said == model.go_on(1, 2, step=3, saves=3)
    assert "delete manifest 1/4" in said, "the late commit was swept"
