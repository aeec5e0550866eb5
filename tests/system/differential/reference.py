"""What plain transformers learns from the same rows: samples one by one, without padding, made as in its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.system.differential.models import HEADS
from tests.system.differential.rows import MAX_LENGTH, Row

IGNORED = -100
STRIDE = 8


@dataclass(frozen=True)
class Learned:
    """Loss, norm of the gradients, and the labels of each sample, in the order of the rows."""

    loss: float
    norm: float
    labels: list[list[float]]


@dataclass
class Example:
    """A sample as the model takes it, and how many terms its mean loss has."""

    inputs: dict[str, Any]
    labels: list[float]
    terms: int


Maker = Callable[[Any, Any, Sequence[Row]], list[Example]]


def _classes(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    examples = []
    for row in rows:
        texts = [row["text"], row["text_pair"]] if "text_pair" in row else [row["text"]]
        encoded = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
        label, kind = row["label"], config.problem_type
        if kind == "multi_label_classification":
            target: Any = [float(config.id2label[index] in label) for index in range(config.num_labels)]
            examples.append(Example({**encoded, "labels": target}, target, config.num_labels))
        elif kind == "regression":
            examples.append(Example({**encoded, "labels": float(label)}, [label], 1))
        else:
            index = config.label2id[str(label)]
            examples.append(Example({**encoded, "labels": index}, [index], 1))
    return examples


def _tags(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    """As `run_ner.py`: the first token of a word has its tag; byte-level BPE begins a word with a space."""
    space = " " if "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer) else ""
    examples = []
    for row in rows:
        words = [space + word for word in row["tokens"]]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
        of_tokens = encoded.word_ids()
        labels = [
            config.label2id[row["tags"][word]] if word is not None and of_tokens.index(word) == position else IGNORED
            for position, word in enumerate(of_tokens)
        ]
        examples.append(Example({**encoded, "labels": labels}, labels, sum(item != IGNORED for item in labels)))
    return examples


def _answers(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    """As `run_qa.py` prepares its training features; a window without the answer points to its first token."""
    examples = []
    for row in rows:
        encoded = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=MAX_LENGTH,
            stride=min(STRIDE, MAX_LENGTH // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for number, ids in enumerate(encoded["input_ids"]):
            offsets, sequences = encoded["offset_mapping"][number], encoded.sequence_ids(number)
            inside = [position for position, sequence in enumerate(sequences) if sequence == 1]
            first, last, start, end = inside[0], inside[-1], 0, 0
            if row["answers"]["text"]:
                begin = row["answers"]["answer_start"][0]
                stop = begin + len(row["answers"]["text"][0])
                if offsets[first][0] <= begin and offsets[last][1] >= stop:
                    while first <= last and offsets[first][0] <= begin:
                        first += 1
                    while offsets[last][1] >= stop:
                        last -= 1
                    start, end = first - 1, last + 1
            names = [name for name in ("token_type_ids", "attention_mask") if name in encoded]
            inputs = {"input_ids": ids, **{name: encoded[name][number] for name in names}}
            examples.append(Example({**inputs, "start_positions": start, "end_positions": end}, [start, end], 1))
    return examples


def _choices(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    """As `run_swag.py`; the two choices of a row are padded to one length."""
    examples = []
    for row in rows:
        pairs = [[row["text"]] * len(row["choices"]), row["choices"]]
        encoded = tokenizer(*pairs, truncation=True, max_length=MAX_LENGTH, padding=True)
        examples.append(Example({**encoded, "labels": row["label"]}, [row["label"]], 1))
    return examples


def _packed(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    """As `run_clm.py` groups texts; documents end with the end token, and begin as the tokenizer begins a text."""
    ids = list(chain(*[[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows]))
    pieces = [ids[start : start + MAX_LENGTH] for start in range(0, len(ids) - MAX_LENGTH + 1, MAX_LENGTH)]
    return [Example({"input_ids": piece, "labels": piece}, piece, MAX_LENGTH - 1) for piece in pieces]


def _chat(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    """The tokens of the answers: those that the template marks, else what follows the prompt for each."""
    examples = []
    for row in rows:
        turns = row["messages"]
        if "{% generation %}" in tokenizer.chat_template:
            encoded = tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, is_answer = encoded["input_ids"], encoded["assistant_masks"]
        else:
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            ids, is_answer = encoded["input_ids"], [0] * len(encoded["input_ids"])
            for number in (1, 3):
                prompt = tokenizer.apply_chat_template(turns[:number], tokenize=False, add_generation_prompt=True)
                until = tokenizer.apply_chat_template(turns[: number + 1], tokenize=False)
                for position, (start, stop) in enumerate(encoded["offset_mapping"]):
                    is_answer[position] |= start < len(until) and stop > len(prompt)
        ids, is_answer = ids[: 4 * MAX_LENGTH], is_answer[: 4 * MAX_LENGTH]
        labels = [token if learned else IGNORED for token, learned in zip(ids, is_answer, strict=True)]
        examples.append(Example({"input_ids": ids, "labels": labels}, labels, sum(x != IGNORED for x in labels[1:])))
    return examples


def _translations(tokenizer: Any, config: Any, rows: Sequence[Row]) -> list[Example]:
    examples = []
    for row in rows:
        source = tokenizer(row["source"], truncation=True, max_length=MAX_LENGTH)
        labels = tokenizer(text_target=row["target"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        names = [name for name in source if name != "token_type_ids"]
        inputs = {name: source[name] for name in names}
        examples.append(Example({**inputs, "labels": labels}, labels, len(labels)))
    return examples


MAKERS: Mapping[str, Maker] = {
    **dict.fromkeys(("classes", "pairs", "multi-label", "regression"), _classes),
    "tags": _tags,
    "answers": _answers,
    "choices": _choices,
    "causal-lm": _packed,
    **dict.fromkeys(("chat", "marked chat"), _chat),
    "seq2seq": _translations,
}
PROBLEMS = {"multi-label": "multi_label_classification", "regression": "regression"}


def load(folder: Path, kind: str) -> tuple[Any, Any]:
    """Model and tokenizer of a directory, as transformers loads them."""
    head = getattr(transformers, HEADS[kind])
    config = transformers.AutoConfig.from_pretrained(folder)
    if HEADS[kind].endswith("SequenceClassification"):
        config.problem_type = PROBLEMS.get(kind, "single_label_classification")
    return head.from_pretrained(folder, config=config).train(), transformers.AutoTokenizer.from_pretrained(folder)


def learn(folder: Path, kind: str, rows: Sequence[Row]) -> Learned:
    """Loss and gradients of the mean over all terms, from the model's own loss of each sample alone."""
    model, tokenizer = load(folder, kind)
    examples = MAKERS[kind](tokenizer, model.config, rows)
    return of_examples(model, examples)


def of_examples(model: Any, examples: Sequence[Example]) -> Learned:
    total, terms = 0.0, sum(example.terms for example in examples)
    for example in examples:
        inputs = {name: torch.tensor([value]) for name, value in example.inputs.items()}
        loss = model(**inputs).loss * (example.terms / terms)
        loss.backward()
        total += loss.item()
    with torch.device("meta"):  # parameters that its constructor freezes, such as Pegasus' positions, stay as they are
        frozen = {name for name, item in type(model)(model.config).named_parameters() if not item.requires_grad}
    named = {name: parameter.grad for name, parameter in model.named_parameters() if name not in frozen}
    grads = [grad for grad in named.values() if grad is not None]
    norm = torch.stack([grad.double().norm() for grad in grads]).norm().item()
    return Learned(total, norm, [example.labels for example in examples])
