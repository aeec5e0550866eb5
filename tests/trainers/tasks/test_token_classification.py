"""Words and their tags: tokens as within a text, words without a token, and scores of entities."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tasks.class_scores import count_entities, entity_scores, has_entities
from outlast.trainers.tasks.token_classification import TokenClassification
from tests.support.tasks.cases import BERT

TEXT = "Software Foundation makes licenses for the software of foundations, and of others; it is what makes software."
WORDS = ["Software", "Foundation", "makes", "licenses", ",", "of", "others"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level(before: Any = None, **options: Any) -> Backend:
    inner = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    inner.pre_tokenizer = level if before is None else pre_tokenizers.Sequence([before, level])
    inner.decoder = decoders.ByteLevel()
    return inner


def llama_3() -> Backend:
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)


def sentencepiece(scheme: str) -> Backend:
    inner = Backend(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return inner


def llama_2() -> Backend:
    inner = Backend(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


def word_piece() -> Backend:
    inner = Backend(models.WordPiece(unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return inner


BACKENDS: dict[str, Callable[[], Backend]] = {
    "roberta": byte_level,
    "roberta with a prefix space": lambda: byte_level(add_prefix_space=True),
    "llama 3": llama_3,
    "bert": word_piece,
    "xlm": lambda: sentencepiece("always"),
    "mistral": lambda: sentencepiece("first"),
    "llama 2": llama_2,
}


def tokenizer_of(kind: str) -> Any:
    inner = BACKENDS[kind]()
    is_byte_level = "roberta" in kind or kind == "llama 3"
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
    learn = trainers.WordPieceTrainer if kind == "bert" else trainers.BpeTrainer
    inner.train_from_iterator(
        [TEXT] * 3 if is_byte_level else TEXT.split() * 3,
        learn(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B", [("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def task_of(inner: Any, classes: tuple[str, ...] = ("B", "I", "O"), **settings: Any) -> TokenClassification:
    return TokenClassification(DataSettings(train="-", **settings), Tokenizer(inner), {"classes": list(classes)})


@pytest.mark.parametrize("kind", BACKENDS)
def test_words_have_the_tokens_that_they_have_in_a_text(kind: str) -> None:
    inner = tokenizer_of(kind)
    words = WORDS[:4]
    [sample] = task_of(inner).encode([{"tokens": words, "tags": ["B", "I", "O", "O"]}])
    ids = sample["input_ids"].tolist()
    in_text = inner("x " + " ".join(words), add_special_tokens=False)["input_ids"]
    assert ids[1:-1] == in_text[-len(ids[1:-1]) :]
    assert len(in_text) - len(ids[1:-1]) in (1, 2), "the rest is the first word"
    assert [label for label in sample["labels"].tolist() if label >= 0] == [0, 1, 2, 2]


@pytest.mark.parametrize("kind", ["roberta", "bert", "xlm"])
def test_samples_are_those_of_the_examples_of_transformers(kind: str) -> None:
    """They load a byte-level tokenizer with `add_prefix_space=True`, and label the first token of each word."""
    inner = tokenizer_of(kind)
    if kind == "roberta":
        plain = tokenizer_of("roberta")
        plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        plain = inner
    encoded = plain(WORDS, is_split_into_words=True)
    numbers, labels, before = [0, 1, 2, 2, 2, 2, 2], [], None
    for word in encoded.word_ids():
        labels.append(-100 if word is None or word == before else numbers[word])
        before = word
    tags = [("B", "I", "O")[number] for number in numbers]
    [sample] = task_of(inner).encode([{"tokens": WORDS, "tags": tags}])
    assert sample["input_ids"].tolist() == encoded["input_ids"]
    assert sample["labels"].tolist() == labels


def test_a_prediction_reads_the_words_as_training_does() -> None:
    inner = tokenizer_of("roberta")
    task, seen = task_of(inner), []

    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            seen.append(input_ids.tolist())
            logits = torch.zeros(*input_ids.shape, 3)
            logits[..., 2] = 1
            return transformers.modeling_outputs.TokenClassifierOutput(logits=logits)

    [given] = task.predict(Recorder(), [{"tokens": WORDS}])
    [sample] = task.encode([{"tokens": WORDS, "tags": ["O"] * len(WORDS)}])
    assert seen == [[sample["input_ids"].tolist()]]
    assert given == {"tokens": WORDS, "tags": ["O"] * len(WORDS)}


@pytest.mark.parametrize(
    ("kind", "word"), [("bert", ""), ("roberta", ""), ("bert", "\x00"), ("bert", "\u200d"), ("bert", " ")]
)
def test_a_word_without_a_token_is_an_unusable_row(kind: str, word: str) -> None:
    task = task_of(tokenizer_of(kind))
    fault = task.fault({"tokens": ["Software", word], "tags": ["B", "O"]})
    assert fault is not None
    assert f"word 1 of it, {word!r}, has no token" in fault
    assert task.fault({"tokens": ["Software", "…"], "tags": ["B", "O"]}) is None


def test_words_without_a_label_are_those_of_transformers() -> None:
    """Its examples put -100 where there is no label; its own losses leave these out."""
    seqeval_metrics = pytest.importorskip("seqeval.metrics", reason="needs seqeval")
    inner = tokenizer_of("bert")
    config = transformers.BertConfig(vocab_size=len(inner), num_labels=3, hidden_size=16, num_attention_heads=2)
    config.num_hidden_layers, config.intermediate_size = 1, 16
    model = transformers.BertForTokenClassification(config).eval()
    task = task_of(inner)
    rows = [["B", -100, "O", "I", "-100", "O", "O"], ["-100", "B", "I", "O", "O", -100, -100]]
    samples = list(task.encode([{"tokens": WORDS, "tags": tags} for tags in rows]))
    numbers = {"B": 0, "I": 1, "O": 2, -100: -100, "-100": -100}
    for tags, sample in zip(rows, samples, strict=True):
        words = inner(WORDS, is_split_into_words=True).word_ids()
        firsts = {word: words.index(word) for word in range(len(WORDS))}
        expected = [numbers[tags[word]] if firsts.get(word) == at else -100 for at, word in enumerate(words)]
        assert sample["labels"].tolist() == expected
    batch = task.collate(samples, [0, 0])
    outputs = model(**batch)
    torch.testing.assert_close(task.loss_sum(model, batch) / task.count(batch), outputs.loss)
    assert task.count(batch) == 9
    kept = [
        [(tag, guess) for tag, guess in zip(right, found, strict=True) if tag != -100]
        for right, found in zip(batch["labels"].tolist(), outputs.logits.argmax(-1).tolist(), strict=True)
    ]
    named = [[["BIO"[pair[side]] for pair in each] for each in kept] for side in (0, 1)]
    scores = task.scores({**task.tally(outputs, batch), "count": torch.tensor(9)})
    assert scores["accuracy"] == pytest.approx(seqeval_metrics.accuracy_score(*named))
    assert scores["entity_f1"] == pytest.approx(seqeval_metrics.f1_score(*named))


@pytest.mark.parametrize("labels", [None, ["B", "I", "O"]])
@pytest.mark.parametrize("tags", [["B", -100], ["B", "-100"], [0, -100]])
def test_the_tag_of_a_word_without_a_label_is_no_class(
    labels: list[str] | None, tags: list[Any], tmp_path: Path, assign: Callable[..., Assignment]
) -> None:
    rows = [tags, ["O", "I"] if tags[0] == "B" else [2, 1], [-100, -100], ["", tags[0]]]
    data = {"train": write(tmp_path, rows), "eval": None, "max_bad_rows": 2, "labels": labels}
    sections = {"model": {"task": "token-classification", "config": BERT}, "data": data}
    prepared = assign("words", sections=sections, eval_every=None).prepared
    expected = ["B", "I", "O"] if labels or tags[0] == "B" else ["0", "1", "2"]
    assert (prepared.facts["classes"], prepared.num_samples) == (expected, 2)
    with pytest.raises(ConfigError) as caught:
        assign("bad", sections={**sections, "data": {**data, "max_bad_rows": 1}}, eval_every=None)
    assert "rows.jsonl, row 3: it has no tag to learn: all are -100" in str(caught.value)
    assert "rows.jsonl, row 4: column 'tags' holds a list in which item 0 is '', which is no value" in str(caught.value)


def write(folder: Path, tags: list[list[Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"tokens": ["a", "b"], "tags": row}) + "\n" for row in tags))
    return str(path)


@pytest.mark.parametrize("write_list", [json.dumps, repr])
def test_lists_in_a_csv_file(
    write_list: Callable[[Any], str], tmp_path: Path, assign: Callable[..., Assignment]
) -> None:
    rows = [(["I", "don't", 'say "a"'], ["O", "O", "B-X"]), (["Oslo"], ["B-X"])]
    written = [[write_list(item) for item in row] for row in rows]
    pd.DataFrame(written, columns=["words", "tags"]).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows, columns=["words", "tags"]).to_parquet(tmp_path / "rows.parquet")
    found = []
    for name in ("rows.csv", "rows.parquet"):
        data = {"train": str(tmp_path / name), "eval": None}
        sections = {"model": {"task": "token-classification", "config": BERT}, "data": data}
        given = assign(name, sections=sections, eval_every=None)
        assert any("using 'words' as data.tokens" in note for note in given.prepared.notes)
        found.append((given.prepared.facts, given.prepared.num_tokens, given.prepared.num_samples))
    assert found[0] == found[1]


def test_lists_that_are_printed_without_commas(tmp_path: Path, assign: Callable[..., Assignment]) -> None:
    """numpy prints them so, and Python would join their texts to one."""
    path = tmp_path / "rows.csv"
    rows = [[np.array(["I", "ran"]), np.array(["O", "B"])]]
    pd.DataFrame(rows, columns=["tokens", "tags"]).to_csv(path, index=False)
    sections = {"model": {"task": "token-classification", "config": BERT}, "data": {"train": str(path), "eval": None}}
    with pytest.raises(
        ConfigError, match=r"row 1 .line 2.: column 'tokens' holds \"\['I' 'ran'\]\", not a list of texts"
    ):
        assign("words", sections=sections, eval_every=None)


def test_a_rows_words_and_tags(tmp_path: Path, assign: Callable[..., Assignment]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"tokens": ["a", "b"], "tags": ["B", "O"]}, {"tokens": ["a", ""], "tags": ["B", "O"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"model": {"task": "token-classification", "config": BERT}, "data": {"train": str(path), "eval": None}}
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 2: word 1 of it, '', has no token"):
        assign("words", sections=sections, eval_every=None)
    sections["data"]["max_bad_rows"] = 1  # type: ignore[index]
    assert assign("words", sections=sections, eval_every=None).prepared.num_samples == 1


# -- entities ----------------------------------------------------------------------------------------------------------

SCHEMES = {
    "IOB1": ["O", "I-PER", "B-PER", "I-LOC", "B-LOC"],
    "IOB2": ["O", "B-PER", "I-PER", "B-some-thing", "I-some-thing"],
    "BIOES": ["O", *(f"{position}-{kind}" for position in "BIES" for kind in ("PER", "LOC"))],
    "no types": ["B", "I", "O"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(5))
def test_entity_scores_are_those_of_seqeval(scheme: str, seed: int) -> None:
    metrics = pytest.importorskip("seqeval.metrics", reason="needs seqeval")
    classes, draw = SCHEMES[scheme], random.Random(seed)
    assert has_entities(classes)
    lengths = [draw.randint(1, 9) for _ in range(40)]
    right = [[draw.randrange(len(classes)) for _ in range(length)] for length in lengths]
    found = [[tag if draw.random() < 0.7 else draw.randrange(len(classes)) for tag in text] for text in right]
    names = [[[classes[tag] for tag in text] for text in side] for side in (right, found)]

    def padded(texts: list[list[int]], first: int) -> torch.Tensor:
        """With unlabelled tokens before and within, as of special tokens and of later tokens of words."""
        spread = [[first, *(item for tag in text for item in (tag, first))] for text in texts]
        return torch.tensor([[*text, *[first] * (20 - len(text))] for text in spread])

    labels, predicted = padded(right, -100), padded(found, 1)
    parts = [
        count_entities(predicted[begin : begin + 7], labels[begin : begin + 7], classes) for begin in range(0, 40, 7)
    ]
    assert torch.equal(sum(parts, torch.zeros(3, dtype=torch.long)), count_entities(predicted, labels, classes))
    expected = {
        f"entity_{name}": getattr(metrics, f"{name}_score")(*names, average="micro", zero_division=0)
        for name in ("precision", "recall", "f1")
    }
    assert 0 < expected["entity_f1"] < 1
    assert entity_scores(count_entities(predicted, labels, classes)) == pytest.approx(expected, abs=1e-12)


def test_entities_by_hand() -> None:
    """B I O | B B against B I I | B I: of the given (0-1), (0-0), (1-1) none is found whole."""
    classes = ["B-X", "I-X", "O"]
    labels, predicted = torch.tensor([[0, 1, 2], [0, 0, 2]]), torch.tensor([[0, 1, 1], [0, 1, 2]])
    assert count_entities(predicted, labels, classes).tolist() == [0, 2, 3]
    assert count_entities(labels, labels, classes).tolist() == [3, 3, 3]
    assert entity_scores(torch.tensor([0, 0, 0])) == {"entity_precision": 0, "entity_recall": 0, "entity_f1": 0}


@pytest.mark.parametrize("classes", [["NOUN", "VERB", "O"], ["B-X", "I-X"], ["name", "word"], ["L-X", "B-X", "O"]])
def test_other_tags_have_no_entity_scores(classes: list[str]) -> None:
    assert find_task("token-classification").score_names({"classes": classes}) == ("accuracy", "f1")


def test_tags_of_entities_have_them() -> None:
    names = find_task("token-classification").score_names({"classes": ["B", "I", "O"]})
    assert names == ("accuracy", "f1", "entity_precision", "entity_recall", "entity_f1")
