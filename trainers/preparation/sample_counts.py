"""Counts of rows that the model does not see whole, or that hold nothing: of the samples of any task, a user's too."""

from collections.abc import Sequence

from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import texts_in
from outlast.trainers.tasks.base import Record, Task

#: Settings that limit a sample, with the vector that they limit.
LIMITS = {"max_length": "input_ids", "max_target_length": "labels"}


def count_cut(task: Task, records: Sequence[Record], samples: Sequence[Sample]) -> int:
    """Count the rows whose sample would be longer if one more token were allowed. Without truncation there are none."""
    if task.packs or task.splits or len(samples) != len(records):
        return 0
    names = [name for name in LIMITS if name == "max_length" or name in task.options]
    full = [
        index
        for index, sample in enumerate(samples)
        if any(_length(sample, LIMITS[name]) >= getattr(task.settings, name) for name in names)
    ]
    if not full:
        return 0
    wider = task.settings.model_copy(update={name: getattr(task.settings, name) + 1 for name in names})
    longer = list(type(task)(wider, task.tokenizer, task.facts).encode([records[index] for index in full]))
    if len(longer) != len(full):
        return 0
    pairs = [(samples[index], more) for index, more in zip(full, longer, strict=True)]
    return sum(any(more[name].size > sample[name].size for name in sample) for sample, more in pairs)


def _length(sample: Sample, name: str) -> int:
    """Return the length of the sample, or of its longest choice."""
    if name == "input_ids" and "lengths" in sample:
        return int(sample["lengths"].max())
    return sample[name].size if name in sample else 0


def count_empty(task: Task, records: Sequence[Record], samples: Sequence[Sample]) -> int:
    """Count the rows that have no token but special ones; where rows are split, those without any text."""
    if task.splits or len(samples) != len(records):
        roles = [column.role for column in task.columns if not column.is_target]
        return sum(not any(text.strip() for text in texts_in([row.get(role) for role in roles])) for row in records)
    inner = task.tokenizer.inner
    special = {token for token in inner.all_special_ids if token != inner.unk_token_id}
    return sum(special.issuperset(sample["input_ids"].tolist()) for sample in samples if "input_ids" in sample)
