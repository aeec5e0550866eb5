"""Extractive question answering: the span of a context that answers a question."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS, Batch, Record, Sums, Task, ints, require_fast

MAX_ANSWER_TOKENS = 30
NUM_STARTS = 20


class QuestionAnswering(Task):
    """Predict the first and the last token of the answer. A long context is split into windows, each a sample.

    The target of a window without the answer is its first token, which is not part of the context. If a row has several
    answers, the first one is the target.
    """

    auto_class = "AutoModelForQuestionAnswering"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("question", ColumnType.TEXT),
        Column("context", ColumnType.TEXT),
        Column("answers", ColumnType.ANSWERS, is_target=True),
    )
    options = ("stride",)
    version = 2
    splits = True
    targets = ("start", "end")
    special_tokens = BERT_TOKENS
    template = BERT_TEMPLATE

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        require_fast(tokenizer, "question-answering")
        if not tokenizer.inner.num_special_tokens_to_add(pair=True):
            raise ConfigError(
                "the tokenizer adds no special token before a question, which question-answering needs",
                hint="use the tokenizer of a model such as BERT",
            )

    def fault(self, record: Record) -> str | None:
        try:
            span = _span(record)
        except ValueError as error:
            return str(error)
        if span is not None:
            begin, end = _trim(span, record["context"])
            if begin == end:
                return "its answer is empty"
        return self._question_fault(record)

    @property
    def _stride(self) -> int:
        """Overlap of two windows, in tokens."""
        return min(self.settings.stride, self.settings.max_length // 4)

    def _question_fault(self, record: Record) -> str | None:
        """Return why the question leaves too few tokens for the context; None if it leaves enough."""
        inner, length = self.tokenizer.inner, self.settings.max_length

        def num_tokens(text: str) -> int:
            return len(inner(text, add_special_tokens=False, verbose=False)["input_ids"])

        question = num_tokens(record["question"].strip())
        room = length - inner.num_special_tokens_to_add(pair=True) - question
        if room > self._stride or (room > 0 and num_tokens(record["context"]) <= room):
            return None
        return (
            f"its question has {question} tokens, which leaves {max(room, 0)} of data.max_length {length} for the "
            f"context, and windows of it overlap by {self._stride} (data.stride)"
        )

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record, windows in zip(records, self._windows(records), strict=True):
            span = _span(record) if "answers" in record else None
            tokens = [_tokens_of(window, span) if span else (0, 0) for window in windows]
            if span and not any(end for _, end in tokens):  # many tokenizers have no token of a space at an end
                tokens = [_tokens_of(window, _trim(span, record["context"])) for window in windows]
            for window, (start, end) in zip(windows, tokens, strict=True):
                sample = {"input_ids": ints(window.ids), "start": ints([start]), "end": ints([end])}
                if "token_type_ids" in self.tokenizer.inner.model_input_names:
                    sample["token_type_ids"] = ints(window.type_ids)
                yield sample

    def _windows(self, records: Sequence[Record]) -> list[list[Any]]:
        """Return the windows of each row, encodings of `tokenizers`."""
        length = self.settings.max_length
        encoded = self.tokenizer.inner(
            [record["question"].strip() for record in records],
            [record["context"] for record in records],
            truncation="only_second",
            max_length=length,
            stride=self._stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows: list[list[Any]] = [[] for _ in records]
        for row, window in zip(encoded["overflow_to_sample_mapping"], encoded.encodings, strict=True):
            windows[row].append(window)
        return windows

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        batch = super().collate(samples, keys)
        return {**batch, "start": batch["start"][:, 0], "end": batch["end"][:, 0]}

    def configure(self, config: Any) -> None:
        super().configure(config)
        config.num_labels = 2  # a first and a last token, whatever the head of the files was for

    def count(self, batch: Batch) -> int:
        return len(batch["start"])

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        start, end = _logits(outputs, batch)
        first = functional.cross_entropy(start, batch["start"], reduction="sum")
        return (first + functional.cross_entropy(end, batch["end"], reduction="sum")) / 2

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exact_match", "f1")

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        """Count exact spans, and sum the F1 overlap of predicted and right span over tokens (SQuAD: over words)."""
        start, end = (logits.argmax(-1) for logits in _logits(outputs, batch))
        shared = (torch.minimum(end, batch["end"]) - torch.maximum(start, batch["start"]) + 1).clamp(min=0)
        lengths = (end - start + 1).clamp(min=0) + batch["end"] - batch["start"] + 1
        exact = ((start == batch["start"]) & (end == batch["end"])).sum()
        return {"exact": exact, "overlap": (2 * shared / lengths).double().sum()}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        count = sums["count"].item()
        return {"exact_match": sums["exact"].item() / count, "f1": sums["overlap"].item() / count}

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """Predict the best span over all windows of a context, as text; empty where the model finds no answer."""
        device = next(model.parameters()).device
        for record in records:
            [windows] = self._windows([record])
            samples = list(self.encode([{name: record[name] for name in ("question", "context")}]))
            best = (-float("inf"), 0, 0)
            for window, sample in zip(windows, samples, strict=True):
                batch = {name: value.to(device) for name, value in self.collate([sample], [0]).items()}
                outputs = self.forward(model, batch)
                starts, ends = outputs.start_logits[0].float().cpu(), outputs.end_logits[0].float().cpu()
                best = max(best, *_spans(window, starts, ends))
            score, start, end = best
            answer = record["context"][start:end]
            yield {"question": record["question"], "answer": answer, "start": start, "end": end, "score": score}


def _logits(outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return start and end logits, float32. Padding is masked: the answer must not depend on the batch's length."""
    is_padding = batch["attention_mask"] == 0
    start, end = outputs.start_logits.float(), outputs.end_logits.float()
    return start.masked_fill(is_padding, -torch.inf), end.masked_fill(is_padding, -torch.inf)


