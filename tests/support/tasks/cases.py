"""One small case for each task: a tiny model, rows of real text, and how the model itself computes its loss."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DISTILBERT = {
    "model_type": "distilbert",
    "n_layers": 1,
    "n_heads": 2,
    "dim": 32,
    "hidden_dim": 64,
    "max_position_embeddings": 64,
}
GPT = {"model_type": "openai-gpt", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}
GPT2 = {**GPT, "model_type": "gpt2"}
T5 = {"model_type": "t5", "num_layers": 1, "num_heads": 2, "d_model": 32, "d_kv": 16, "d_ff": 64}
M2M = {
    "model_type": "m2m_100",
    "d_model": 32,
    **{f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in {"ffn_dim": 64, "layerdrop": 0}.items()
    },
}


def paragraphs() -> Iterator[str]:
    """Beginnings of paragraphs of Python's help, 30 to 107 characters long."""
    for _, page in sorted(pydoc_data.topics.topics.items()):
        for number, text in enumerate(page.split("\n\n")[:6]):
            if len(text.split()) > 8:
                yield " ".join(text.split())[: 30 + (len(text) * 7 + number) % 78]


def with_topics(text: str) -> Row:
    return {"text": text, "label": [word for word in ("class", "object", "name", "value") if word in text]}


def with_tags(text: str) -> Row:
    words = text.split()
    return {"tokens": words, "tags": ["name" if word[0].isupper() else "word" for word in words]}


def with_answer(text: str) -> Row:
    """Asks for the first long word."""
    answer = next((word for word in text.split() if len(word) > 7), text.split()[0])
    given = {"text": [answer], "answer_start": [text.index(answer)]}
    return {"question": "Which word is long?", "context": text, "answers": given}


def with_turns(text: str) -> Row:
    """Two questions with an answer each."""
    turns = [("user", text[:12]), ("assistant", text[12:24]), ("user", "on?"), ("assistant", text[24:40])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TURNS = """{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"""


def with_choices(text: str) -> Row:
    """The text goes on as it began, or shouts."""
    first, second = text[:20], text[20:]
    right = len(text) % 2
    return {"text": first, "choices": [second.upper(), second] if right else [second, second.upper()], "label": right}


@dataclass(frozen=True)
class Case:
    """A task, and what it needs to be tried.

    Attributes:
        task: Its name.
        config: The model.
        row: Makes a row of a paragraph.
        own: The model's own loss of a batch.
        data: More settings of the data.
        own_batch: Samples in a batch that the model averages over as the task does.
        lr: The learning rate at which a few steps show.
    """

    task: str
    config: dict[str, Any]
    row: Callable[[str], Row]
    own: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] = lambda model, batch: model(**batch).loss
    data: dict[str, Any] = field(default_factory=dict)
    own_batch: int = 7
    lr: float = 3e-3

    def sections(self, folder: Path, num_rows: int | None = None) -> dict[str, Any]:
        """The blocks of a run file, its rows (or the first so many) written to `folder`."""
        path = folder / f"{self.task}-{self.row.__name__}-{num_rows}.jsonl"
        if not path.exists():
            texts = islice(paragraphs(), num_rows)
            path.write_text("".join(json.dumps(self.row(text)) + "\n" for text in texts))
        data = {"train": str(path), "eval": "10%", "max_length": 40, **self.data}
        return {
            "model": {"config": self.config, "task": self.task},
            "data": data,
            "train": {"lr": self.lr, "steps": 12},
        }


def text_only(text: str) -> Row:
    return {"text": text}


def with_class(text: str) -> Row:
    return {"text": text, "label": "long" if len(text) > 70 else "short"}


def with_number(text: str) -> Row:
    return {"text": text, "label": len(text) / 100}


def with_pair(text: str) -> Row:
    return {"text": text[:50], "text_pair": text[50:100], "label": int(text[0].isupper())}


def with_first_words(text: str) -> Row:
    return {"source": text, "target": " ".join(text.split()[:3])}


def with_completion(text: str) -> Row:
    return {"prompt": text[:20], "completion": text[20:]}


def _answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name not in ("start", "end")}
    loss: torch.Tensor = model(**given, start_positions=batch["start"], end_positions=batch["end"]).loss
    return loss


def _both_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name not in ("labels", "words", "attention_mask")}
    flat = batch["attention_mask"].flatten(0, 1)
    outputs = model(**given, attention_mask=flat, labels=batch["words"], mc_labels=batch["labels"])
    loss: torch.Tensor = outputs.loss + outputs.mc_loss
    return loss


CASES = {
    "classes": Case("sequence-classification", GPT2, with_class),
    "pairs": Case("sequence-classification", BERT, with_pair),
    "multi-label": Case("sequence-classification", BERT, with_topics),
    "regression": Case("sequence-classification", DISTILBERT, with_number),
    "chat": Case("chat", GPT2, with_turns, data={"chat_template": TURNS, "max_length": 48}),
    "unpacked": Case("causal-lm", GPT2, text_only, data={"packing": False}),
    "completions": Case("causal-lm", GPT2, with_completion),
    "masked-lm": Case("masked-lm", BERT, text_only),
    "tags": Case("token-classification", DISTILBERT, with_tags),
    "seq2seq-lm": Case("seq2seq-lm", T5, with_first_words),
    "seq2seq-lm without its own shift": Case("seq2seq-lm", M2M, with_first_words),
    "answers": Case("question-answering", BERT, with_answer, own=_answer_loss, data={"stride": 8}, own_batch=1),
    "choices": Case("multiple-choice", BERT, with_choices, lr=2e-2),
    "double-heads gpt2": Case("double-heads", GPT2, with_choices, own=_both_losses, own_batch=1),
    "double-heads gpt": Case("double-heads", GPT, with_choices, own=_both_losses, own_batch=1),
}
