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
#: Their gradient is not finite at an embedding of zeros: padding and the end of a document must be two tokens.
DIVIDES_BY_NORM = ("dory", "gemma3n_text")
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
        killed: Whether a rank is killed in the fourth step; otherwise the run is stopped after the third.
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
    """All combinations for the type's first task, and one for each kind of ranks for the others.

    One case of each task is killed, the others are stopped.
    """
    first, *others = tasks_of(model_type)
    killed = (Source.PATH, Ranks.DDP, 2)
    for source, ranks, rows in product(Source, Ranks, (1, 2)):
        is_killed = (source, ranks, rows) == killed
        yield Case(model_type, first, source, ranks, rows, is_killed)
    for task in others:
        yield Case(model_type, task, Source.CONFIG, Ranks.ONE, 2)
        yield Case(model_type, task, Source.PATH, Ranks.DDP, 2, killed=True)
        yield Case(model_type, task, Source.PATH, Ranks.FSDP, 2)


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
    _prepared: dict[tuple[str, str, bool], Prepared] = field(default_factory=dict)

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.folder / "runs")

    def config(self, case: Case, run: str) -> TrainingConfig:
        """The settings of a run."""
        if case.source is Source.PATH:
            model: dict[str, Any] = {"path": str(self.pretrained(case))}
        else:
            tokenizer: dict[str, Any] = {"train_bpe": VOCABULARY}
            if tokens_of(case) != case.task:
                tokenizer = {"path": str(self.tokenizer_folder(tokens_of(case)))}
            model = {"config": settings_of(case.model_type, case.task), "tokenizer": tokenizer}
        return self._config(case.task, run, {**model, "task": case.task}, case.rows, case.ranks, case.killed)

    def _config(
        self,
        task: str,
        run: str,
        model: Mapping[str, Any],
        rows: int = 1,
        ranks: Ranks = Ranks.ONE,
        killed: bool = False,
    ) -> TrainingConfig:
        data = {"train": str(self._rows(task)), "max_length": 16, "max_target_length": 8, "stride": 4}
        train = {"steps": NUM_STEPS, "batch": 4, "micro_batch": rows, "lr": 1e-3}
        body = {
            "name": run,
            "seed": 11,
            "model": model,
            "data": data,
            "train": train,
            # A killed rank must not lose the save of an earlier step.
            "checkpoint": {"storage": self.storage.url, "every": STOPPED_AT, "overlap": not killed},
            "scale": {"parallel": "fsdp" if ranks is Ranks.FSDP else "ddp"},
        }
        return TrainingConfig.model_validate(body)

    def _rows(self, task: str) -> Path:
        path = self.folder / f"{task}.jsonl"
        if not path.exists():
            rows: list[Row] = [ROWS[task](text) for text in islice(paragraphs(), 24)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def prepared(self, case: Case) -> Prepared:
        """The data of a case, which is the same for all model types with such a tokenizer."""
        tokens = tokens_of(case)
        key = (case.task, tokens, case.source is Source.CONFIG and tokens == case.task)
        if key not in self._prepared:
            new = {"config": {"model_type": "gpt2"}, "tokenizer": {"train_bpe": VOCABULARY}}
            model = new if key[2] else {"path": str(self.tokenizer_folder(tokens))}
            config = self._config(case.task, "data", {**model, "task": case.task})
            self._prepared[key] = prepare(config, self.storage)
        return self._prepared[key]

    def tokenizer_folder(self, task: str) -> Path:
        """A directory with the tokenizer that a new model of the task would get."""
        folder = self.folder / "tokenizers" / task
        if not folder.exists():
            prepared = self.prepared(Case("gpt2", task, Source.CONFIG, Ranks.ONE, 1))
            folder.mkdir(parents=True)
            for name, content in tokenizer_files(prepared.tokenizer(self.storage)).items():
                (folder / name).write_bytes(content)
        return folder

    def pretrained(self, case: Case) -> Path:
        """The directory of a pretrained model; `rank.save_pretrained` makes it."""
        return self.folder / "pretrained" / case.task / case.model_type


def tokens_of(case: Case) -> str:
    """The task whose tokenizer the model has: BART and others classify from the end token."""
    is_pair = transformers.CONFIG_MAPPING[case.model_type]().is_encoder_decoder
    needs_end = is_pair and case.task == "sequence-classification"
    return "seq2seq-lm" if needs_end or case.model_type in DIVIDES_BY_NORM else case.task
