"""Masked language modelling: guess the tokens that were hidden. Which ones follows from (seed, epoch, sample)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS, IGNORED, Batch, Record, TokenTask, ints

NUM_GUESSES = 5


class MaskedLM(TokenTask):
    """Guess hidden tokens from both sides. A long text is several samples of `max_length` tokens.

    Of the `data.mask_share` chosen tokens, at least one in a sample, 80 % are replaced by the mask token, 10 % by any
    token, and 10 % stay (Devlin et al., "BERT", 2018).
    """

    auto_class = "AutoModelForMaskedLM"
    columns: ClassVar[tuple[Column, ...]] = (Column("text", ColumnType.TEXT),)
    options = ("mask_share",)
    special_tokens = BERT_TOKENS
    template = BERT_TEMPLATE

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        inner = self.tokenizer.inner
        if inner.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token", hint="masked-lm needs a model such as BERT")
        texts = [record["text"] for record in records]
        encoded = inner(
            texts, truncation=True, max_length=self.settings.max_length, return_overflowing_tokens=True, verbose=False
        )
        for ids in encoded["input_ids"]:
            if len(ids) > inner.num_special_tokens_to_add():
                yield {"input_ids": ints(ids)}

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        masked = [self._mask(sample["input_ids"], key) for sample, key in zip(samples, keys, strict=True)]
        return super().collate([{"input_ids": ids, "labels": labels} for ids, labels in masked], keys)

    def _mask(self, ids: npt.NDArray[np.int32], key: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """What the model sees, and what it is to say."""
        inner = self.tokenizer.inner
        chance, kind, other = np.random.Philox(key=key).random_raw(3 * len(ids)).reshape(3, -1)
        hideable = ~np.isin(ids, inner.all_special_ids)
        if not hideable.any():
            hideable[:] = True
        chance = np.where(hideable, chance, np.uint64(2**64 - 1))
        chosen = hideable & (chance < np.uint64(int(self.settings.mask_share * 2**64)))
        chosen[chance.argmin()] = True
        tenths = kind % np.uint64(10)
        seen = np.where(chosen & (tenths < 8), inner.mask_token_id, ids)
        seen = np.where(chosen & (tenths == 8), other % np.uint64(len(inner)), seen)
        return ints(seen), ints(np.where(chosen, ids, IGNORED))

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """The likeliest tokens for each mask token in a text."""
        inner, device = self.tokenizer.inner, next(model.parameters()).device
        for record in records:
            encoded = inner(record["text"], truncation=True, max_length=self.settings.max_length, return_tensors="pt")
            [ids] = encoded["input_ids"]
            places = (ids == inner.mask_token_id).nonzero().flatten()
            if not len(places):
                raise ConfigError(
                    f"{record['text']!r} hides nothing", hint=f"write {inner.mask_token} for a hidden word"
                )
            shares = model(**encoded.to(device)).logits[0].float().softmax(-1).cpu()
            guesses = []
            for place in places.tolist():
                best = shares[place].topk(NUM_GUESSES)
                numbers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                guesses.append([{"token": inner.decode([number]), "score": share} for number, share in numbers])
            yield {"text": record["text"], "guesses": guesses}
