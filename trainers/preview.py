"""Prepared samples as text, with the learned tokens marked.

Texts are decoded from the samples as a batch gives them to the model, never taken from the rows: a mistake of the
preparation must show. Nothing here formats for a terminal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from outlast.checkpointing.storage.base import Storage
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.batch_plan import derive_seed
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import IGNORED, Task, find_task
from outlast.trainers.tasks.causal_lm import CausalLM
from outlast.trainers.tasks.chat import Chat
from outlast.trainers.tasks.classification import SequenceClassification
from outlast.trainers.tasks.masked_lm import MaskedLM
from outlast.trainers.tasks.multiple_choice import DoubleHeads, MultipleChoice
from outlast.trainers.tasks.question_answering import QuestionAnswering
from outlast.trainers.tasks.seq2seq import Seq2SeqLM
from outlast.trainers.tasks.token_classification import TokenClassification

_NUM_VALUES = 20


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens that are alike."""

    text: str  #: as the model gets it, special tokens included
    is_learned: bool  #: whether the model learns to predict it, or to find or tag it
    target: str = ""  #: what is to be predicted there, if it is not the text itself


@dataclass(frozen=True, slots=True)
class Passage:
    """One text of a sample."""

    name: str  #: such as `text`, `source` or `choice 0`
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class PreviewSample:
    """A sample to show."""

    number: int  #: in its split, from 0
    num_tokens: int
    passages: tuple[Passage, ...]
    targets: Mapping[str, str]  #: what is predicted of the whole sample, by name, such as its label


def preview_samples(
    config: TrainingConfig, prepared: Prepared, storage: Storage, split: str, count: int
) -> list[PreviewSample]:
    """Return the first samples of a split."""
    task = find_task(config.model.task)(config.data, prepared.tokenizer(storage), prepared.facts)
    samples = prepared.split(storage, split)
    numbers = range(min(count, len(samples)))
    return [
        PreviewSample(
            number, sample["input_ids"].size if "input_ids" in sample else 0, *_describe_sample(task, sample, key)
        )
        for number, sample in zip(numbers, samples.take(numbers), strict=True)
        for key in [derive_seed(config.seed, 0, number)]  # of the first epoch
    ]


def _describe_sample(task: Task, sample: Sample, key: int) -> tuple[tuple[Passage, ...], dict[str, str]]:
    """Return the texts of a sample and its targets; `key` is the seed of its randomness."""
    if "input_ids" not in sample:
        return (), _values(sample)
    inner, ids = task.tokenizer.inner, sample["input_ids"].tolist()
    labels = sample["labels"].tolist() if "labels" in sample else None
    match task:
        case MaskedLM():
            batch = task.collate([sample], [key])
            ids, masked = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
            return (Passage("text", _segments(inner, ids, _decoded(inner, masked))),), {}
        case QuestionAnswering():
            return _question(inner, ids, int(sample["start"][0]), int(sample["end"][0]))
        case MultipleChoice():
            return _choices(inner, ids, sample, learns_text=isinstance(task, DoubleHeads))
        case SequenceClassification():
            return (Passage("text", _segments(inner, ids)),), {"label": _label(task, labels)} if labels else {}
        case TokenClassification() if labels is not None:
            return (Passage("text", _words(task, ids, labels)),), {}
        case Seq2SeqLM() if labels is not None:
            target = [token for token in labels if token != IGNORED]
            source = Passage("source", _segments(inner, ids))
            return (source, Passage("target", _segments(inner, target, [""] * len(target)))), {}
        case CausalLM() | Chat():
            targets = ids if labels is None else labels
            learned = [None, *("" if label != IGNORED else None for label in targets[1:])]
            return (Passage("text", _segments(inner, ids, learned)),), {}
    return _user_sample(inner, ids, sample)


def _user_sample(inner: Any, ids: Sequence[int], sample: Sample) -> tuple[tuple[Passage, ...], dict[str, str]]:
    """Show a sample of a user's task: labels of the length of the text belong to its tokens."""
    labels = sample["labels"].tolist() if "labels" in sample else []
    if len(labels) != len(ids):
        return (Passage("text", _segments(inner, ids)),), _values(sample)
    pairs = zip(ids, labels, strict=True)
    learned = [None if label == IGNORED else "" if label == token else f"{label}" for token, label in pairs]
    rest = {name: vector for name, vector in sample.items() if name != "labels"}
    return (Passage("text", _segments(inner, ids, learned)),), _values(rest)