def _span(record: Record) -> tuple[int, int] | None:
    """Return the character span [start, stop) of the answer in the context; None for a row without an answer.

    Raises ValueError if the answer is not in the context, or not at `answer_start`.
    """
    answers, context = record["answers"], record["context"]
    texts = answers["text"] if isinstance(answers, dict) else answers
    starts = answers.get("answer_start") if isinstance(answers, dict) else None
    texts = [texts] if isinstance(texts, str) else texts
    starts = [starts] if isinstance(starts, int) else starts
    if not texts:
        return None
    found = context.find(texts[0])
    start = starts[0] if starts else found
    if not isinstance(start, int):
        raise ValueError(f"its answer_start is {start!r}, not a whole number")
    if start < 0 or context[start : start + len(texts[0])] != texts[0]:
        where = f" at answer_start {start}" if starts else ""
        raise ValueError(
            f"its answer {texts[0][:60]!r} is not in the context{where}"
            + (f"; it begins at character {found}" if starts and found >= 0 else "")
        )
    return start, start + len(texts[0])


def _trim(span: tuple[int, int], context: str) -> tuple[int, int]:
    """Return the span without spaces and invisible characters at its ends; an empty one if it has no others."""
    shown = [position for position in range(*span) if _is_visible(context[position])]
    return (shown[0], shown[-1] + 1) if shown else (span[0], span[0])


def _is_visible(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")


def _tokens_of(window: Any, span: tuple[int, int]) -> tuple[int, int]:
    """Return the first and last token of the span in a window; (0, 0) unless the window contains all of it.

    Of several tokens of one character, such as the mark of a word's beginning, the last one begins the span and the
    first one ends it, as in the examples of transformers, unless that is no span.
    """
    inside = [
        position
        for position, (sequence, (begin, end)) in enumerate(zip(window.sequence_ids, window.offsets, strict=True))
        if sequence == 1 and begin < span[1] and end > span[0]
    ]
    begins = [position for position in inside if window.offsets[position][0] <= span[0]]
    ends = [position for position in inside if window.offsets[position][1] >= span[1]]
    if not begins or not ends:
        return 0, 0
    return (begins[-1], ends[0]) if begins[-1] <= ends[0] else (inside[0], inside[-1])


def _spans(window: Any, starts: torch.Tensor, ends: torch.Tensor) -> list[tuple[float, int, int]]:
    """Return the most likely spans of a window as (score, start, stop) in characters; (score, 0, 0) is no answer."""
    context = [position for position, sequence in enumerate(window.sequence_ids) if sequence == 1]
    spans = [((starts[0] + ends[0]).item(), 0, 0)]
    for start in sorted(context, key=lambda position: -starts[position].item())[:NUM_STARTS]:
        in_reach = [position for position in context if start <= position < start + MAX_ANSWER_TOKENS]
        end = max(in_reach, key=lambda position: ends[position].item())
        spans.append(((starts[start] + ends[end]).item(), window.offsets[start][0], window.offsets[end][1]))
    return spans
