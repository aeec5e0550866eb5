"""Masked language modelling. Which tokens are masked is a function of (seed, epoch, sample) only."""

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
    """Predict masked tokens. A long text is split into several samples of `max_length` tokens.

    A share `data.mask_share` of the tokens is selected, at least one per sample: 80 % of these become the mask token,
    10 % a random token, and 10 % stay as they are (Devlin et al., "BERT", 2018).
    """

    auto_class = "AutoModelForMaskedLM"
    columns: ClassVar[tuple[Column, ...]] = (Column("text", ColumnType.TEXT),)
    options = ("mask_share",)
    splits = True
    special_tokens = BERT_TOKENS
    template = BERT_TEMPLATE

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        inner = self.tokenizer.inner
        if inner.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token", hint="use a model such as BERT for masked-lm")
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
        """Return the input ids with masked tokens, and the labels."""
        inner = self.tokenizer.inner
        chance, replacement, random_ids = np.random.Philox(key=key).random_raw(3 * len(ids)).reshape(3, -1)
        maskable = ~np.isin(ids, inner.all_special_ids)
        if not maskable.any():
            maskable[:] = True
        chance = np.where(maskable, chance, np.uint64(2**64 - 1))
        selected = maskable & (chance < np.uint64(int(self.settings.mask_share * 2**64)))
        selected[chance.argmin()] = True
        tenths = replacement % np.uint64(10)
        masked = np.where(selected & (tenths < 8), inner.mask_token_id, ids)
        masked = np.where(selected & (tenths == 8), random_ids % np.uint64(len(inner)), masked)
        return ints(masked), ints(np.where(selected, ids, IGNORED))

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """Predict the most likely tokens for each mask token in a text."""
        inner, device = self.tokenizer.inner, next(model.parameters()).device
        for record in records:
            encoded = inner(record["text"], truncation=True, max_length=self.settings.max_length, return_tensors="pt")
            [ids] = encoded["input_ids"]
            positions = (ids == inner.mask_token_id).nonzero().flatten()
            if not len(positions):
                raise ConfigError(
                    f"{record['text']!r} has no mask token", hint=f"write {inner.mask_token} for a masked word"
                )
            given = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
            probabilities = self.forward(model, given).logits[0].float().softmax(-1).cpu()
            guesses = []
            for position in positions.tolist():
                best = probabilities[position].topk(NUM_GUESSES)
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                guesses.append([{"token": inner.decode([token]), "score": score} for token, score in pairs])
            yield {"text": record["text"], "guesses": guesses}
