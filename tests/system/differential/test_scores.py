"""The scores of an evaluation equal scikit-learn's on the plain predictions of transformers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from tests.system.differential.reference import IGNORED
from tests.system.differential.work import evaluate_once

Prediction = tuple[list[float], Any, float, int]


def _classes(predictions: Sequence[Prediction], names: dict[int, str]) -> dict[str, float]:
    right, found = [item[0][0] for item in predictions], [int(np.argmax(item[1])) for item in predictions]
    return {"accuracy": metrics.accuracy_score(right, found), "f1": metrics.f1_score(right, found, average="macro")}


def _topics(predictions: Sequence[Prediction], names: dict[int, str]) -> dict[str, float]:
    right = np.array([item[0] for item in predictions], dtype=int)
    found = (np.array([item[1] for item in predictions]) > 0).astype(int)
    occurs = [index for index in range(len(names)) if right[:, index].any() or found[:, index].any()]
    return {
        "accuracy": 1 - metrics.hamming_loss(right, found),
        "f1": metrics.f1_score(right, found, average="macro", labels=occurs),
    }


def _numbers(predictions: Sequence[Prediction], names: dict[int, str]) -> dict[str, float]:
    right, found = [item[0][0] for item in predictions], [item[1][0] for item in predictions]
    return {"mse": metrics.mean_squared_error(right, found), "mae": metrics.mean_absolute_error(right, found)}


def _tags(predictions: Sequence[Prediction], names: dict[int, str]) -> dict[str, float]:
    pairs = [
        (label, int(np.argmax(logits)))
        for labels, rows, *_ in predictions
        for label, logits in zip(labels, rows, strict=True)
        if label != IGNORED
    ]
    right, found = zip(*pairs, strict=True)
    return {"accuracy": metrics.accuracy_score(right, found), "f1": metrics.f1_score(right, found, average="macro")}


def _choices(predictions: Sequence[Prediction], names: dict[int, str]) -> dict[str, float]:
    right, found = [item[0][0] for item in predictions], [int(np.argmax(item[1])) for item in predictions]
    return {"accuracy": metrics.accuracy_score(right, found)}


def _answers(predictions: Sequence[Prediction], names: dict[int, str]) -> dict[str, float]:
    exact, overlaps = [], []
    for (start, end), (starts, ends), *_ in predictions:
        first, last = int(np.argmax(starts)), int(np.argmax(ends))
        found, right = set(range(first, last + 1)), set(range(int(start), int(end) + 1))
        exact.append((first, last) == (start, end))
        overlaps.append(2 * len(found & right) / (len(found) + len(right)))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlaps))}


SCORES: dict[str, tuple[str, Callable[[Sequence[Prediction], dict[int, str]], dict[str, float]]]] = {
    "classes": ("llama", _classes),
    "pairs": ("bert", _classes),
    "multi-label": ("roberta", _topics),
    "regression": ("qwen2", _numbers),
    "tags": ("deberta-v2", _tags),
    "choices": ("electra", _choices),
    "answers": ("bert", _answers),
    "causal-lm": ("gpt2", lambda predictions, names: {}),
    "chat": ("llama", lambda predictions, names: {}),
    "seq2seq": ("t5", lambda predictions, names: {}),
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_those_of_scikit_learn(kind: str, process: ProcessPoolExecutor, tmp_path: Path) -> None:
    name, compute = SCORES[kind]
    found = process.submit(evaluate_once, name, kind, str(tmp_path), 3).result()
    predictions = found["predictions"]
    terms = sum(item[3] for item in predictions)
    expected = {"loss": sum(item[2] * item[3] for item in predictions) / terms, **compute(predictions, found["labels"])}
    scores = {key.removeprefix("eval_"): value for key, value in found["scores"].items() if key.startswith("eval_")}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-5)
