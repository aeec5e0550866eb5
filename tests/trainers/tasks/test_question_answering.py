"""Questions that are too long, and answers that do not fit their context, are bad rows by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.tokenizer import Tokenizer, train_bpe
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS
from outlast.trainers.tasks.question_answering import QuestionAnswering
from tests.support.groups.worker_group import tiny_config
from tests.support.tasks.cases import BERT, paragraphs

SKY = "the sky is blue because it is"
GOOD = {"question": "what?", "context": SKY, "answers": {"text": ["sky"], "answer_start": [4]}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(paragraphs(), 400, BERT_TOKENS, BERT_TEMPLATE).inner


def config_of(tokenizer: Any, folder: Path, rows: list[dict[str, Any]], **data: Any) -> TrainingConfig:
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"config": BERT, "task": "question-answering", "tokenizer": {"path": str(folder / "tokenizer")}},
        "data": {"train": str(path), "eval": None, "max_length": 32, **data},
    }
    return tiny_config("qa", LocalStorage(folder / "store").url, str(path), sections=sections, eval_every=None)


def prepared(tokenizer: Any, folder: Path, rows: list[dict[str, Any]], **data: Any) -> Prepared:
    return prepare(config_of(tokenizer, folder, rows, **data), LocalStorage(folder / "store"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "why " * 40, "context": SKY},
            r"its question has \d+ tokens, which leaves 0 of data\.max_length 32",
        ),
        ({"question": "why " * 40, "answers": []}, "its question has"),
        (
            {"answers": {"text": ["sky"], "answer_start": [5]}},
            "'sky' is not in the context at answer_start 5; it begins",
        ),
        ({"answers": {"text": ["sky"], "answer_start": [-1]}}, "'sky' is not in the context at answer_start -1"),
        ({"answers": {"text": ["sky"], "answer_start": [4.0]}}, r"answer_start is 4\.0, not a whole number"),
        ({"answers": "moon"}, "'moon' is not in the context"),
        ({"answers": ""}, "its answer is empty"),
    ],
)
def test_bad_rows_are_named(tokenizer: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, row 3: .*{message}"):
        prepared(tokenizer, tmp_path, [GOOD, GOOD, {**GOOD, **row}])


def test_bad_rows_can_be_skipped(tokenizer: Any, tmp_path: Path) -> None:
    found = prepared(tokenizer, tmp_path, [{**GOOD, "question": "why " * 40}, GOOD], max_bad_rows=1)
    assert (found.num_rows, found.num_bad_rows) == ({"train": 1}, 1)


@pytest.mark.parametrize("num_words", range(1, 32))
@pytest.mark.parametrize("stride", [0, 6, 64])
def test_every_question_is_used_or_named(tokenizer: Any, num_words: int, stride: int) -> None:
    """Just those questions are refused for which the tokenizer finds no windows."""
    task = QuestionAnswering(DataSettings(train="none", max_length=32, stride=stride), Tokenizer(tokenizer), {})
    for context in (SKY, "a", f"{SKY} " * 9):
        row: dict[str, Any] = {"question": "a " * num_words, "context": context, "answers": []}
        options = {"truncation": "only_second", "max_length": 32, "return_overflowing_tokens": True}
        options["stride"] = min(stride, 8)
        if task.fault(row) is None:
            windows = tokenizer(row["question"].strip(), context, **options)["input_ids"]
            assert [sample["input_ids"].tolist() for sample in task.encode([row])] == windows
        else:
            with pytest.raises(
                BaseException, match=r"Truncation error|stride"
            ):  # a panic of tokenizers is no Exception
                tokenizer(row["question"].strip(), context, **options)


def test_an_unanswerable_question_points_at_the_first_token(tokenizer: Any, tmp_path: Path) -> None:
    """As SQuAD 2.0 has them, and as the examples of transformers learn them."""
    rows = [{**GOOD, "answers": {"text": [], "answer_start": []}}, GOOD]
    storage = LocalStorage(tmp_path / "store")
    split = prepared(tokenizer, tmp_path, rows).split(storage, "train")
    first, second = split.take(range(2))
    assert (first["start"].tolist(), first["end"].tolist()) == ([0], [0])
    begin, end = second["start"][0], second["end"][0]
    assert tokenizer.decode(second["input_ids"][begin : end + 1]).strip() == "sky"


def test_padding_on_the_left_changes_nothing(tokenizer: Any, tmp_path: Path) -> None:
    left = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, padding_side="left", **BERT_TOKENS
    )
    rows = [GOOD, {**GOOD, "context": f"{SKY} " * 9}]
    storage, found = LocalStorage(tmp_path / "store"), []
    for each in (tokenizer, left):
        split = prepared(each, tmp_path, rows).split(storage, "train")
        found.append([{key: value.tolist() for key, value in item.items()} for item in split.take(range(len(split)))])
    assert found[0] == found[1]


def test_an_answer_of_one_character_with_several_tokens(tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "what?", "context": "the \N{PARTY POPPER} is here", "answers": ["\N{PARTY POPPER}"]}
    made = prepared(tokenizer, tmp_path, [row])
    [sample] = made.split(LocalStorage(tmp_path / "store"), "train").take([0])
    ids = sample["input_ids"][int(sample["start"][0]) : int(sample["end"][0]) + 1]
    assert len(ids) > 1
    assert tokenizer.decode(ids.tolist()).strip() == "\N{PARTY POPPER}"


def of_example(tokenizer: Any, question: str, context: str, start: int, text: str) -> tuple[int, int]:
    """Return the tokens of an answer as the example of transformers (run_qa.py) does, for a context in one window."""
    encoded = tokenizer(question, context, return_offsets_mapping=True)
    offsets, sequences = encoded["offset_mapping"], encoded.sequence_ids()
    first, last = sequences.index(1), len(sequences) - 1
    while sequences[last] != 1:
        last -= 1
    while first < len(offsets) and offsets[first][0] <= start:
        first += 1
    while offsets[last][1] >= start + len(text):
        last -= 1
    return first - 1, last + 1


@pytest.mark.parametrize("text", ["sky ", " sky", " sky ", "sky\u200b", "sky\n", "\u00a0\tsky", " blue\n"])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_spaces_around_an_answer(tokenizer: Any, tmp_path: Path, text: str, kind: str) -> None:
    """Such tokenizers have no token of a space alone; the answer is that without it."""
    if kind == "words":
        words = {name: number for number, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sky", "x"])}
        tokenizer = transformers.BertTokenizer(vocab=words)
    context = f"the {text} is x, x sky"
    start, plain = context.index(text), text.strip(" \n\t\u200b\u00a0")
    row = {"question": "what?", "context": context, "answers": {"text": [text], "answer_start": [start]}}
    made = prepared(tokenizer, tmp_path, [row])
    [sample] = made.split(LocalStorage(tmp_path / "store"), "train").take([0])
    expected = of_example(tokenizer, "what?", context, context.index(plain), plain)
    assert expected > (0, 0)
    found = int(sample["start"][0]), int(sample["end"][0])
    if kind == "words":
        assert found == expected
    else:  # a byte-level tokenizer may have a token of the space
        assert found[0] <= expected[0] <= expected[1] <= found[1] <= expected[1] + 2


def test_an_answer_of_spaces_is_a_bad_row(tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "what?", "context": SKY, "answers": {"text": [" "], "answer_start": [3]}}
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 1: its answer is empty"):
        prepared(tokenizer, tmp_path, [row])


def test_rows_that_are_all_unusable_are_named(tokenizer: Any, tmp_path: Path) -> None:
    """The limit of bad rows allows them, but no row is left: the error has their reasons."""
    rows = [{**GOOD, "answers": {"text": ["sky"], "answer_start": [number]}} for number in (5, 6)]
    with pytest.raises(ConfigError, match="the train split has no usable row; the first unusable ones:") as caught:
        prepared(tokenizer, tmp_path, rows, max_bad_rows=9)
    assert "rows.jsonl, row 1: its answer 'sky' is not in the context at answer_start 5" in caught.value.message
    assert "rows.jsonl, row 2: " in caught.value.message
