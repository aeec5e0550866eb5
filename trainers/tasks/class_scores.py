"""Scores of classes, and of entities: sequences of tags in the schemes IOB1, IOB2 and BIOES.

An entity is right if its type and both its borders are. Sequences that a scheme does not allow are read leniently, as
by the default mode of `seqeval`.
"""

import re
from collections.abc import Iterator, Sequence

import torch

from outlast.trainers.tasks.base import IGNORED

#: Columns of torchmetrics: true positives, false positives, (true negatives,) false negatives.
_HITS = [0, 1, 3]
_TAG = re.compile(r"O|[BIES](-.+)?")


def macro_f1(hits: torch.Tensor) -> float:
    """Compute the macro F1 over the classes that occur, as scikit-learn and torchmetrics do.

    `hits` holds true positives, false positives and false negatives, shape [classes, 3].
    """
    right, wrong = hits[:, 0], hits[:, 1:].sum(1)
    occurs = right + wrong > 0
    return (2 * right / (2 * right + wrong))[occurs].mean().item()


def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count true positives, false positives and false negatives, shape [classes, 3]. Labels of -100 do not count."""
    from torchmetrics.functional.classification import multiclass_stat_scores

    num_classes = logits.shape[-1]
    stat_scores = multiclass_stat_scores(logits.argmax(-1), labels, num_classes, average=None, ignore_index=IGNORED)
    return stat_scores[:, _HITS]


def count_multi_hits(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count as `count_hits`, of several classes per sample.

    Args:
        predicted: 0 or 1 for each class, shape [samples, classes]. Not logits: torchmetrics would take those that are
            all in [0, 1] for probabilities.
        labels: Likewise.
    """
    from torchmetrics.functional.classification import multilabel_stat_scores

    return multilabel_stat_scores(predicted, labels, labels.shape[-1], average=None)[:, _HITS]


def has_entities(classes: Sequence[str]) -> bool:
    """Check whether class names are tags of entities."""
    return len(classes) > 1 and "O" in classes and all(map(_TAG.fullmatch, classes))


def find_entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Iterate over the entities of a text: type, index of the first word and of the last."""
    before, kind_before, begin = "O", "", 0
    for index, tag in enumerate([*tags, "O"]):
        position, kind = tag[0], tag[1:].split("-", 1)[-1]
        if before != "O" and (before in "ES" or position in "BSO" or kind != kind_before):
            yield kind_before, begin, index - 1
        if position != "O" and (position in "BS" or before in "EOS" or kind != kind_before):
            begin = index
        before, kind_before = position, kind


def count_entities(predicted: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """Count the entities that are right, predicted and labelled, shape [3].

    Args:
        predicted: Class indexes, shape [samples, length].
        labels: Likewise; negative where a token has no label.
    """
    counts = [0, 0, 0]
    for indices, right in zip(predicted.tolist(), labels.tolist(), strict=True):
        pairs = [pair for pair in zip(indices, right, strict=True) if pair[1] >= 0]
        found, given = (set(find_entities([classes[pair[side]] for pair in pairs])) for side in (0, 1))
        counts = [total + len(each) for total, each in zip(counts, (found & given, found, given), strict=True)]
    return torch.tensor(counts, device=labels.device)


def entity_scores(counts: torch.Tensor) -> dict[str, float]:
    """Compute precision, recall and F1 over all entities from the sums of `count_entities`; 0 where there are none."""
    right, predicted, labelled = counts.tolist()
    precision, recall = (right / total if total else 0.0 for total in (predicted, labelled))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}
