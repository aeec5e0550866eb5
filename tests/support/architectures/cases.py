"""Cases of the sweep: a model type, a task, where the weights come from, the ranks, and the rows of a micro-batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice, product
from pathlib import Path
from typing import Any

import transformers

from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.tokenizer import tokenizer_files
from outlast.trainers.preparation.prepare import Prepared, prepare
from tests.support.architectures.configurations import NOT_TEXT, TABLES, VOCABULARY, tiny_config
from tests.support.tasks.cases import (
    Row,
    paragraphs,
    text_only,
    with_answer,
    with_choices,
    with_class,
    with_first_words,
    with_tags,
)

NUM_STEPS, STOPPED_AT = 4, 2
ROWS = {
    "causal-lm": text_only,
    "masked-lm": text_only,
    "sequence-classification": with_class,
    "token-classification": with_tags,
    "question-answering": with_answer,
    "multiple-choice": with_choices,
    "seq2seq-lm": with_first_words,
}


class Source(Enum):
    """Where the weights come from."""

    CONFIG = "config"
    PATH = "path"


class Ranks(Enum):
    """How many ranks, and what they hold."""

    ONE = "1 rank"
    DDP = "2 ranks, ddp"
    FSDP = "2 ranks, fsdp"

    @property
    def size(self) -> int:
        return 1 if self is Ranks.ONE else 2


@dataclass(frozen=True)
class Case:
    """One run that is compared with itself, stopped (or killed) and resumed.

    Attributes:
        model_type: The architecture.
        task: The task.
        source: Where the weights come from.
        ranks: The ranks.
        rows: Rows of a micro-batch.
        killed: Whether a rank is killed in the third step; otherwise the run is stopped after the second.
    """

    model_type: str
    task: str
    source: Source
    ranks: Ranks
    rows: int
    killed: bool = False

    @property
    def label(self) -> str:
        end = "killed" if self.killed else "stopped"
        return f"{self.model_type}, {self.task}, {self.source.value}, {self.ranks.value}, rows {self.rows}, {end}"


def model_types() -> list[str]:
    """The types that can be trained on text alone."""
    return sorted({kind for table in TABLES.values() for kind in table} - NOT_TEXT.keys())


def tasks_of(model_type: str) -> list[str]:
    return [task for task, table in TABLES.items() if model_type in table]


def cases_of(model_type: str) -> Iterator[Case]:
    """All combinations for the type's first task, and three that differ in everything for each other one."""
    first, *others = tasks_of(model_type)
    for source, ranks, rows in product(Source, Ranks, (1, 2)):
        yield Case(model_type, first, source, ranks, rows)
    for task in others:
        yield Case(model_type, task, Source.CONFIG, Ranks.ONE, 2)
        yield Case(model_type, task, Source.PATH, Ranks.DDP, 1)
        yield Case(model_type, task, Source.PATH, Ranks.FSDP, 2)
    for task in (first, *others):
        yield Case(model_type, task, Source.PATH, Ranks.DDP, 2, killed=True)


def settings_of(model_type: str, task: str) -> dict[str, Any]:
    """`model.config` for a new model."""
    given = tiny_config(model_type)
    default = transformers.CONFIG_MAPPING[model_type]().to_dict()
    if task == "causal-lm" and default.get("is_decoder") is False and not default.get("is_encoder_decoder"):
        given["is_decoder"] = True  # an encoder is refused otherwise
    return given


@dataclass
class Place:
    """A folder with data for every task and pretrained models, made as they are needed.

    Attributes:
        folder: The folder; it also is the storage of the runs.
    """

    folder: Path
    _prepared: dict[tuple[str, Source], Prepared] = field(default_factory=dict)

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.folder / "runs")

    def config(self, case: Case, run: str) -> TrainingConfig:
        """The settings of a run."""
        model = (
            {"path": str(self.pretrained(case.model_type, case.task)), "task": case.task}
            if case.source is Source.PATH
            else {
                "config": settings_of(case.model_type, case.task),
                "tokenizer": {"train_bpe": VOCABULARY},
                "task": case.task,
            }
        )
        return self._config(case.task, run, model, case.rows, case.ranks)

    def _config(
        self, task: str, run: str, model: Mapping[str, Any], rows: int = 1, ranks: Ranks = Ranks.ONE
    ) -> TrainingConfig:
        data = {"train": str(self._rows(task)), "max_length": 16, "max_target_length": 8, "stride": 4}
        train = {"steps": NUM_STEPS, "batch": 4, "micro_batch": rows, "lr": 1e-2}
        body = {
            "name": run,
            "seed": 11,
            "model": model,
            "data": data,
            "train": train,
            "checkpoint": {"storage": self.storage.url, "every": STOPPED_AT},
            "scale": {"parallel": "fsdp" if ranks is Ranks.FSDP else "ddp"},
        }
        return TrainingConfig.model_validate(body)

    def _rows(self, task: str) -> Path:
        path = self.folder / f"{task}.jsonl"
        if not path.exists():
            rows: list[Row] = [ROWS[task](text) for text in islice(paragraphs(), 24)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def prepared(self, task: str, source: Source) -> Prepared:
        """The data of a task, which is the same for all model types."""
        if (task, source) not in self._prepared:
            model = {"config": {"model_type": "gpt2"}, "tokenizer": {"train_bpe": VOCABULARY}, "task": task}
            if source is Source.PATH:
                model = {"path": str(self.tokenizer_folder(task)), "task": task}
            self._prepared[task, source] = prepare(self._config(task, "data", model), self.storage)
        return self._prepared[task, source]

    def tokenizer_folder(self, task: str) -> Path:
        """A directory with the tokenizer that a new model of the task would get."""
        folder = self.folder / "tokenizers" / task
        if not folder.exists():
            folder.mkdir(parents=True)
            for name, content in tokenizer_files(self.prepared(task, Source.CONFIG).tokenizer(self.storage)).items():
                (folder / name).write_bytes(content)
        return folder

    def pretrained(self, model_type: str, task: str) -> Path:
        """The directory of a pretrained model; `rank.save_pretrained` makes it."""
        return self.folder / "pretrained" / task / model_type
