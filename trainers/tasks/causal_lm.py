"""Causal language modelling: predict the next token of documents, packed without padding or one to a sample.

Packed samples have `input_ids` only, all of one length. Others have `labels` too: of a prompt with its completion, only
the completion is learned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType, RowForm
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.tasks.base import IGNORED, Batch, Record, Task, begins_late, ints, next_token_loss, require_fast
from outlast.trainers.tasks.greedy_decoding import NUM_NEW_TOKENS, generate_continuation

_NUM_SURVEYED = 100  # rows that show whether prompts end in a space
_SPACES = (
    "most prompts end in a space, which many tokenizers join with the completion's first word: the model may go on "
    "otherwise from a prompt alone; begin the completions with the space instead"
)


class CausalLM(Task):
    """Predict the next token at every position but the last. Samples are documents packed to `max_length` tokens.

    With `data.packing: false` a document is a sample; so is a prompt with its completion, which alone is learned.
    """

    auto_class = "AutoModelForCausalLM"
    columns: ClassVar[tuple[Column, ...]] = (Column("text", ColumnType.TEXT),)
    forms: ClassVar[tuple[RowForm, ...]] = (
        RowForm(
            "prompt and completion",
            (Column("prompt", ColumnType.TEXT), Column("completion", ColumnType.TEXT, is_target=True)),
        ),
    )
    options = ("begin_token", "packing")

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self._begin = begin_tokens(settings, tokenizer)
        self.packs = settings.packing and not facts.get("completions")
        if facts.get("completions"):
            require_fast(tokenizer, "a prompt with a completion")

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        first = list(islice(records, _NUM_SURVEYED))
        if not first or "completion" not in first[0]:
            return {}
        num_spaces = sum(record["prompt"].endswith(" ") for record in first)
        return {"completions": True, **({"notes": [_SPACES]} if 2 * num_spaces > len(first) else {})}

    @classmethod
    def data_version(cls, settings: DataSettings, load_tokenizer: Callable[[], Tokenizer | None]) -> int:
        """Release 0.1.0 began no document with a token, whatever the tokenizer."""
        tokenizer = load_tokenizer() if settings.begin_token == "auto" else None
        return cls.version + (tokenizer is not None and bool(begin_tokens(settings, tokenizer)))

    def fault(self, record: Record) -> str | None:
        if "completion" in record:
            if not record["completion"].strip():
                return "its completion is empty"
            [(_, labels)] = self._completed([record])
            is_learned = [label != IGNORED for label in labels]
            if not any(is_learned[1 : self.settings.max_length]):
                return begins_late("completion", is_learned, self.settings)
            return None
        return None if self.packs or record["text"] else "its text is empty"

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        if records and "completion" in records[0]:
            for ids, labels in self._completed(records):
                length = self.settings.max_length
                yield {"input_ids": ints(ids[:length]), "labels": ints(labels[:length])}
            return
        for ids in self.tokenizer.encode([record["text"] for record in records]):
            ids = [*self._begin, *ids]
            if self.packs:
                yield {"input_ids": ints(ids)}
            else:
                kept = ints(ids[: self.settings.max_length])
                yield {"input_ids": kept, "labels": kept}

    def _completed(self, records: Sequence[Record]) -> Iterator[tuple[list[int], list[int]]]:
        """Encode prompts with their completions, not truncated.

        A token is learned if it has a character of the completion.
        """
        texts = [record["prompt"] + record["completion"] for record in records]
        end = self.tokenizer.encode([""])[0][-1]
        encoded = self.tokenizer.inner(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for record, (ids, offsets) in zip(records, pairs, strict=True):
            first = len(record["prompt"])
            learned = [token if stop > first else IGNORED for token, (_, stop) in zip(ids, offsets, strict=True)]
            has_end = ids[-1:] == [end]
            tokens = [*self._begin, *ids, *([] if has_end else [end])]
            labels = [*(IGNORED for _ in self._begin), *learned, *([] if has_end else [end])]
            yield tokens, labels

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        if not self.packs:
            return super().collate(samples, keys)
        return {"input_ids": torch.from_numpy(np.stack([sample["input_ids"] for sample in samples]).astype(np.int64))}

    def configure(self, config: Any) -> None:
        """Change nothing: packed samples have no padding, and the attention mask marks that of others."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        return model(**given, use_cache=False)

    def count(self, batch: Batch) -> int:
        if "labels" in batch:
            return int((batch["labels"][:, 1:] != IGNORED).sum())
        samples, length = batch["input_ids"].shape
        return int(samples * (length - 1))

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return next_token_loss(outputs.logits, batch.get("labels", batch["input_ids"]))

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        inner = self.tokenizer.inner
        for record in records:
            text = record["text"] if "text" in record else record["prompt"]
            ids = torch.tensor([[*self._begin, *inner(text, add_special_tokens=False)["input_ids"]]], dtype=torch.int64)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tokens = generate_continuation(self, unwrap(model), given, NUM_NEW_TOKENS)
            yield {"text": text, "continuation": inner.decode(tokens, skip_special_tokens=True)}


def begin_tokens(settings: DataSettings, tokenizer: Tokenizer) -> list[int]:
    """Return the token that each document begins with, in a list; an empty list if there is none.

    Raises ConfigError if the settings ask for one, and the tokenizer has none.
    """
    begin = tokenizer.inner.bos_token_id
    if settings.begin_token is True and begin is None:
        hint = "set a bos_token in its tokenizer_config.json, or data.begin_token: auto"
        raise ConfigError("data.begin_token is true, and the tokenizer has no token for the beginning", hint=hint)
    is_added = begin is not None and tokenizer.inner("a")["input_ids"][:1] == [begin]
    return [begin] if settings.begin_token is True or (settings.begin_token == "auto" and is_added) else []
