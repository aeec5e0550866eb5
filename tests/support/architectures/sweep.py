"""The sweep: every case trained whole, and stopped or killed and resumed by other processes, and both compared.

Returns verdicts; it asserts nothing.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.trainers.attempt import Assignment
from tests.support.architectures import rank
from tests.support.architectures.cases import STOPPED_AT, Case, Place, Source, settings_of, tokens_of
from tests.support.architectures.processes import Answer, Processes
from tests.support.groups.worker_group import Quiet, StopAt, fault

#: Verdicts, best first.
WORKS, REFUSED, DIFFERS, ERROR, NOT_BUILT = "works", "refused", "differs", "error", "not built"


@dataclass(frozen=True)
class Verdict:
    """How a case ended, and why; empty for one that works."""

    model_type: str
    task: str
    source: str
    ranks: str
    rows: int
    killed: bool
    verdict: str
    why: str = ""
    seconds: float = 0.0


class Sweep:
    """The cases of some model types, in a folder of their own."""

    def __init__(self, folder: Path, cases: Iterable[Case]) -> None:
        self.place = Place(folder)
        self.cases = list(cases)
        self.runs = {case: f"r{number}" for number, case in enumerate(self.cases)}
        self.verdicts: dict[Case, tuple[str, str]] = {}
        self.seconds: dict[Case, float] = dict.fromkeys(self.cases, 0.0)
        self._checked: dict[Case, Answer] = {}
        self._static: dict[Case, bool] = {}
        self._whole: dict[Case, list[Any]] = {}
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Verdict]:
        """Run all phases; each has processes of its own. A case that failed takes no part in those after it."""
        self._each(self._prepare, {1: self.cases})
        by_size = {size: [case for case in self.cases if case.ranks.size == size] for size in (1, 2)}
        self._each(self._train_whole, by_size)
        self._each(self._interrupt, by_size)
        self._each(self._resume, {size: cases[::-1] for size, cases in by_size.items()})  # another history of the heap
        for case in self.cases:
            self.verdicts.setdefault(case, (WORKS, ""))
        return [
            Verdict(
                case.model_type,
                case.task,
                case.source.value,
                case.ranks.value,
                case.rows,
                case.killed,
                *self.verdicts[case],
                round(self.seconds[case], 2),
            )
            for case in self.cases
        ]

    def _each(self, work: Callable[[Case, Processes], None], by_size: Mapping[int, Sequence[Case]]) -> None:
        for size, cases in by_size.items():
            with Processes(size, self.place.folder) as processes:
                for case in cases:
                    if case in self.verdicts:
                        continue
                    began = time.monotonic()
                    work(case, processes)
                    self.seconds[case] += time.monotonic() - began

    def _end(self, case: Case, verdict: str, why: str) -> None:
        self.verdicts[case] = (verdict, why)

    def _ended(self, case: Case, phase: str, answers: Sequence[Answer]) -> bool:
        """Record an answer that is not ok. The first of several: what follows from it says less."""
        for kind in ("refused", "error", "hung", "died"):
            found = [answer for answer in answers if answer.kind == kind]
            # A rank that raised breaks the connection of the other, which reports that.
            found.sort(
                key=lambda answer: any(
                    text in str(answer.value) for text in ("Connection closed by peer", "Connection reset by peer")
                )
            )
            if found:
                late = "refused by the workers only: " if kind == "refused" else ""
                self._end(case, ERROR, f"{phase}: {late}{found[0].value or kind}")
                return True
        return False

    def _prepare(self, case: Case, processes: Processes) -> None:
        """Save the pretrained model, and check the settings as `train` does."""
        place, folder = self.place, self.place.pretrained(case)
        if case.source is Source.PATH and not folder.exists():
            given = settings_of(case.model_type, case.task)
            where = str(place.tokenizer_folder(tokens_of(case)))
            [answer] = processes.call(rank.save_pretrained, str(folder), given, case.task, where)
            if answer.kind != "ok":
                shutil.rmtree(folder, ignore_errors=True)
                return self._end(case, NOT_BUILT, str(answer.value))
        try:
            assignment = self._assignment(case, "check")
        except Exception as error:  # noqa: BLE001 - it is the finding
            return self._end(case, ERROR, f"settings: {type(error).__name__}: {error}"[:300])
        same = replace(case, killed=False)
        if same not in self._checked:
            [self._checked[same]] = processes.call(rank.check, assignment, place.storage.url, case.ranks.size)
        answer = self._checked[same]
        if answer.kind == "ok":
            self._static[case] = answer.value
        elif answer.kind == "refused":
            self._end(case, REFUSED, answer.value)
        else:
            self._end(case, ERROR, f"preflight: {answer.value or answer.kind}")
        return None

    def _assignment(self, case: Case, run: str, launch: str = "first") -> Assignment:
        config = self.place.config(case, run)
        prepared = self.place.prepared(case)
        declared = config.model_dump(mode="json", by_alias=True)
        return Assignment(config, declared, launch, prepared, static_graph=run != "check" and self._static[case])

    def _train_whole(self, case: Case, processes: Processes) -> None:
        assignment = self._assignment(case, self.runs[case])
        answers = processes.call(rank.train, assignment, self.place.storage.url, Quiet(), reload=True)
        if self._ended(case, "training", answers):
            return
        self._whole[case] = [answer.value for answer in answers]
        if found := self._whole[case][0].get("reload"):
            self._end(case, DIFFERS, f"reload: {'; '.join(found)}")

    def _interrupt(self, case: Case, processes: Processes) -> None:
        assignment = self._assignment(case, f"{self.runs[case]}-again")
        control: Quiet = StopAt(STOPPED_AT)
        if case.killed:
            (folder := self.place.folder / "faults" / self.runs[case]).mkdir(parents=True)
            strike = fault(FaultPoint.STEP, STOPPED_AT + 1, 0, FaultAction.SIGKILL, folder)
            assignment, control = replace(assignment, faults=(strike,)), Quiet()
        answers = processes.call(rank.train, assignment, self.place.storage.url, control, reload=False)
        if case.killed:
            if not Path(strike.record).exists() or answers[0].kind != "died":
                self._end(case, ERROR, f"the fault did not fire: {answers}"[:300])
        elif not self._ended(case, "training again", answers) and answers[0].value["outcome"] != "stopped":
            self._end(case, ERROR, f"it was to stop after step {STOPPED_AT}: {answers[0].value['outcome']}")

    def _resume(self, case: Case, processes: Processes) -> None:
        run, url = f"{self.runs[case]}-again", self.place.storage.url
        answers = processes.call(rank.train, self._assignment(case, run, "second"), url, Quiet(), reload=False)
        if self._ended(case, "resume", answers):
            return None
        steps = [event["step"] for event in rank.events(url, run, "resume")]
        if steps != [STOPPED_AT + (not case.killed)]:  # ranks agree on a stop in the step after the one that asks
            return self._end(case, ERROR, f"it resumed from the steps {steps}")
        for number, (whole, answer) in enumerate(zip(self._whole[case], answers, strict=True)):
            theirs, ours = whole["digests"], answer.value["digests"]
            names = dict.fromkeys([*theirs, *ours])
            if other := [name for name in names if ours.get(name) != theirs.get(name)]:
                why = f"rank {number}: {len(other)} of {len(theirs)} tensors, first {other[0]}"
                return self._end(case, DIFFERS, f"{why}; {self._first_loss(case)}")
        if loss := self._first_loss(case):
            self._end(case, DIFFERS, loss)
        return None

    def _first_loss(self, case: Case) -> str:
        whole, again = (rank.losses(self.place.storage.url, f"{self.runs[case]}{end}") for end in ("", "-again"))
        step = next((step for step in sorted(whole) if again.get(step) != whole[step]), None)
        return "" if step is None else f"loss of step {step}: {whole[step]!r} and {again.get(step)!r}"


def sweep(folder: Path, cases: Sequence[Case], num_parts: int = 1) -> list[Verdict]:
    """Sweep cases, several parts at once, in a process of its own: its fork server is not that of other tests."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_sweep, folder, cases, num_parts).result()


def _sweep(folder: Path, cases: Sequence[Case], num_parts: int) -> list[Verdict]:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.architectures.preload"])
    with ThreadPoolExecutor(num_parts) as pool:
        parts = [Sweep(folder / f"part-{number}", cases[number::num_parts]) for number in range(num_parts)]
        return [verdict for verdicts in pool.map(Sweep.run, parts) for verdict in verdicts]
