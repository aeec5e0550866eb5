"""Sequence to sequence: read a source text, generate a target text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.tasks.base import IGNORED, Batch, Record, TokenTask, ints
from outlast.trainers.tasks.greedy_decoding import generate_continuation

if TYPE_CHECKING:
    from outlast.trainers.config.data import DataSettings
    from outlast.trainers.data.tokenizer import Tokenizer


class Seq2SeqLM(TokenTask):
    """Generate the target of a source. In training the decoder reads the target shifted by one."""

    auto_class = "AutoModelForSeq2SeqLM"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("source", ColumnType.TEXT),
        Column("target", ColumnType.TEXT, is_target=True),
    )
    options = ("max_target_length",)
    special_tokens: ClassVar = {
        "pad_token": "<|pad|>"
    }  # not the end token: the decoder starts with it, and must learn to predict the end token
    template = ("$A <|endoftext|>", "$A <|endoftext|> $B <|endoftext|>")

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self._smoothing, self._has_streams = 0.0, False

    @classmethod
    def unsupported_reason(cls, config: Any) -> str | None:
        if not getattr(config, "is_encoder_decoder", False):
            return "it is not an encoder with a decoder"
        decoder = config.decoder if config.model_type == "encoder-decoder" else None
        if decoder is not None and not (decoder.is_decoder and decoder.add_cross_attention):
            return "is_decoder and add_cross_attention of its decoder must be true"
        return None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        inner, settings = self.tokenizer.inner, self.settings
        if getattr(inner, "tgt_lang", "") is None:  # transformers would mark the targets as it marks the sources
            raise ConfigError(
                f"{type(inner).__name__} marks texts with their language, and has no language of targets",
                hint="set tokenizer.tgt_lang = …, then save_pretrained into model.path (or tokenizer.path)",
            )
        sources = inner([record["source"] for record in records], truncation=True, max_length=settings.max_length)
        targets = inner(
            text_target=[record["target"] for record in records], truncation=True, max_length=settings.max_target_length
        )
        for source, target in zip(sources["input_ids"], targets["input_ids"], strict=True):
            yield {"input_ids": ints(source), "labels": ints(target)}

    def fault(self, record: Record) -> str | None:
        return None if record["source"] and record["target"] else "its source or target is empty"

    def configure(self, config: Any) -> None:
        super().configure(config)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id
        if config.model_type == "prophetnet":
            self._smoothing, self._has_streams = config.eps, not config.disable_ngram_loss

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder_inputs(unwrap(model), batch["labels"]),
            use_cache=False,
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Compute the sum of the loss. ProphetNet predicts several tokens at each position: the mean over these."""
        streams = [outputs.logits]
        if self._has_streams and outputs.logits_ngram is not None:
            streams += outputs.logits_ngram.unbind(1)
        losses = [
            functional.cross_entropy(
                logits.float().flatten(0, 1),
                batch["labels"].flatten(),
                reduction="sum",
                ignore_index=IGNORED,
                label_smoothing=self._smoothing,
            )
            for logits in streams
        ]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        inner, settings = self.tokenizer.inner, self.settings
        start = self._target_start(unwrap(model))
        num_new = settings.max_target_length + 1 - start.shape[1]
        for record in records:
            given = inner(record["source"], truncation=True, max_length=settings.max_length, return_tensors="pt")
            tokens = generate_continuation(self, unwrap(model), {**given, "decoder_input_ids": start}, num_new)
            yield {"source": record["source"], "target": inner.decode(tokens, skip_special_tokens=True)}

    def _target_start(self, model: nn.Module) -> torch.Tensor:
        """Return what the decoder reads before it writes a target's first word, such as the token of the language."""
        inner = self.tokenizer.inner
        empty, letter = (inner(text_target=text)["input_ids"] for text in ("", "a"))
        num_leading = len([*takewhile(lambda pair: pair[0] == pair[1], zip(empty, letter, strict=False))])
        return decoder_inputs(model, torch.tensor([letter]))[:, : num_leading + 1]


def decoder_inputs(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Shift labels by one position, as the model does when its forward is given labels. Returns the decoder's input."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels.clone())  # FSMT changes them
        return shifted
    config = model.config
    shifted = functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