def _values(sample: Sample) -> dict[str, str]:
    """Return the vectors of a sample other than its tokens as texts, long ones cut."""
    vectors = {name: vector.tolist() for name, vector in sample.items() if name not in ("input_ids", "token_type_ids")}
    return {
        name: ", ".join(f"{value:g}" for value in values[:_NUM_VALUES]) + (", …" if len(values) > _NUM_VALUES else "")
        for name, values in vectors.items()
    }


def _decode(inner: Any, ids: Sequence[int]) -> str:
    return str(inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _decoded(inner: Any, labels: Sequence[int]) -> list[str | None]:
    """Return the text of each label's token; None where there is no label."""
    return [None if label == IGNORED else _decode(inner, [label]) for label in labels]


def _segments(inner: Any, ids: Sequence[int], targets: Sequence[str | None] = ()) -> tuple[Segment, ...]:
    """Decode tokens in segments that are alike.

    Args:
        inner: The tokenizer.
        ids: The tokens.
        targets: What each token is to be predicted as, empty for the token itself; None where nothing is learned.
    """
    full, texts, begin, end = _decode(inner, ids), list[Segment](), 0, 0
    each = enumerate(targets or [None] * len(ids))
    for (target, _), group in groupby(each, lambda item: (item[1], item[0] if item[1] else -1)):
        end += len(list(group))
        stop = len(full) if end == len(ids) else _length_of_prefix(full, _decode(inner, ids[:end]))
        texts.append(Segment(full[begin : max(begin, stop)], target is not None, target or ""))
        begin = max(begin, stop)
    return tuple(texts)


def _length_of_prefix(full: str, prefix: str) -> int:
    """Return how much of `full` its tokens so far are: a character may consist of several tokens."""
    different = next((at for at, pair in enumerate(zip(full, prefix, strict=False)) if pair[0] != pair[1]), None)
    return min(len(full), len(prefix)) if different is None else different


def _question(inner: Any, ids: Sequence[int], start: int, end: int) -> tuple[tuple[Passage, ...], dict[str, str]]:
    if (start, end) == (0, 0):
        return (Passage("text", _segments(inner, ids)),), {"answer": "none in this window"}
    targets = ["" if start <= position <= end else None for position in range(len(ids))]
    return (Passage("text", _segments(inner, ids, targets)),), {"answer": _decode(inner, ids[start : end + 1]).strip()}


def _choices(
    inner: Any, ids: Sequence[int], sample: Sample, *, learns_text: bool
) -> tuple[tuple[Passage, ...], dict[str, str]]:
    passages, at = list[Passage](), 0
    right = int(sample["labels"][0]) if "labels" in sample else None
    for number, length in enumerate(sample["lengths"].tolist()):
        is_learned = learns_text and number == right
        targets = [None, *[""] * (length - 1)] if is_learned else []
        passages.append(Passage(f"choice {number}", _segments(inner, ids[at : at + length], targets)))
        at += length
    return tuple(passages), {} if right is None else {"label": f"choice {right}"}


def _label(task: SequenceClassification, labels: Sequence[float]) -> str:
    if not task.classes:
        return f"{labels[0]:g}"
    if len(labels) == 1:
        return str(task.classes[int(labels[0])])
    return ", ".join(name for name, value in zip(task.classes, labels, strict=True) if value) or "none"


def _words(task: TokenClassification, ids: Sequence[int], labels: Sequence[int]) -> tuple[Segment, ...]:
    """Return the tokens with their tags; a token without one is not learned, as all but the first of a word."""
    tags = [None if label == IGNORED else str(task.classes[label]) for label in labels]
    inner = task.tokenizer.inner
    full, segments, begin = _decode(inner, ids), list[Segment](), 0
    for end, tag in enumerate(tags, 1):
        stop = len(full) if end == len(ids) else max(begin, _length_of_prefix(full, _decode(inner, ids[:end])))
        segments.append(Segment(full[begin:stop], tag is not None, tag or ""))
        begin = stop
    return tuple(segments)
